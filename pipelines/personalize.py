"""A manifest becomes pictures: plan → fetch references → encode concepts → denoise → commit.

Every picture is a piece of work in the ledger: made once, however often the job is killed and started again. The
output holds `images/<row id>/<prompt>-<number>-<work>.png`, each with its provenance inside; `concepts/`; `records/`,
the truth; `_FAILURES.json`, how many rows have failed so far; and at the end `succeeded.jsonl` and `failed.jsonl`, a
line for each row (`failed.jsonl` has the prompts that failed, and beside them the pictures that were made all the
same), `report.json`, `report.html`, and `_SUCCESS.json`. A manifest is read as a stream, once to plan and
once to tell the outcome, so that it may be long.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import file_digest
from pathlib import Path
from typing import Any

import ray.data

from instantbooth.errors import InstantBoothError, ManifestError, ParameterError, did_you_mean
from instantbooth.images import OUTPUT_FORMATS
from instantbooth.ledger import Ledger, digest_of
from instantbooth.manifest import ManifestRow, PromptSets, read_prompt_sets, scan_manifest
from instantbooth.model.loading import Precision
from instantbooth.storage import absolute_uri, open_store, open_uri, patiently, read_uri
from pipelines.checks import check_cluster, check_concepts, check_store
from pipelines.failed_rows import FailedRows
from pipelines.generator import ImageGenerator, engine_config
from pipelines.model import ModelConfig
from pipelines.outcome import SUCCESS, Outcome, PersonalizeReport, earlier_report, write_outcome
from pipelines.places import FAILED, check_manifest_apart
from pipelines.plan import ModelIdentity, Settled, Task, packed, pieces
from pipelines.stages import ConceptEncoder, StageConfig, fetch_references

OVERLAP = 2
"""Batches that an actor works on at once: the engine stays full while one of them ends."""
MAX_BLOCKS = 2000
"""Ray Data keeps some kilobytes in the driver for each block."""
MAX_FAULTS = 1000
"""Faults of a manifest that are told; further ones are counted."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Actors of one stage."""

    min: int = 1
    """Actors at the start."""
    max: int = 1
    """Actors that there may be where work waits and the cluster has room, now or once it has grown."""
    gpus: float = 0.0
    """Share of a GPU that each of them claims, 1 for a whole one; with 0 it computes on the CPU."""

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.max:
            raise ParameterError(f"a pool must have 1 ≤ min ≤ max, has {self.min} and {self.max}; correct them")
        if not 0 <= self.gpus <= 1:
            raise ParameterError(f"gpus must be from 0 to 1, is {self.gpus}; correct it, and raise max to use more")

    def arguments(self, stages: StageConfig, **strategy: Any) -> dict[str, Any]:
        """How Ray Data shall run the pool's actors."""
        return {
            "fn_constructor_args": (stages, "cuda" if self.gpus else "cpu"),
            "compute": ray.data.ActorPoolStrategy(min_size=self.min, max_size=self.max, **strategy),
            "num_gpus": self.gpus,
        }


@dataclass(frozen=True, kw_only=True)
class PersonalizeConfig:
    """What is generated, with what, and where it goes."""

    manifest: str
    """URI of the manifest: JSON Lines, CSV or Parquet. Pictures are known by the URIs of their references, not by what
    is there: a changed photo needs a new name."""
    output: str
    """URI of the folder for pictures and records. Run again with the same one, a job does what is missing. The
    failed.jsonl there is a manifest to run into another output."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Base model and weights."""
    prompt_sets: str | None = None
    """URI of a JSON file with the named lists of prompts that rows may name in prompt_set."""
    concepts: str | None = None
    """URI of an earlier output, whose concepts are used where subject and model are the same."""
    precision: Precision = "fp32"
    """In which numbers the model computes. On GPUs bf16 is twice as fast or more; its pictures differ a little, and its
    concepts are its own."""
    image_format: str = "png"
    """Of the pictures: png, webp or jpeg."""
    concept: Pool = field(default_factory=Pool)
    """Actors that encode concepts."""
    diffusion: Pool = field(default_factory=lambda: Pool(min=1, max=2))
    """Actors that generate pictures."""
    rows_per_batch: int = 8
    """Rows of the manifest that an actor takes at a time."""
    row_budget: int | None = None
    """U-Net rows in a step (a guided picture has two); None lets each actor measure what suits it."""
    exact: bool = False
    """Whether a guided picture shall be the same to the last bit in any company, not only up to rounding; for a given
    row_budget, on processors of one kind. Batches that are not full take as long as full ones. Pictures that an
    earlier run made without it stay as they are."""
    compile: bool = False
    """Whether each actor compiles the U-Net first, for pictures of the model's own size: minutes that pay on GPUs,
    where there are many pictures. They differ up to rounding from those made without."""
    max_failures: int | float | None = None
    """The job stops once more of its rows than this have failed, over all its runs, or cannot be done for now: a
    number, or below 1 a share of the manifest's rows. Failed rows are settled: run again, it stops at once, unless it
    is allowed more. To try them again, let the job end, and run its failed.jsonl into another output."""
    cost_per_gpu_hour: float | None = None
    """Price of one GPU for an hour, or of one actor where they compute on CPUs, in any currency: for the report."""
    allow_unconditional: bool = False
    """Whether to go on where the store has no conditional writes. One run at a time is then still safe; of two at once,
    or of a worker that was given up but lives on, the later picture stays."""

    def __post_init__(self) -> None:
        if self.rows_per_batch < 1:
            raise ParameterError(f"rows_per_batch must be at least 1, is {self.rows_per_batch}; raise it")
        if self.max_failures is not None and not 0 <= self.max_failures < math.inf:
            raise ParameterError(f"max_failures must be a number of at least 0, is {self.max_failures}; pass one")
        engine_config(self.row_budget, exact=self.exact, compiled=self.compile)
        if self.image_format not in OUTPUT_FORMATS:
            meant = did_you_mean(self.image_format, OUTPUT_FORMATS)
            raise ParameterError(f"image_format {self.image_format!r} is not written here. {meant}")
        if self.exact and self.row_budget is None:
            raise ParameterError(
                "exact needs a row_budget, since each actor would measure its own; pass one, such as 8"
            )
        if self.cost_per_gpu_hour is not None and not 0 <= self.cost_per_gpu_hour < float("inf"):
            raise ParameterError(f"cost_per_gpu_hour must be at least 0, is {self.cost_per_gpu_hour}; pass the price")


