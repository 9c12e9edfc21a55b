"""The model that replicas load."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from instantbooth import Concept, Personalizer
from instantbooth.model.loading import DTYPES
from instantbooth.model.subjects import SubjectEncoder
from instantbooth.tracking import resolve_version, resolve_weights
from serve.config import ServeConfig


def pinned(config: ServeConfig) -> ServeConfig:
    """With the version that an alias names now: replicas that start later load the same. Raises WeightsError."""
    if not config.weights or not config.weights.startswith("models:/"):
        return config
    return config.model_copy(update={"weights": resolve_version(config.weights, config.tracking_uri).uri})


def load(config: ServeConfig) -> Personalizer:
    """The configured model, on a GPU where Ray gave one. WeightsError or BaseModelError where a part is missing."""
    with _weights(config) as weights:
        return Personalizer.from_pretrained(
            config.base, image_encoder=config.image_encoder, weights=weights, dtype=DTYPES[config.precision]
        )


def load_encoder(config: ServeConfig) -> SubjectEncoder:
    """The part of it that encodes subjects, without the base model. Raises WeightsError."""
    with _weights(config) as weights:
        return SubjectEncoder.from_pretrained(
            config.base, image_encoder=config.image_encoder, weights=weights, dtype=DTYPES[config.precision]
        )


def warm_up(encoder: SubjectEncoder) -> Concept:
    """A concept of nobody, made so that the encoders have run once."""
    return encoder.encode([Image.new("RGB", (64, 64), "grey")], masks=[Image.new("L", (64, 64), 255)])


@contextmanager
def _weights(config: ServeConfig) -> Iterator[Path | None]:
    with tempfile.TemporaryDirectory() as folder:
        yield resolve_weights(config.weights, config.tracking_uri, Path(folder)) if config.weights else None
