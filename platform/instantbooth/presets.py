"""Named models: what `Personalizer.from_pretrained("miniature")` stands for."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from instantbooth.errors import WeightsError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """Where the parts of a model lie: folders, or names on the Hugging Face hub."""

    base: str
    """A Stable Diffusion 1.x folder: tokenizer, text_encoder, vae, unet, scheduler."""
    image_encoder: str
    """A CLIP folder."""
    segmenter: str | None = None
    """A semantic segmentation model that finds the subject where no mask is given."""
    weights: str | None = None
    """Trained adapters and encoders."""
    patch_layer: int = -1
    """Layer of the image encoder whose tokens are the patch features."""


def miniature_folder() -> Path:
    """The shipped miniature: base, clip, segmenter, adapters, judges/attributes, judges/identity."""
    return Path(__file__).parent / "miniature" / "weights"


def peers_folder() -> Path:
    """Shipped weights of the methods that the miniature is compared with: ip_adapter/."""
    return Path(__file__).parent / "miniature" / "peers"


def preset(name: str) -> ModelPreset:
    """The preset of that name, or of registered weights. WeightsError with a suggestion for an unknown one."""
    if name.startswith("models:/"):
        return registered_preset(name)
    presets = {
        "miniature": miniature_preset(miniature_folder()),
        "sd15": ModelPreset(
            base="stable-diffusion-v1-5/stable-diffusion-v1-5", image_encoder="openai/clip-vit-large-patch14"
        ),
    }
    if name not in presets:
        raise WeightsError(f"model {name!r} is neither a folder nor a preset. {did_you_mean(name, presets)}")
    return presets[name]


def model_parts(
    model: str | Path, weights: str | Path | None, image_encoder: str | Path | None, segmenter: str | Path | None
) -> ModelPreset:
    """A preset or a Stable Diffusion folder with its image_encoder/, and in its place what is named besides.

    Raises WeightsError.
    """
    if not isinstance(model, str | Path):
        raise WeightsError(f"model is {type(model).__name__}; name a preset or a folder")
    folder = Path(model)
    if folder.is_dir():
        own = folder / "image_encoder"
        if image_encoder is None and not own.is_dir():
            raise WeightsError(f"{folder} has no image_encoder/; pass image_encoder=, the CLIP folder of these weights")
        chosen = ModelPreset(base=str(folder), image_encoder=str(own))
    else:
        chosen = preset(str(model))
    return replace(
        chosen,
        weights=chosen.weights if weights is None else weights_folder(str(weights)),
        image_encoder=chosen.image_encoder if image_encoder is None else str(image_encoder),
        segmenter=chosen.segmenter if segmenter is None else str(segmenter),
    )


def registered_preset(uri: str) -> ModelPreset:
    """What models:/instantbooth@champion or models:/instantbooth/3 stands for: weights, and the base noted with them.

    The registry is MLFLOW_TRACKING_URI, by default sqlite:///mlflow.db. Raises WeightsError.
    """
    from instantbooth.tracking import resolve_version

    version = resolve_version(uri, tracking_uri())
    if not version.base:
        raise WeightsError(f"{uri} does not say which base it was trained for; name the base, and pass weights={uri!r}")
    if Path(version.base).is_dir():
        own = str(Path(version.base) / "image_encoder")
        chosen = ModelPreset(base=version.base, image_encoder=version.image_encoder or own)
    else:
        known = preset(version.base)
        chosen = replace(known, image_encoder=version.image_encoder or known.image_encoder)
    return replace(chosen, weights=weights_folder(version.uri))


def weights_folder(weights: str, registry_uri: str | None = None) -> str:
    """A folder as it is; registered weights downloaded, once for each version.

    The registry is MLFLOW_TRACKING_URI unless given. Raises WeightsError for a version or alias that is not there.
    """
    if not weights.startswith("models:/"):
        return weights
    from instantbooth.tracking import Registry, absolute_tracking_uri, resolve_version

    uri = absolute_tracking_uri(registry_uri or tracking_uri())
    version = resolve_version(weights, uri)
    registry = sha256(uri.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "instantbooth"
    # A registry made anew at the same place numbers its versions from 1 again.
    folder = cache / f"{version.name}-{version.number}-{version.created_ms}-{registry}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            downloaded = Registry(uri).download(version, Path(scratch))
            # Whoever comes second finds it there.
            with contextlib.suppress(OSError):
                downloaded.rename(folder)
    return str(folder)


def tracking_uri() -> str:
    """MLflow's, as its own variable says."""
    return os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")


def miniature_preset(folder: Path) -> ModelPreset:
    """A miniature in any folder laid out like the shipped one.

    Its patch features come from the last but one layer: the tokens of the last layer of a CLIP trained from nothing
    for minutes have learned nothing of their own, since its loss sees only the first of them.
    """
    return ModelPreset(
        base=str(folder / "base"),
        image_encoder=str(folder / "clip"),
        segmenter=str(folder / "segmenter"),
        weights=str(folder / "adapters"),
        patch_layer=-2,
    )
