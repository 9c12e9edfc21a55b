"""Photographs laid out as a data set, and tiny models in the true formats to picture and judge their subjects with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from instantbooth.evaluation.ip_adapter import weights
from instantbooth.model.base import BaseModel
from instantbooth.model.encoders import ImageEncoder
from jobs.evaluation.protocol import Photographs
from tests.tiny import portrait, tiny_booth

CPU = torch.device("cpu")
TEST, VALIDATION = ("ada", "ben", "eve"), ("bob", "kim")
"""Names by whose digests their splits follow."""


class Embedding(nn.Module):
    """The mean colour, as an embedding."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3)) + 2


def write(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def people(folder: Path, counts: dict[str, int]) -> Path:
    """photos/, with so many pictures of each name, beside masks/."""
    for number, (person, count) in enumerate(counts.items()):
        for n in range(count):
            image, mask = portrait(10 * number + n)
            write(folder / "photos" / person / f"{n}.jpg", image)
            write(folder / "masks" / person / f"{n}.png", mask)
    return folder / "photos"


def untrained_adapters(tiny: Path, folder: Path, clip: Path | None = None) -> Path:
    """An untrained IP-Adapter of each variant for the tiny base and its CLIP, or another; its projection matters."""
    unet = BaseModel.load(str(tiny / "base"), device=CPU, dtype=torch.float32).unet
    encoder = ImageEncoder(clip or tiny / "clip", patch_layer=weights.PLUS_LAYER, device=CPU, dtype=torch.float32)
    torch.manual_seed(0)
    for variant in weights.VARIANTS:
        weights.save(weights.new_state(unet, encoder, variant), folder / variant / weights.FILE)
    return folder


def photographed(tiny: Path, folder: Path) -> dict[str, Any]:
    """Options of a Protocol: the tiny models, and three pictures of each person, with masks."""
    photos = people(folder, dict.fromkeys((*TEST, *VALIDATION), 3))
    torch.jit.script(Embedding()).save(str(folder / "face.pt"))
    tiny_booth(tiny).save_weights(folder / "weights")
    return {
        "output": str(folder / "out"),
        "photographs": Photographs(
            data=photos,
            base=str(tiny / "base"),
            clip=str(tiny / "clip"),
            face=folder / "face.pt",
            masks=folder / "masks",
        ),
        "weights": folder / "weights",
        "ip_adapter": untrained_adapters(tiny, folder / "ip_adapter"),
        "identities": 2,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "cpus": 1,
    }
