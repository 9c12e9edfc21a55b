"""Named models: what `Personalizer.from_pretrained("miniature")` stands for."""

from __future__ import annotations

from dataclasses import dataclass
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


def preset(name: str) -> ModelPreset:
    """The preset of that name. WeightsError with a suggestion for an unknown one."""
    presets = {
        "miniature": miniature_preset(miniature_folder()),
        "sd15": ModelPreset(
            base="stable-diffusion-v1-5/stable-diffusion-v1-5", image_encoder="openai/clip-vit-large-patch14"
        ),
    }
    if name not in presets:
        raise WeightsError(f"model {name!r} is neither a folder nor a preset. {did_you_mean(name, presets)}")
    return presets[name]


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
