"""What becomes of rows in the stages of the bulk job, called in this process one after the other."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from instantbooth import Personalizer
from instantbooth.errors import ImageError, MissingObjectError, OversizedObjectError, StorageError
from instantbooth.images import decode_reference
from instantbooth.ledger import RECORDS
from instantbooth.manifest import ManifestRow
from instantbooth.storage import FileStore
from pipelines.failures import Failure, judged
from pipelines.generator import ImageGenerator, _after
from pipelines.model import ModelConfig
from pipelines.outcome import Outcome
from pipelines.personalize import PersonalizeConfig, _stages, personalize
from pipelines.plan import Task, concept_key, packed
from pipelines.stages import ConceptEncoder, StageConfig, Work, fetch_references
from tests.tiny import portrait

pytestmark = pytest.mark.usefixtures("ray_session")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The stages of a job on the tiny model, and a photo."""

    folder: Path
    stages: StageConfig
    encoder: ConceptEncoder
    generator: ImageGenerator

    @property
    def output(self) -> FileStore:
        return FileStore(self.folder / "out")

    def row(self, name: str, **changes: object) -> ManifestRow:
        """A row with the photo and one prompt."""
        values = {"images": (str(self.folder / "photo.png"),), "class_noun": "cat", "prompts": ("a {subject}",)}
        return ManifestRow(id=name, num_inference_steps=2, **(values | changes))

    def fetched(self, *rows: ManifestRow) -> list[Work]:
        """The rows after the first stage."""
        (chunk,) = packed([Task(row=row, missing=(0,)) for row in rows], len(rows))
        return [item["work"] for item in fetch_references({"chunk": chunk}, stages=self.stages)]

    def finished(self, works: list[Work]) -> dict[str, Outcome]:
        """What the other stages make of them in one batch, by id."""
        results = self.generator(self.encoder({"work": works}))
        outcomes = [Outcome(**{name: column[0] for name, column in each.items()}) for each in results]
        return {outcome.id: outcome for outcome in outcomes}

    def run(self, *rows: ManifestRow) -> dict[str, Outcome]:
        """Takes the rows through all stages."""
        return self.finished(self.fetched(*rows))

    def job(self, *rows: ManifestRow) -> PersonalizeConfig:
        """A job with these rows into the same output."""
        manifest = self.folder / "manifest.jsonl"
        manifest.write_text("".join(row.to_json() + "\n" for row in rows))
        return PersonalizeConfig(manifest=str(manifest), output=self.stages.output, model=self.stages.model)

    def records(self) -> list[str]:
        return list(self.output.list(f"{RECORDS}/"))


