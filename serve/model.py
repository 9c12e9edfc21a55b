"""The model that replicas load."""

from __future__ import annotations

from typing import Any

from PIL import Image

from instantbooth import Concept, Personalizer, tracking
from instantbooth.model.loading import DTYPES
from instantbooth.model.subjects import SubjectEncoder
from instantbooth.presets import weights_folder
from serve.config import ServeConfig


def pinned(config: ServeConfig) -> ServeConfig:
    """With the versions that aliases name now: replicas that start later load the same. Raises WeightsError."""
    named = {"base": config.base, "weights": config.weights}
    versions = {name: uri and tracking.pinned(uri, config.tracking_uri) for name, uri in named.items()}
    return config.model_copy(update=versions)


def load(config: ServeConfig) -> Personalizer:
    """The configured model, on a GPU where Ray gave one. WeightsError or BaseModelError where a part is missing."""
    return Personalizer.from_pretrained(config.base, **_parts(config))


def load_encoder(config: ServeConfig) -> SubjectEncoder:
    """The part of it that encodes subjects, without the base model. Raises WeightsError."""
    return SubjectEncoder.from_pretrained(config.base, **_parts(config))


def warm_up(encoder: SubjectEncoder) -> Concept:
    """A concept of nobody, made so that the encoders have run once."""
    return encoder.encode([Image.new("RGB", (64, 64), "grey")], masks=[Image.new("L", (64, 64), 255)])


def _parts(config: ServeConfig) -> dict[str, Any]:
    return {
        "image_encoder": config.image_encoder,
        "segmenter": config.segmenter,
        "weights": config.weights and weights_folder(config.weights, config.tracking_uri),
        "dtype": DTYPES[config.precision],
    }
