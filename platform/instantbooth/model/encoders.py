"""The frozen CLIP image encoder, and the two trained layers behind it."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from instantbooth.errors import WeightsError
from instantbooth.model.loading import load_whole


class ImageEncoder(nn.Module):
    """CLIP's image tower, frozen: one global feature and all tokens of an image."""

    def __init__(self, folder: Path, *, patch_layer: int, device: torch.device, dtype: torch.dtype) -> None:
        """Loads a CLIP folder. WeightsError where it is none."""
        super().__init__()
        check_image_encoder(folder)
        self.folder = folder
        self.patch_layer = patch_layer
        try:
            settings = json.loads((folder / "preprocessor_config.json").read_text())
            statistics = {name: torch.tensor(settings[f"image_{name}"]).view(3, 1, 1) for name in ("mean", "std")}
            self.tower = load_whole(CLIPVisionModelWithProjection, folder, dtype=dtype).to(device)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise WeightsError(f"{folder} is no CLIP image encoder ({error}); name a CLIP folder") from error
        self.tower.requires_grad_(False).eval()
        self.size = int(self.tower.config.image_size)
        for name, values in statistics.items():
            self.register_buffer(name, values.to(device), persistent=False)

    mean: Tensor
    std: Tensor

    @property
    def global_width(self) -> int:
        """Width of the global feature."""
        return int(self.tower.config.projection_dim)

    @property
    def patch_width(self) -> int:
        """Width of the tokens."""
        return int(self.tower.config.hidden_size)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image: the class token and the patches."""
        return int((self.size // self.tower.config.patch_size) ** 2 + 1)

    def preprocess(self, image: Image.Image) -> Tensor:
        """A square RGB image → float [3, size, size] in 0 … 1."""
        return resize_to_tensor(image, self.size)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [N, 3, size, size] in 0 … 1 → global features [N, G] and tokens [N, tokens, W]."""
        normalised = ((pixels - self.mean) / self.std).to(self.tower.dtype)
        out = self.tower(pixel_values=normalised, output_hidden_states=True)
        return out.image_embeds, out.hidden_states[self.patch_layer]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights file and of the layer that is read."""
        files = sorted(self.folder.glob("*.safetensors"))
        content = hashlib.sha256(f"patch_layer={self.patch_layer}".encode())
        for file in files:
            with file.open("rb") as stream:
                content.update(hashlib.file_digest(stream, "sha256").digest())
        return content.hexdigest()


def check_image_encoder(folder: Path) -> None:
    """Raises WeightsError for a folder without the files of a CLIP: concepts are known by its *.safetensors."""
    for files in ("config.json", "preprocessor_config.json", "*.safetensors"):
        if not any(folder.glob(files)):
            raise WeightsError(f"{folder} is no CLIP image encoder: it has no {files}; name a CLIP folder that has")


class Encoders(nn.Module):
    """E_c and E_p without the CLIP they share: one fully connected layer each, the trained part.

    They stay in float32, whatever the CLIP computes in: concepts name their encoders by a digest of the weights.
    """

    def __init__(self, *, global_width: int, patch_width: int, text_width: int) -> None:
        super().__init__()
        self.concept = nn.Linear(global_width, text_width)
        self.patch = nn.Linear(patch_width, text_width)

    def forward(self, global_features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Features of N images → concept embeddings [N, W] and patch features [N, tokens, W], one for each image."""
        dtype = self.concept.weight.dtype
        return self.concept(global_features.to(dtype)), self.patch(tokens.to(dtype))


def resize_to_tensor(image: Image.Image, size: int) -> Tensor:
    """An RGB image, resized to a square → float [3, size, size] in 0 … 1."""
    return torch.from_numpy(resize_to_bytes(image, size)).float() / 255


def resize_to_bytes(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """An RGB image, resized to a square → [3, size, size] in 0 … 255."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(image).transpose(2, 0, 1)
