"""The first stage by itself: whoever is at fault fails alone, and a lost device ends the replica."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from instantbooth import Personalizer
from instantbooth.errors import EngineError
from instantbooth.model.subjects import Subject
from serve.config import ServeConfig
from serve.encoder import ENCODE_BATCH, ConceptEncoder, count_images, encode_all
from serve.messages import Upload
from tests.engine.test_engine import before
from tests.serve.conftest import png
from tests.tiny import portrait


@pytest.fixture
def stage(booth: Personalizer, tiny: Path, tmp_path: Path) -> ConceptEncoder:
    booth.save_weights(tmp_path / "weights")
    return ConceptEncoder(
        ServeConfig(base=str(tiny / "base"), image_encoder=str(tiny / "clip"), weights=str(tmp_path / "weights"))
    )


def subject(stage: ConceptEncoder, images: int) -> Subject:
    pictures, masks = zip(*map(portrait, range(images)), strict=True)
    return stage.encoder.prepare(list(pictures), "person", list(masks))


def test_a_batch_that_does_not_fit_into_memory_is_taken_in_parts(stage: ConceptEncoder) -> None:
    subjects = [subject(stage, images) for images in (16, 15, 1)]
    assert count_images(subjects) == ENCODE_BATCH
    alone = [stage.encoder.encode_subjects([each])[0] for each in subjects]
    sizes: list[int] = []

    def at_most_sixteen(images: int) -> None:
        sizes.append(images)
        if images > 16:
            raise torch.OutOfMemoryError("no memory for so many images")

    with before(stage.encoder.encoders, at_most_sixteen):
        together = encode_all(stage.encoder, subjects)
    assert sizes == [32, 16, 16]
    for one, other in zip(together, alone, strict=True):
        assert (one.concept_embedding - other.concept_embedding).abs().max() < 1e-5


def test_a_subject_at_fault_fails_alone(stage: ConceptEncoder) -> None:
    small = Subject(pixels=torch.zeros(1, 3, 8, 8), class_noun="person", image_digests=("",))
    good = subject(stage, 1)
    first, failed, last = encode_all(stage.encoder, [good, small, good])
    assert isinstance(failed, Exception)
    assert first.digest == last.digest


def test_a_lost_device_is_told_and_ends_the_replica(stage: ConceptEncoder) -> None:
    def lose(images: int) -> None:
        raise torch.AcceleratorError("an illegal memory access")

    async def unbatched(subject: Subject) -> object:
        return encode_all(stage.encoder, [subject])[0]

    # Serve batches in its replicas alone.
    stage._encode_batch = unbatched
    stage.check_health()
    with before(stage.encoder.encoders, lose), pytest.raises(EngineError, match="device is lost"):
        asyncio.run(stage.encode(Upload(images=(png(1),), masks=None, class_noun="person")))
    with pytest.raises(EngineError, match="must be replaced"):
        stage.check_health()
