"""The first stage: photos become concepts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from PIL import Image
from ray import serve

from instantbooth import Concept
from instantbooth.errors import EngineError
from instantbooth.images import ImageLimits, decode_reference
from instantbooth.model.subjects import Subject, SubjectEncoder
from serve.config import ServeConfig
from serve.messages import Encoded, Upload
from serve.metrics import Snapshot, StageMetrics
from serve.model import load_encoder, warm_up

ENCODE_BATCH = 32
"""Images encoded in one forward pass: two subjects of the most reference images, or more of fewer."""


def count_images(subjects: Sequence[Subject]) -> int:
    """What subjects cost together."""
    return sum(len(subject.pixels) for subject in subjects)


def encode_all(encoder: SubjectEncoder, subjects: Sequence[Subject]) -> list[Concept | Exception]:
    """Their concepts; where a forward pass fails those of each half, until the one at fault fails alone.

    Raises torch.AcceleratorError: after one, no call to the device succeeds in this process.
    """
    try:
        return list(encoder.encode_subjects(subjects))
    except torch.AcceleratorError:
        raise
    except Exception as error:
        if len(subjects) == 1:
            return [error]
    half = len(subjects) // 2
    return encode_all(encoder, subjects[:half]) + encode_all(encoder, subjects[half:])


class ConceptEncoder:
    """Encodes several subjects in one forward pass."""

    def __init__(self, config: ServeConfig) -> None:
        self.encoder = load_encoder(config)
        self.limits = ImageLimits(max_bytes=config.max_image_bytes, max_pixels=config.max_image_pixels)
        self.metrics = StageMetrics("encode")
        self.lost = False
        """Whether the device no longer computes."""
        warm_up(self.encoder)

    async def encode(self, upload: Upload) -> Encoded:
        """The concept of an upload. Raises ImageError and ParameterError, EngineError where the device is lost."""
        with self.metrics.timed():
            try:
                subject = await asyncio.to_thread(self._prepare, upload)
                concept = await self._encode_batch(subject)
            except torch.AcceleratorError as error:
                self.lost = True
                raise EngineError("the encoder's device is lost; ask another replica") from error
            if isinstance(concept, Exception):
                raise concept
            return Encoded(data=concept.to_bytes(), digest=concept.digest, num_images=concept.num_images)

    async def snapshot(self) -> Snapshot:
        """This replica's metrics."""
        return self.metrics.snapshot()

    def check_health(self) -> None:
        """Serve replaces a replica whose device is lost."""
        if self.lost:
            raise EngineError("the encoder's device is lost; the replica must be replaced")

    @serve.batch(max_batch_size=ENCODE_BATCH, batch_wait_timeout_s=0.01, batch_size_fn=count_images)
    async def _encode_batch(self, subjects: list[Subject]) -> list[Concept | Exception]:
        return await asyncio.to_thread(encode_all, self.encoder, subjects)

    def _prepare(self, upload: Upload) -> Subject:
        masks = None if upload.masks is None else self._decode("mask", upload.masks)
        return self.encoder.prepare(self._decode("image", upload.images), upload.class_noun, masks)

    def _decode(self, name: str, files: tuple[bytes, ...]) -> list[Image.Image]:
        return [
            decode_reference(data, name=f"{name} {number}", limits=self.limits)
            for number, data in enumerate(files, start=1)
        ]
