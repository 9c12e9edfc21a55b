"""A manifest becomes pictures: plan → fetch references → encode concepts → denoise → commit.

Every picture is a piece of work in the ledger: made once, however often the job is killed and started again. The
output holds `images/<row id>/<prompt>-<number>-<work>.png`, each with its provenance inside; `concepts/`; `records/`,
the truth; and at the end `succeeded.jsonl` and `failed.jsonl`, a line for each row, `report.json`, and `_SUCCESS.json`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import ray.data
from PIL import Image

from instantbooth import Concept, Personalizer
from instantbooth.engine import Engine, EngineConfig, Ticket
from instantbooth.errors import (
    InstantBoothError,
    ManifestError,
    MissingObjectError,
    ParameterError,
    StorageError,
    WeightsError,
)
from instantbooth.images import decode_image, encode_png
from instantbooth.ledger import Ledger
from instantbooth.manifest import ManifestRow, read_prompt_sets, scan_manifest
from instantbooth.storage import ObjectStore, open_store, open_uri, patiently, read_uri
from pipelines.model import ModelConfig
from pipelines.outcome import PersonalizeReport, earlier_report, write_outcome
from pipelines.plan import SETTINGS, ModelIdentity, Piece, concept_key, job_id, pieces

MAX_FILE_BYTES = 20_000_000
MAX_REFERENCE_SIDE = 1024
"""Encoders look at 224 px around the subject: larger references are scaled down once, where they are decoded."""
WRITERS = 8
"""Pictures that an actor stores at once."""
OVERLAP = 2
"""Batches that an actor works on at once: the engine stays full while one of them ends."""


@dataclass(frozen=True, kw_only=True)
class PersonalizeConfig:
    """What is generated, with what, and where it goes."""

    manifest: str
    """URI of the manifest: JSON Lines, CSV or Parquet."""
    output: str
    """URI of the folder for pictures and records. Run again with the same one, a job does what is missing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Base model and weights."""
    prompt_sets: str | None = None
    """URI of a JSON file with the named lists of prompts that rows may name in prompt_set."""
    concepts: str | None = None
    """URI of an earlier output, whose concepts are used where subject and model are the same."""
    encoders: int = 1
    """Actors that encode concepts."""
    generators: int = 2
    """Actors that generate pictures."""
    rows_per_batch: int = 8
    """Rows of the manifest that an actor takes at a time."""
    row_budget: int | None = None
    """U-Net rows in a step (a guided picture has two); None lets each actor measure what suits it."""
    max_failures: int | None = None
    """More rows than this may not fail: the job stops, and goes on from there when run again."""
    gpus_per_actor: float = 0.0
    """GPUs each actor claims; with 0 it computes on the CPU."""

    def __post_init__(self) -> None:
        for name in ("encoders", "generators", "rows_per_batch"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} must be at least 1, is {getattr(self, name)}; raise it")
        if self.max_failures is not None and self.max_failures < 0:
            raise ParameterError(f"max_failures must not be negative, is {self.max_failures}; pass 0 or more")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a row, or one of its pictures, cannot be made."""

    code: str
    """The error's name: image, missing_object, prompt, …"""
    message: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The failure behind an error."""
        words = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()
        return cls(code=words, message=str(error))


@dataclass(frozen=True, kw_only=True)
class Work:
    """A row on its way; once `failure` is set, later stages hand it on untouched."""

    row: ManifestRow
    pieces: tuple[Piece, ...]
    """The pictures that are still to be made."""
    failure: Failure | None = None
    references: tuple[Image.Image, ...] = ()
    masks: tuple[Image.Image, ...] | None = None
    concept: Concept | None = None


@dataclass(kw_only=True)
class Tally:
    """How far a run is."""

    rows: int
    """Rows with anything to do."""
    done: int = 0
    """Rows settled, failed ones included."""
    failed: int = 0
    images: int = 0


def personalize(
    config: PersonalizeConfig, on_progress: Callable[[Tally], None] = lambda tally: None
) -> PersonalizeReport:
    """Makes every picture of the manifest that has no record yet, then writes what became of each row.

    Raises ManifestError, before anything is generated, with every fault of a malformed manifest; StorageError where it
    cannot be read, or the output cannot be written or cannot commit work exactly once; InstantBoothError where more
    rows fail than may. All of these leave a job that goes on when run again.
    """
    started = time.perf_counter()
    rows = load_manifest(config.manifest, prompt_sets=config.prompt_sets)
    store = open_store(config.output)
    model = config.model.identity()
    planned = [(row, pieces(row, model)) for row in rows]
    job = job_id([piece.work for _, row_pieces in planned for piece in row_pieces])
    if (report := earlier_report(store, job)) is not None:
        return report
    ledger = Ledger(store)
    ledger.check_store()
    committed = ledger.committed()
    works = [
        Work(row=row, pieces=missing)
        for row, row_pieces in planned
        if (missing := tuple(piece for piece in row_pieces if piece.work not in committed))
    ]
    if works:
        _generate(config, store, model, works, on_progress)
    return write_outcome(store, ledger, rows, model, job=job, seconds=time.perf_counter() - started)


def load_manifest(uri: str, *, prompt_sets: str | None = None) -> list[ManifestRow]:
    """The manifest's rows. Raises ManifestError with every fault of every row."""
    sets = None if prompt_sets is None else read_prompt_sets(read_uri(prompt_sets))
    rows, faults = [], []
    with open_uri(uri) as file:
        for row, row_faults in scan_manifest(file, name=uri, prompt_sets=sets):
            faults += row_faults
            if row is not None:
                rows.append(row)
    if faults:
        raise ManifestError("\n".join(faults))
    return rows


