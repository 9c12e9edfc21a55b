"""Finding the subject where no mask is given."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from instantbooth.errors import ImageError, WeightsError
from instantbooth.images import MIN_FOREGROUND, Silhouette
from instantbooth.model.loading import load_whole
from instantbooth.prompts import CLASS_NOUNS, class_of

MAX_PIXELS = 2**20
"""In which subjects are told apart, then enlarged: the scores of 150 labels take 0.6 GB, for 12 megapixels 7 GB."""


def working_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size, or one of the same shape that has MAX_PIXELS."""
    scale = min(1.0, math.sqrt(MAX_PIXELS / math.prod(size)))
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def enlarged(found: Silhouette, size: tuple[int, int]) -> Silhouette:
    """A silhouette as one of a picture of this size (width, height)."""
    if found.shape == size[::-1]:
        return found
    shades = Image.fromarray(np.where(found, np.uint8(255), np.uint8(0))).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(shades) > 127


def silhouette(scores: Tensor, labels: Collection[int], size: tuple[int, int]) -> Silhouette:
    """Where a picture of this size (width, height) shows one of the labels, by the scores [1, L, h, w] of all."""
    upsampled = nn.functional.interpolate(scores, size=working_size(size)[::-1], mode="bilinear")
    return enlarged(np.isin(upsampled.argmax(dim=1)[0].cpu().numpy(), list(labels)), size)


class Segmenter:
    """Any semantic segmentation model in transformers' format with a label for each class."""

    def __init__(self, folder: Path, *, device: torch.device) -> None:
        """Loads a folder. WeightsError where it holds no such model."""
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            self.model: nn.Module = load_whole(AutoModelForSemanticSegmentation, folder).eval().to(device)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise WeightsError(
                f"{folder} is no segmentation model of transformers ({error}); name one's folder"
            ) from error
        self.labels = {str(label).lower(): int(index) for index, label in self.model.config.id2label.items()}
        self.device = device

    @torch.inference_mode()
    def mask(self, image: Image.Image, class_noun: str, name: str = "image") -> Image.Image:
        """A mask "L" of an RGB image, 255 where the class is. ImageError, by this name, where none of it is found."""
        nouns = (class_of(class_noun), *CLASS_NOUNS[class_of(class_noun)])
        wanted = [self.labels[noun] for noun in nouns if noun in self.labels]
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        logits = self.model(**inputs).logits
        found = silhouette(logits, wanted, image.size)
        if found.mean() < MIN_FOREGROUND:
            raise ImageError(f"{name}: no {class_noun} found in it; give a mask, or another picture")
        return Image.fromarray(np.where(found, np.uint8(255), np.uint8(0)))
