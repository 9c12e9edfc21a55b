"""Concepts in the store and in replicas: what is left of them once they are gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest

from instantbooth import Concept, Personalizer
from instantbooth.errors import StorageError
from instantbooth.storage import FileStore
from serve.cache import ConceptCache
from serve.concepts import ConceptStore
from serve.config import ServeConfig
from serve.diffusion import DiffusionEngine
from serve.errors import ApiError
from serve.messages import Step, Work
from tests.engine.test_engine import before
from tests.serve.works import a_work, stored
from tests.tiny import portrait


@pytest.fixture(scope="module")
def concepts(booth: Personalizer) -> list[Concept]:
    return [booth.encode([image], "person", [mask]) for image, mask in map(portrait, range(2))]


def test_nothing_is_left_of_concepts_that_expired_or_that_a_crash_left(
    concepts: list[Concept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ConceptStore(FileStore(tmp_path))
    kept, expired, crashed = (stored(store, concepts[0], ttl_s=seconds) for seconds in (90, 30, 30))
    store.store.delete(store.records.key("ada", crashed))
    (mark,) = store.store.list("expiries/" + str(store.records.get("ada", kept).expires_at).zfill(12))
    left = {f"concepts/ada/{kept}.json", f"concepts/ada/{kept}.safetensors", mark, "concepts/readme.txt"}
    store.store.put("concepts/readme.txt", b"somebody's")
    assert {expired, crashed} < {Path(key).stem for key in store.store.list("concepts/")}
    monkeypatch.setattr("serve.concepts.time", SimpleNamespace(time=lambda: time.time() + 60))
    store.records._read = None  # Whatever the number of concepts: no record is looked at.
    store.delete_expired()
    assert set(store.store.list()) == left


def test_what_expired_while_it_was_written_is_gone(concepts: list[Concept], tmp_path: Path) -> None:
    store = ConceptStore(FileStore(tmp_path))
    stored(store, concepts[0], ttl_s=0)
    assert list(store.store.list()) == []


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_deletion_that_failed_halfway_is_finished_by_the_next(
    concepts: list[Concept], tmp_path: Path, suffix: str
) -> None:
    class FailsOnce(FileStore):
        failed = False

        def delete(self, key: str) -> None:
            if key.endswith(suffix) and not self.failed:
                self.failed = True
                raise StorageError("the disk is gone")
            super().delete(key)

    store = ConceptStore(FailsOnce(tmp_path))
    concept_id = stored(store, concepts[0])
    with pytest.raises(StorageError):
        store.delete("ada", concept_id)
    store.delete("ada", concept_id)
    assert list(store.store.list()) == []
    with pytest.raises(ApiError, match="no concept"):
        store.delete("ada", concept_id)


def test_a_concept_that_is_pushed_out_leaves_the_caches_behind_too(concepts: list[Concept], tmp_path: Path) -> None:
    store, forgotten = ConceptStore(FileStore(tmp_path)), []
    cache = ConceptCache(store, forgotten.append, capacity=1)
    first, second = (stored(store, concept) for concept in concepts)
    assert cache.get("ada", first)[1] is False
    assert cache.get("ada", first)[1] is True
    cache.get("ada", second)
    assert forgotten == [concepts[0].digest]
    assert (cache.holds("ada", first), cache.holds("ada", second)) == (False, True)


@pytest.fixture
def stage(booth: Personalizer, tiny: Path, tmp_path: Path) -> Iterator[DiffusionEngine]:
    booth.save_weights(tmp_path / "weights")
    model = {"base": str(tiny / "base"), "image_encoder": str(tiny / "clip"), "weights": str(tmp_path / "weights")}
    stage = DiffusionEngine(ServeConfig(**model, store=str(tmp_path / "store"), row_budget=2))
    yield stage
    stage.engine.close()


def test_keys_and_values_leave_the_replica_with_their_concept(stage: DiffusionEngine, concepts: list[Concept]) -> None:
    cached = stage.engine.concepts
    before, store = cached.bytes, stage.concepts.store

    async def make(work: Work, *, delete: str | None = None) -> int:
        """The bytes cached while it was made; the concept is deleted at its first step."""
        async for event in stage.generate(work):
            if isinstance(event, Step) and event.step == 1:
                held = cached.bytes
                if delete is not None:
                    store.delete("ada", delete)
                    await stage.forget("ada", delete)
        return held

    assert asyncio.run(make(a_work(concept=concepts[0].to_bytes()))) > before
    assert cached.bytes == before
    concept_id = stored(store, concepts[1])
    assert asyncio.run(make(a_work(concept_id=concept_id), delete=concept_id)) > before
    assert cached.bytes == before


@pytest.mark.parametrize("param", ["prompt", "negative_prompt"])
def test_a_text_is_refused_where_the_text_encoder_does_not_read_all_of_it(
    stage: DiffusionEngine, concepts: list[Concept], param: str
) -> None:
    limit = asyncio.run(stage.describe())["max_prompt_tokens"]

    async def make(tokens: int) -> None:
        work = a_work(concept=concepts[0].to_bytes())
        if param == "prompt":
            work = replace(work, prompt="{subject}" + " cat" * (tokens - 2))
        else:
            work = replace(work, parameters=work.parameters | {param: " cat" * tokens})
        async for _ in stage.generate(work):
            pass

    asyncio.run(make(limit))
    with pytest.raises(ApiError, match=f"reads {limit} tokens, and this has {limit + 1}") as refused:
        asyncio.run(make(limit + 1))
    assert (refused.value.status, refused.value.param) == (422, param)


def test_a_failure_is_no_cancellation_and_a_caller_who_leaves_is(
    stage: DiffusionEngine, concepts: list[Concept]
) -> None:
    work = a_work(concept=concepts[0].to_bytes())
    work = replace(work, n=2, parameters=work.parameters | {"num_inference_steps": 200})
    failed = Event()

    def fail_once(rows: int) -> None:
        if not failed.is_set():
            failed.set()
            raise ValueError("the first picture fails while the second waits")

    def counted() -> float:
        return stage.metrics.cancellations._value.get()

    async def fail() -> None:
        async for _ in stage.generate(work):
            pass

    async def leave() -> None:
        events = stage.generate(work)
        await anext(events)
        await events.aclose()

    with before(stage.booth.base.unet, fail_once), pytest.raises(ValueError, match="fails"):
        asyncio.run(fail())
    assert counted() == 0
    asyncio.run(leave())
    assert counted() == 1