def _generate(
    config: PersonalizeConfig,
    store: ObjectStore,
    model: ModelIdentity,
    works: list[Work],
    on_progress: Callable[[Tally], None],
) -> None:
    blocks = -(-len(works) // config.rows_per_batch)
    results = (
        ray.data.from_items([{"work": work} for work in works], override_num_blocks=blocks)
        .map(partial(fetch_references, model=model, stores=_concept_stores(config)))
        .map_batches(
            ConceptEncoder,
            fn_constructor_args=(config, model),
            batch_size=config.rows_per_batch,
            compute=ray.data.ActorPoolStrategy(size=config.encoders),
            num_gpus=config.gpus_per_actor,
        )
        .map_batches(
            ImageGenerator,
            fn_constructor_args=(config, model),
            batch_size=config.rows_per_batch,
            compute=ray.data.ActorPoolStrategy(
                size=config.generators, enable_true_multi_threading=True, max_concurrent_calls_per_actor=OVERLAP
            ),
            num_gpus=config.gpus_per_actor,
        )
    )
    tally = Tally(rows=len(works))
    for result in results.iter_rows():
        tally.done += 1
        tally.failed += bool(result["failed"])
        tally.images += int(result["succeeded"])
        on_progress(tally)
        if config.max_failures is not None and tally.failed > config.max_failures:
            raise InstantBoothError(
                f"{tally.failed} of {tally.done} rows failed, more than max_failures ({config.max_failures}); see "
                f"{store.uri('records')}, then run the same command again"
            )


def fetch_references(item: dict[str, Work], *, model: ModelIdentity, stores: list[ObjectStore]) -> dict[str, Work]:
    """A row's concept where it is known, else its decoded reference images and masks."""
    work = item["work"]
    try:
        if (concept := _known_concept(concept_key(work.row, model), stores)) is not None:
            return {"work": replace(work, concept=concept)}
        references = tuple(_fetch(uri) for uri in work.row.images)
        masks = None if work.row.masks is None else tuple(_fetch(uri) for uri in work.row.masks)
        return {"work": replace(work, references=references, masks=masks)}
    except Exception as error:
        return {"work": replace(work, failure=Failure.of(error))}


class ConceptEncoder:
    """An actor with the encoders: rows get their concept, and lose their references."""

    def __init__(self, config: PersonalizeConfig, model: ModelIdentity) -> None:
        self.booth = _load(config, model)
        self.model = model
        self.store = open_store(config.output)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _column(work if work.failure or work.concept else self._encode(work) for work in batch["work"])

    def _encode(self, work: Work) -> Work:
        bare = replace(work, references=(), masks=None)
        try:
            masks = None if work.masks is None else list(work.masks)
            concept = self.booth.encode(list(work.references), class_noun=work.row.class_noun, masks=masks)
            return replace(bare, concept=self._stored(concept, concept_key(work.row, self.model)))
        except Exception as error:
            return replace(bare, failure=Failure.of(error))

    def _stored(self, concept: Concept, key: str) -> Concept:
        """The concept as it is stored: the first one made, where two actors encode one subject."""
        if patiently(lambda: self.store.put_if_absent(key, concept.to_bytes())):
            return concept
        return Concept.from_bytes(patiently(lambda: self.store.get(key)), name=key)


class ImageGenerator:
    """An actor with the whole model and an engine: pictures of different subjects share every forward pass."""

    def __init__(self, config: PersonalizeConfig, model: ModelIdentity) -> None:
        self.booth = _load(config, model)
        self.model = model
        self.ledger = Ledger(open_store(config.output))
        self.engine = Engine(self.booth, EngineConfig(row_budget=config.row_budget, max_requests=1_000_000))
        self.writers = ThreadPoolExecutor(WRITERS)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        begun = [(work, [self._begin(work, piece) for piece in work.pieces]) for work in batch["work"]]
        for work, outcomes in begun:
            statuses = [outcome.result() for outcome in outcomes]
            counts = {name: [statuses.count(name)] for name in ("succeeded", "failed")}
            yield {"id": [work.row.id], **counts}

    def _begin(self, work: Work, piece: Piece) -> Future[str]:
        """Lets the picture be made; its record's status, or "open" where the store fails for good."""
        if work.concept is None:
            assert work.failure is not None
            return self.writers.submit(self._fail, piece, work.failure)
        try:
            request = self.booth.requests(
                piece.prompt,
                work.concept,
                seed=piece.seed,
                height=work.row.height,
                width=work.row.width,
                **{name: getattr(work.row, name) for name in SETTINGS},
            )[0]
            ticket = self.engine.submit(request)
        except Exception as error:
            return self.writers.submit(self._fail, piece, Failure.of(error))
        return self.writers.submit(self._finish, work.row, work.concept, piece, ticket)

    def _finish(self, row: ManifestRow, concept: Concept, piece: Piece, ticket: Ticket) -> str:
        try:
            picture = ticket.result()
        except Exception as error:
            return self._fail(piece, Failure.of(error))
        provenance = {
            "prompt": piece.prompt,
            "class_noun": row.class_noun,
            "seed": str(piece.seed),
            "weights": self.model.weights,
            "concept": concept.digest,
            "work": piece.work,
        }
        data = encode_png(picture, provenance)
        return _committed(lambda: self.ledger.succeed(piece.work, piece.key, data, provenance).status)

    def _fail(self, piece: Piece, failure: Failure) -> str:
        details = {"prompt": piece.prompt, "code": failure.code, "error": failure.message}
        return _committed(lambda: self.ledger.fail(piece.work, details).status)


def _committed(commit: Callable[[], str]) -> str:
    try:
        return commit()
    except StorageError:
        return "open"


def _concept_stores(config: PersonalizeConfig) -> list[ObjectStore]:
    return [open_store(uri) for uri in (config.output, config.concepts) if uri is not None]


def _known_concept(key: str, stores: list[ObjectStore]) -> Concept | None:
    for store in stores:
        try:
            return Concept.from_bytes(patiently(partial(store.get, key)), name=key)
        except MissingObjectError:
            continue
    return None


def _load(config: PersonalizeConfig, model: ModelIdentity) -> Personalizer:
    booth = config.model.load(device="cuda" if config.gpus_per_actor else "cpu")
    if booth.weights_digest != model.weights:
        raise WeightsError(
            f"{config.model.weights} changed from {model.weights[:12]} to {booth.weights_digest[:12]} while the job "
            "started; name a version, not an alias, and run the job again"
        )
    return booth


def _fetch(uri: str) -> Image.Image:
    data = patiently(lambda: read_uri(uri, max_bytes=MAX_FILE_BYTES))
    image = decode_image(data, name=uri)
    image.thumbnail((MAX_REFERENCE_SIDE, MAX_REFERENCE_SIDE))
    return image


def _column(works: Iterable[Work]) -> dict[str, Any]:
    items = list(works)
    column = np.empty(len(items), dtype=object)
    column[:] = items
    return {"work": column}
