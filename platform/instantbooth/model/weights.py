"""Trained weights on disk: weights.safetensors beside config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from hashlib import file_digest, sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from instantbooth.config import WeightsConfig
from instantbooth.errors import WeightsError
from instantbooth.model.base import local_folder
from instantbooth.model.encoders import check_image_encoder
from instantbooth.presets import ModelPreset, model_parts

CONFIG_FILE = "config.json"
TENSORS_FILE = "weights.safetensors"


def save_weights(folder: Path, config: WeightsConfig, trained: nn.Module, *, dtype: torch.dtype) -> None:
    """Writes the folder; config.json last, so that a folder cut short is never taken for weights.

    WeightsError where it cannot be written.
    """
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in trained.state_dict().items()}
    partial = folder / f"{TENSORS_FILE}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        save_file(tensors, partial)
        os.replace(partial, folder / TENSORS_FILE)
        config.save(folder / CONFIG_FILE)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"weights cannot be saved in {folder} ({error}); name a folder to write in") from error


def weights_files(config: WeightsConfig, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The same two files as bytes, config.json last; the tensors are on the CPU."""
    return {
        TENSORS_FILE: save({name: value.contiguous() for name, value in tensors.items()}),
        CONFIG_FILE: config.to_json().encode(),
    }


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The folder's tensors by name. WeightsError where they are missing or damaged."""
    path = _tensors_file(folder)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged ({error}); copy or train the weights again") from error


def _tensors_file(folder: Path) -> Path:
    path = folder / TENSORS_FILE
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; name a folder with {CONFIG_FILE} and {TENSORS_FILE}")
    return path


def trained_parts(
    model: str | Path, weights: str | Path | None, image_encoder: str | Path | None, segmenter: str | Path | None
) -> tuple[ModelPreset, Path, WeightsConfig]:
    """What `model_parts` finds, as its weights want it; their folder and config.json.

    WeightsError without any, or where a file of theirs or of a local image encoder is missing; BaseModelError where the
    image encoder is neither a folder nor a name.
    """
    parts = model_parts(model, weights, image_encoder, segmenter)
    if parts.weights is None:
        raise WeightsError(f"{model} comes without trained weights; pass weights=, a folder from training")
    folder = Path(parts.weights)
    config = WeightsConfig.load(folder / CONFIG_FILE)
    _tensors_file(folder)
    if (clip := local_folder(parts.image_encoder)) is not None:
        check_image_encoder(clip)
    return replace(parts, patch_layer=config.patch_layer), folder, config


def load_weights(folder: Path, trained: nn.Module, *, prefix: str = "") -> None:
    """Copies the folder's tensors into `trained`, a part of what was trained where their names begin with `prefix`.

    WeightsError where they are missing, damaged or of another shape.
    """
    tensors = fitting_tensors(folder, trained, prefix=prefix)
    trained.load_state_dict({name.removeprefix(prefix): value for name, value in tensors.items()})


def fitting_tensors(folder: Path, trained: nn.Module, *, prefix: str = "") -> dict[str, Tensor]:
    """The tensors that `load_weights` copies, under their names in the folder. Raises as it does."""
    path = folder / TENSORS_FILE
    tensors = {name: value for name, value in read_tensors(folder).items() if name.startswith(prefix)}
    expected = {prefix + name: tuple(value.shape) for name, value in trained.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        name = wrong[0]
        raise WeightsError(
            f"{path} does not fit the model in {len(wrong)} tensors, first {name}: found {found.get(name)}, the model "
            f"has {expected.get(name)}; use the base model and image encoder these weights were trained with"
        )
    return tensors


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all tensors, by name, as float32."""
    content = sha256()
    for name, value in sorted(tensors.items()):
        content.update(name.encode())
        content.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and the content of a model folder's files: configurations, vocabularies and tensors.

    Of a model that is a single file, its content's.
    """
    content = sha256(folder.read_bytes() if folder.is_file() else b"")
    for path in sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".safetensors", ".bin", ".txt")):
        content.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as stream:
            content.update(file_digest(stream, "sha256").digest())
    return content.hexdigest()
