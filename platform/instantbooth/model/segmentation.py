"""Finding the subject where no mask is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from instantbooth.errors import ImageError, WeightsError
from instantbooth.images import MIN_FOREGROUND
from instantbooth.model.loading import load_whole
from instantbooth.prompts import CLASS_NOUNS, class_of


class Segmenter:
    """Any semantic segmentation model in transformers' format with a label for each class."""

    def __init__(self, folder: Path, *, device: torch.device) -> None:
        """Loads a folder. WeightsError where it holds no such model."""
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            self.model: nn.Module = load_whole(AutoModelForSemanticSegmentation, folder).eval().to(device)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise WeightsError(f"{folder} is no segmentation model of transformers ({error})") from error
        self.labels = {str(label).lower(): int(index) for index, label in self.model.config.id2label.items()}
        self.device = device

    @torch.inference_mode()
    def mask(self, image: Image.Image, class_noun: str, name: str = "image") -> Image.Image:
        """A mask "L" of an RGB image, 255 where the class is. ImageError, by this name, where none of it is found."""
        nouns = (class_of(class_noun), *CLASS_NOUNS[class_of(class_noun)])
        wanted = [self.labels[noun] for noun in nouns if noun in self.labels]
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        logits = self.model(**inputs).logits
        upsampled = nn.functional.interpolate(logits, size=image.size[::-1], mode="bilinear")
        found = np.isin(upsampled.argmax(dim=1)[0].cpu().numpy(), wanted)
        if found.mean() < MIN_FOREGROUND:
            raise ImageError(f"{name}: no {class_noun} found in it; give a mask, or another picture")
        return Image.fromarray(np.where(found, np.uint8(255), np.uint8(0)))