@pytest.fixture(scope="module")
def model(tiny: Path, booth: Personalizer, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    weights = tmp_path_factory.mktemp("weights")
    booth.save_weights(weights)
    return ModelConfig(base=str(tiny / "base"), image_encoder=str(tiny / "clip"), weights=str(weights))


@pytest.fixture
def bench(model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    # A storage call that fails is made twice, not six times.
    monkeypatch.setattr("instantbooth.storage.TRIES", 2)
    image, mask = portrait(0)
    image.putalpha(mask)
    image.save(tmp_path / "photo.png")
    stages = StageConfig(
        output=str(tmp_path / "out"), folder=tmp_path, model=model, identity=model.identity(), row_budget=4
    )
    generator = ImageGenerator(stages, "cpu")
    yield Bench(folder=tmp_path, stages=stages, encoder=ConceptEncoder(stages, "cpu"), generator=generator)
    generator.engine.close()


def test_a_photo_that_cannot_be_read_for_now_leaves_its_row_open(bench: Bench) -> None:
    later = bench.folder / "later.png"
    # Reading it is an input/output error, as on a disk or a mount that fails.
    later.symlink_to("/proc/self/mem")
    row = bench.row("later", images=(str(later),))
    outcomes = bench.run(bench.row("now"), row)
    assert (outcomes["now"].succeeded, outcomes["later"].open) == (1, 1)
    assert outcomes["later"].code == "transient_storage"
    assert len(bench.records()) == 1
    later.unlink()
    later.symlink_to(bench.folder / "photo.png")
    assert bench.run(row)["later"].succeeded == 1


def test_relative_paths_are_meant_from_the_drivers_folder(
    bench: Bench, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(tiny)
    model = replace(bench.stages.model, base="base", image_encoder="clip")
    identity = model.identity()
    assert (identity.base, identity.image_encoder) == ("base", "clip")
    monkeypatch.chdir(bench.folder)
    config = PersonalizeConfig(manifest="manifest.jsonl", output="out", concepts="earlier")
    driver = _stages(config, bench.stages.identity, conditional=True)
    monkeypatch.chdir(tiny)
    parts = _stages(replace(config, model=model), identity, conditional=True).model

    monkeypatch.chdir(tmp_path_factory.mktemp("worker"))
    assert (driver.output, driver.concepts) == (bench.stages.output, str(bench.folder / "earlier"))
    assert (parts.base, parts.image_encoder) == (bench.stages.model.base, bench.stages.model.image_encoder)
    parts.load_encoder(device="cpu")
    (work,) = replace(bench, stages=driver).fetched(bench.row("ada", images=("photo.png",), masks=("photo.png",)))
    assert work.failure is None
    assert len(work.references) == len(work.masks) == 1
    assert work.row.images == ("photo.png",)


def test_a_task_decodes_one_picture_at_a_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, most = [], []

    def decode(data: bytes, *, name: str) -> Image.Image:
        decoding.append(name)
        most.append(len(decoding))
        time.sleep(0.02)
        decoding.remove(name)
        return decode_reference(data, name=name)

    monkeypatch.setattr("pipelines.stages.decode_reference", decode)
    bench.fetched(*(bench.row(f"row-{number}") for number in range(4)))
    assert most == [1] * 4


def test_an_output_that_cannot_keep_a_concept_leaves_rows_open(bench: Bench) -> None:
    blocked = bench.folder / "out" / "concepts"
    blocked.parent.mkdir()
    blocked.write_text("no folder")
    outcome = bench.run(bench.row("ada"))["ada"]
    assert (outcome.open, outcome.failed) == (1, 0)
    assert "concepts" in outcome.error
    assert not bench.records()
    blocked.unlink()
    assert bench.run(bench.row("ada"))["ada"].succeeded == 1


@pytest.mark.parametrize(
    ("error", "code", "transient"),
    [
        (StorageError("access denied"), "storage", True),
        (MissingObjectError("no such photo"), "missing_object", False),
        (OversizedObjectError("a photo of 30 MB"), "oversized_object", False),
        (ImageError("no picture"), "image", False),
        (MemoryError(), "memory", True),
    ],
)
def test_what_says_nothing_of_a_row_is_not_settled(error: Exception, code: str, transient: bool) -> None:
    failure = Failure.of(error)
    assert (failure.code, failure.transient) == (code, transient)


def test_a_device_without_room_leaves_subjects_open_and_fails_a_picture_that_is_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(bench.encoder.encoder, "encode", full)
        assert bench.run(bench.row("ada"))["ada"].open == 1
    assert not bench.records()
    monkeypatch.setattr(bench.generator.engine, "_assemble", full)
    outcome = bench.run(bench.row("ada"))["ada"]
    assert (outcome.failed, outcome.code) == (1, "out_of_memory")
    assert len(bench.records()) == 1


def test_a_damaged_concept_is_encoded_anew_or_leaves_its_row_open(bench: Bench) -> None:
    row, store = bench.row("ada"), FileStore(bench.folder)
    key = concept_key(row, bench.stages.identity)
    store.put(f"earlier/{key}", b"no concept")
    reusing = replace(bench, stages=replace(bench.stages, concepts=str(bench.folder / "earlier")))
    assert reusing.run(row)["ada"].succeeded == 1

    other = bench.row("eve", class_noun="person")
    store.put(f"out/{concept_key(other, bench.stages.identity)}", b"no concept")
    outcome = bench.run(other)["eve"]
    assert (outcome.open, outcome.code) == (1, "concept")
    assert str(bench.folder / "out") in outcome.error
    assert len(bench.records()) == 1


def test_half_precision_makes_pictures_from_concepts_of_its_own(bench: Bench) -> None:
    assert bench.run(bench.row("ada"))["ada"].succeeded == 1
    stages = replace(bench.stages, identity=replace(bench.stages.identity, precision="bf16"))
    generator = ImageGenerator(stages, "cpu")
    half = replace(bench, stages=stages, encoder=ConceptEncoder(stages, "cpu"), generator=generator)
    assert half.run(bench.row("ada"))["ada"].succeeded == 1
    generator.engine.close()
    assert generator.booth.base.unet.dtype == torch.bfloat16
    assert len(list(bench.output.list("concepts/"))) == len(bench.records()) == 2


def test_a_subject_is_encoded_once_whoever_asks_for_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ConceptEncoder(bench.stages, "cpu")
    encoded = []
    for actor in (bench.encoder, other):
        encode = actor.encoder.encode
        monkeypatch.setattr(
            actor.encoder,
            "encode",
            lambda *args, encode=encode, **kwargs: encoded.append(args) or encode(*args, **kwargs),
        )
    works = bench.fetched(bench.row("first"), bench.row("second"), bench.row("other", class_noun="person"))
    concepts = [work.concept for work in bench.encoder({"work": works})["work"]]
    assert concepts[0] is concepts[1]
    assert len(encoded) == 2
    # Another actor was handed rows fetched before there was a concept.
    again = other({"work": works})["work"]
    assert [work.concept.digest for work in again] == [concept.digest for concept in concepts]
    assert len(encoded) == 2


def test_a_picture_that_cannot_be_packed_fails_alone(bench: Bench) -> None:
    before, bad, after = bench.fetched(*map(bench.row, ("before", "nul", "after")))
    # No manifest has such a row.
    nul = replace(bad, pieces=(replace(bad.pieces[0], prompt="a\0 {subject}"),))
    outcomes = bench.finished([before, nul, after])
    assert [(each.id, each.succeeded, each.failed) for each in outcomes.values()] == [
        ("before", 1, 0),
        ("nul", 0, 1),
        ("after", 1, 0),
    ]
    assert "NUL" in outcomes["nul"].error
    assert len(bench.records()) == 3


def test_a_picture_that_is_done_does_not_wait_for_one_before_it() -> None:
    with ThreadPoolExecutor(1) as writers:
        slow, quick = Future(), Future()
        stored = [_after(first, writers, lambda first=first: first.result()) for first in (slow, quick)]
        quick.set_result("quick")
        assert stored[1].result(timeout=10) == "quick"
        slow.set_exception(ImageError("no picture"))
        with pytest.raises(ImageError):
            stored[0].result(timeout=10)


def test_an_error_on_a_device_that_no_longer_computes_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os._exit", sys.exit)
    absent = torch.device("cuda:99")
    assert judged(RuntimeError("odd"), torch.device("cpu")).message == "odd"
    assert judged(ImageError("no picture"), absent).code == "image"
    with pytest.raises(SystemExit, match="1"):
        judged(RuntimeError("device-side assert"), absent)


def test_an_earlier_output_that_is_not_there_is_refused_before_any_row(bench: Bench) -> None:
    with pytest.raises(StorageError, match="typo is no earlier output"):
        personalize(replace(bench.job(bench.row("ada")), concepts=str(bench.folder / "typo")))
    assert not [key for key in bench.records() if key.endswith(".json")]


def test_a_job_with_nothing_to_do_starts_no_cluster_and_bears_a_lost_picture(bench: Bench) -> None:
    def cluster() -> AbstractContextManager[None]:
        raise AssertionError("Ray was started")

    rows = [bench.row("ada"), bench.row("eve")]
    assert [outcome.succeeded for outcome in bench.run(*rows).values()] == [1, 1]
    lost, kept = (bench.folder / "out" / key for key in bench.output.list("images/"))
    lost.unlink()
    report = personalize(bench.job(*rows), cluster=cluster)
    assert (report.rows, report.images, report.made) == (2, 2, 0)
    # Both references are shown, and the picture that is there.
    assert kept.is_file()
    assert bench.output.get("report.html").count(b"data:image/jpeg") == 3
    assert personalize(bench.job(*rows), cluster=cluster) == report