@dataclass(kw_only=True)
class Tally:
    """How far a run is."""

    rows: int
    """Rows with anything to do."""
    images: int
    """Pictures to be made."""
    manifest_rows: int = 0
    """Rows of the manifest, finished ones included."""
    done: int = 0
    """Rows worked on, failed and open ones included."""
    failed: int = 0
    open: int = 0
    """Rows that could not be done for now; one of which a picture has failed already is no such row."""
    why_open: str = ""
    """What stood in the way of the last picture that is open."""
    made: int = 0
    """Pictures made."""
    started: float = field(default_factory=time.monotonic)

    @property
    def images_per_second(self) -> float:
        """Since the start, loading the models included."""
        return self.made / max(1e-9, time.monotonic() - self.started)

    @property
    def seconds_left(self) -> float | None:
        """At the pace since the start; None before the first row."""
        return None if not self.done else (self.rows - self.done) * (time.monotonic() - self.started) / self.done

    def add(self, outcome: Outcome) -> None:
        """Counts a row in."""
        self.done += 1
        self.failed += bool(outcome.failed)
        self.open += bool(outcome.open) and not outcome.failed
        if outcome.open:
            self.why_open = f"{outcome.id}: {outcome.error}"
        self.made += outcome.succeeded


OnRow = Callable[[Tally, Outcome | None], None]
"""Told once before the first row, with None, and after every row."""


def personalize(
    config: PersonalizeConfig,
    on_row: OnRow = lambda tally, outcome: None,
    cluster: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> PersonalizeReport:
    """Makes every picture of the manifest that has no record yet, then writes what became of each row.

    `cluster` connects to Ray for as long as there is work; by default it is connected already.
    Raises ManifestError, before anything is generated, with the faults of a malformed manifest; ParameterError where
    the cluster lacks what the pools ask for; StorageError where something cannot be read or written, and
    ConditionalWriteError for an output that cannot commit work exactly once; InstantBoothError where more rows fail
    than may. All of these leave a job that goes on when run again.
    """
    started = time.perf_counter()
    check_manifest_apart(config.manifest, config.output)
    store = open_store(config.output)
    config = replace(config, model=config.model.pinned())
    model = replace(config.model.identity(), image_format=config.image_format, precision=config.precision)
    manifest = Manifest(config)
    job = digest_of("job", manifest.digest(), vars(model))
    earlier = earlier_report(store)
    if earlier is not None and earlier.job == job:
        return earlier
    conditional = check_store(store, allow_unconditional=config.allow_unconditional)
    ledger = Ledger(store, conditional=conditional)
    chunks, tally = _plan(config, manifest, model, ledger)
    if earlier is not None:
        # The mark of another job would vouch for what this one leaves unfinished.
        patiently(partial(store.delete, SUCCESS))
    failed = FailedRows(store, job)
    _check_failures(config, tally, failed)
    if chunks:
        if config.concepts is not None:
            check_concepts(config.concepts)
        with cluster():
            check_cluster(config.concept, config.diffusion)
            _generate(config, _stages(config, model, conditional=conditional), chunks, tally, failed, on_row)
    run = PersonalizeReport(
        job=job,
        made=tally.made,
        seconds=round(time.perf_counter() - started, 1),
        exactly_once=conditional,
        cost_per_gpu_hour=config.cost_per_gpu_hour,
        gpus={"encode": config.concept.gpus or 1.0, "denoise": config.diffusion.gpus or 1.0},
    )
    return write_outcome(store, ledger, manifest.rows, model, run, why_open=tally.why_open)


class Manifest:
    """The rows of a manifest, read anew whenever they are looked at."""

    def __init__(self, config: PersonalizeConfig) -> None:
        """Raises ManifestError for prompt sets that cannot be used."""
        self.uri = config.manifest
        sets = None if config.prompt_sets is None else patiently(partial(read_uri, config.prompt_sets))
        self._sets: PromptSets | None = None if sets is None else read_prompt_sets(sets)

    def digest(self) -> str:
        """Of the manifest's bytes and the prompt sets."""
        with open_uri(self.uri) as file:
            return digest_of(file_digest(file, "sha256").hexdigest(), dict(self._sets or {}))

    def scan(self) -> Iterator[tuple[ManifestRow | None, list[str]]]:
        """Each row, or its faults."""
        with open_uri(self.uri) as file:
            yield from scan_manifest(file, name=self.uri, prompt_sets=self._sets)

    def rows(self) -> Iterator[ManifestRow]:
        """Each row of a manifest without faults."""
        return (row for row, _ in self.scan() if row is not None)


@dataclass(kw_only=True)
class Faults:
    """What is wrong with a manifest."""

    first: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, faults: list[str]) -> None:
        """Counts a row's faults in."""
        self.first += faults[: MAX_FAULTS - len(self.first)]
        self.count += len(faults)

    def check(self) -> None:
        """Raises ManifestError if there are any."""
        if self.count > len(self.first):
            raise ManifestError("\n".join([*self.first, f"and {self.count - len(self.first):,} more"]))
        if self.first:
            raise ManifestError("\n".join(self.first))


