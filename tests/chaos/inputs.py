"""The model and the photos that the chaos runs work with."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from tests.tiny import portrait, tiny_booth, tiny_model


def write_model(folder: Path) -> Path:
    """A tiny model with base/, clip/ and weights/."""
    tiny_booth(tiny_model(folder)).save_weights(folder / "weights")
    return folder


def model_options(folder: Path) -> list[str]:
    """The job's options for such a model."""
    return [
        f"--model.base={folder / 'base'}",
        f"--model.image-encoder={folder / 'clip'}",
        f"--model.weights={folder / 'weights'}",
    ]


def photo(seed: int) -> bytes:
    """A portrait with its mask as alpha, as PNG."""
    image, mask = portrait(seed)
    image.putalpha(mask)
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
