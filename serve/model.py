"""The model that replicas load."""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from instantbooth import Concept, Personalizer
from instantbooth.tracking import resolve_weights
from serve.config import ServeConfig


def load(config: ServeConfig) -> Personalizer:
    """The configured model, on a GPU where Ray gave one. WeightsError or BaseModelError where a part is missing."""
    with tempfile.TemporaryDirectory() as folder:
        weights = None
        if config.weights is not None:
            weights = resolve_weights(config.weights, config.tracking_uri, Path(folder))
        return Personalizer.from_pretrained(config.base, image_encoder=config.image_encoder, weights=weights)


def warm_up(booth: Personalizer) -> Concept:
    """A concept of nobody, made so that the encoders have run once."""
    return booth.encode([Image.new("RGB", (64, 64), "grey")], masks=[Image.new("L", (64, 64), 255)])