def load_manifest(uri: str) -> list[ManifestRow]:
    """The rows of a short manifest. Raises ManifestError with its faults."""
    faults, rows = Faults(), []
    for row, row_faults in Manifest(PersonalizeConfig(manifest=uri, output="")).scan():
        faults.add(row_faults)
        rows += [row] if row is not None else []
    faults.check()
    return rows


def _plan(
    config: PersonalizeConfig, manifest: Manifest, model: ModelIdentity, ledger: Ledger
) -> tuple[list[bytes], Tally]:
    """The rows with anything left to do, in chunks for a worker. ManifestError with the faults of all rows."""
    settled = Settled(ledger.committed())
    faults = Faults()
    tally = Tally(rows=0, images=0)

    def tasks() -> Iterator[Task]:
        for row, row_faults in manifest.scan():
            tally.manifest_rows += 1
            faults.add(row_faults)
            if row is None or faults.count:
                continue
            missing = [number for number, piece in enumerate(pieces(row, model)) if piece.work not in settled]
            if missing:
                tally.rows += 1
                tally.images += len(missing)
                yield Task(row=row, missing=tuple(missing))

    chunks = list(packed(tasks(), config.rows_per_batch))
    faults.check()
    return chunks, tally


def _stages(config: PersonalizeConfig, model: ModelIdentity, *, conditional: bool) -> StageConfig:
    """What workers have to know, whose working directories are others: pictures are known by names as written."""
    return StageConfig(
        output=absolute_uri(config.output),
        folder=Path.cwd(),
        model=config.model.absolute(),
        identity=model,
        concepts=config.concepts and absolute_uri(config.concepts),
        conditional=conditional,
        row_budget=config.row_budget,
        exact=config.exact,
        compile=config.compile,
    )


def _generate(
    config: PersonalizeConfig,
    stages: StageConfig,
    chunks: list[bytes],
    tally: Tally,
    failed: FailedRows,
    on_row: OnRow,
) -> None:
    blocks = min(len(chunks), MAX_BLOCKS)
    results = (
        ray.data.from_items([{"chunk": chunk} for chunk in chunks], override_num_blocks=blocks)
        .flat_map(partial(fetch_references, stages=stages))
        .map_batches(ConceptEncoder, batch_size=config.rows_per_batch, **config.concept.arguments(stages))
        .map_batches(
            ImageGenerator,
            batch_size=config.rows_per_batch,
            **config.diffusion.arguments(
                stages, enable_true_multi_threading=True, max_concurrent_calls_per_actor=OVERLAP
            ),
        )
    )
    tally.started = time.monotonic()
    on_row(tally, None)
    try:
        for result in results.iter_rows():
            outcome = Outcome(**result)
            tally.add(outcome)
            if outcome.failed:
                failed.add(outcome.id, is_open=bool(outcome.open))
            on_row(tally, outcome)
            _check_failures(config, tally, failed, outcome)
    finally:
        failed.save()


def _check_failures(config: PersonalizeConfig, tally: Tally, failed: FailedRows, last: Outcome | None = None) -> None:
    """Raises InstantBoothError once more rows have failed, in all runs, or could not be done, in this one, than may."""
    if config.max_failures is None or failed.count + tally.open <= _bound(config.max_failures, tally.manifest_rows):
        return
    example = f", at last {last.id}: {last.error}" if last is not None else ""
    raise InstantBoothError(
        f"{failed.count} of {tally.manifest_rows} rows have failed so far and {tally.open} could not be done for now, "
        f"more than max_failures ({config.max_failures}) allows{example}; correct what is wrong, and allow more to go "
        f"on with the others: rows that have failed are settled, and {FAILED} at the end is the manifest to try them "
        "again"
    )


def _bound(max_failures: int | float, rows: int) -> float:
    return max_failures * rows if 0 < max_failures < 1 else max_failures
