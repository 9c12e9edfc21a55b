"""The first stage: photos become concepts."""

from __future__ import annotations

import asyncio

from PIL import Image
from ray import serve

from instantbooth import Concept
from instantbooth.images import ImageLimits, decode_image
from instantbooth.model.subjects import Subject
from serve.config import ServeConfig
from serve.messages import Encoded, Upload
from serve.metrics import Snapshot, StageMetrics
from serve.model import load_encoder, warm_up

MAX_REFERENCE_SIDE = 1024
"""Encoders look at 224 px around the subject: larger photos are scaled down once, where they are decoded."""
ENCODE_BATCH = 8
"""Subjects encoded in one forward pass."""


class ConceptEncoder:
    """Encodes several subjects in one forward pass."""

    def __init__(self, config: ServeConfig) -> None:
        self.encoder = load_encoder(config)
        self.limits = ImageLimits(max_bytes=config.max_image_bytes, max_pixels=config.max_image_pixels)
        self.metrics = StageMetrics("encode")
        warm_up(self.encoder)

    async def encode(self, upload: Upload) -> Encoded:
        """The concept of an upload. Raises ImageError and ParameterError."""
        with self.metrics.timed():
            subject = await asyncio.to_thread(self._prepare, upload)
            concept = await self._encode_batch(subject)
            return Encoded(data=concept.to_bytes(), digest=concept.digest, num_images=concept.num_images)

    async def snapshot(self) -> Snapshot:
        """This replica's metrics."""
        return self.metrics.snapshot()

    @serve.batch(max_batch_size=ENCODE_BATCH, batch_wait_timeout_s=0.01)
    async def _encode_batch(self, subjects: list[Subject]) -> list[Concept]:
        return await asyncio.to_thread(self.encoder.encode_subjects, subjects)

    def _prepare(self, upload: Upload) -> Subject:
        masks = None if upload.masks is None else self._decode("mask", upload.masks)
        return self.encoder.prepare(self._decode("image", upload.images), upload.class_noun, masks)

    def _decode(self, name: str, files: tuple[bytes, ...]) -> list[Image.Image]:
        decoded = []
        for number, data in enumerate(files, start=1):
            image = decode_image(data, name=f"{name} {number}", limits=self.limits)
            image.thumbnail((MAX_REFERENCE_SIDE, MAX_REFERENCE_SIDE))
            decoded.append(image)
        return decoded
