"""Judges of generated pictures: which attributes a picture shows, and whether two pictures show one identity."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from instantbooth.errors import WeightsError

WIDTHS = (32, 64, 128, 192)
EMBEDDING_SIZE = 64
GROUPS = 8


class ResidualCNN(nn.Module):
    """Pictures [N, 3, H, W] in 0 … 1 to features [N, widths[-1]], halved in size by the stem and by each later stage.

    Group norm, not batch norm: averaged parameters then need no statistics of their own.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1)
        strides = [1] + [2] * (len(widths) - 1)
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(before, after, stride)
                for before, after, stride in zip([widths[0], *widths], widths, strides, strict=False)
            )
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Features averaged over all places."""
        hidden: Tensor = self.blocks(self.stem(pixels * 2 - 1))
        return hidden.mean(dim=(2, 3))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(GROUPS, after),
            nn.SiLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.GroupNorm(GROUPS, after),
        )
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride=stride)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, before, H, W] to [N, after, H / stride, W / stride]."""
        return F.silu(self.branch(hidden) + self.shortcut(hidden))


class _Judge(nn.Module):
    """What both judges share: reading pictures, and a folder of model.safetensors and config.json."""

    def __init__(self, config: dict[str, object], image_size: int) -> None:
        super().__init__()
        self.config = config | {"image_size": image_size}
        self.image_size = image_size

    def save(self, folder: Path) -> None:
        """Writes config.json and model.safetensors; `load` reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu") -> Self:
        """The judge saved in a folder, in eval mode. WeightsError where it is missing or of another kind."""
        try:
            judge = cls(**json.loads((folder / "config.json").read_text()))
            judge.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise WeightsError(
                f"{folder} holds no {cls.__name__}: {error}; train it, or name another folder"
            ) from error
        return judge.to(device).eval()

    def _batches(self, images: Sequence[Image.Image], batch_size: int = 128) -> Iterator[Tensor]:
        device = next(self.parameters()).device
        for start in range(0, len(images), batch_size):
            pixels = [self._pixels(image) for image in images[start : start + batch_size]]
            yield torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2).float() / 255

    def _pixels(self, image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        size = (self.image_size, self.image_size)
        fitting = image.convert("RGB")
        return np.array(fitting if fitting.size == size else fitting.resize(size, Image.Resampling.BICUBIC))


class AttributeJudge(_Judge):
    """Says which value each attribute of a picture has; one softmax per attribute."""

    def __init__(
        self, attributes: Mapping[str, Sequence[str]], *, widths: Sequence[int] = WIDTHS, image_size: int = 64
    ) -> None:
        known = {name: list(values) for name, values in attributes.items()}
        super().__init__({"attributes": known, "widths": list(widths)}, image_size)
        self.attributes = known
        self.backbone = ResidualCNN(widths)
        self.head = nn.Linear(widths[-1], sum(map(len, attributes.values())))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, values] of each attribute, in the order of `attributes`, for pictures [N, 3, H, W] in 0 … 1."""
        logits: Tensor = self.head(self.backbone(pixels))
        return torch.split_with_sizes(logits, [len(values) for values in self.attributes.values()], dim=1)

    @torch.no_grad()
    def predict(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        """The most probable value of every attribute, for each picture."""
        seen = []
        for pixels in self._batches(images):
            columns = torch.stack([logits.argmax(dim=1) for logits in self(pixels)], dim=1).tolist()
            seen += [
                {name: values[k] for (name, values), k in zip(self.attributes.items(), row, strict=True)}
                for row in columns
            ]
        return seen


class IdentityJudge(_Judge):
    """Embeds pictures so that those of one identity lie near each other, whatever the scene."""

    def __init__(
        self, *, widths: Sequence[int] = WIDTHS, embedding_size: int = EMBEDDING_SIZE, image_size: int = 64
    ) -> None:
        super().__init__({"widths": list(widths), "embedding_size": embedding_size}, image_size)
        self.backbone = ResidualCNN(widths)
        self.head = nn.Linear(widths[-1], embedding_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings [N, embedding_size] of unit length, for pictures [N, 3, H, W] in 0 … 1."""
        return F.normalize(self.head(self.backbone(pixels)).float(), dim=-1)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings [N, embedding_size] of unit length, on the CPU; their dot products are cosines."""
        return torch.cat([self(pixels).cpu() for pixels in self._batches(images)])
