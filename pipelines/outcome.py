"""What a run leaves at the end: a line for each row, reports, and a mark that it is whole. Read from records alone."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import IO, Any

from instantbooth.errors import InstantBoothError, MissingObjectError, StorageError
from instantbooth.images import ImageLimits, decode_image
from instantbooth.ledger import RECORDS, Ledger, Record
from instantbooth.manifest import ManifestRow
from instantbooth.storage import ObjectStore, patiently, read_uri
from pipelines.page import render, thumbnail_uri
from pipelines.places import FAILED
from pipelines.plan import ModelIdentity, Piece, pieces

SUCCEEDED = "succeeded.jsonl"
REPORT = "report.json"
PAGE = "report.html"
SUCCESS = "_SUCCESS.json"
STAGES = ("fetch", "encode", "denoise", "decode", "pack")
"""Fetching and encoding count once for a row, the others for every picture; packing is encoding a file."""
PAID_BY = {"encode": "encode", "denoise": "denoise", "decode": "denoise"}
"""Stages that hold a GPU, and whose pool's."""
SAMPLE = 12
"""Rows on the page's contact sheet."""
SAMPLE_PICTURES = 6
"""Pictures of each of them."""
EXAMPLES = 20
"""Failed rows on the page."""
THUMBNAIL = 160

Made = list[tuple[Piece, Record]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a row in this run, by its pictures."""

    id: str
    succeeded: int
    failed: int
    open: int
    """Pictures that have no record, for a reason that says nothing of them: a store that did not answer."""
    code: str = ""
    """The first failure, or why pictures are open."""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class PersonalizeReport:
    """Counts of a job, over all its runs where nothing else is said."""

    job: str
    """Digest of the manifest, the model and the form of the pictures."""
    rows: int = 0
    images: int = 0
    failed: int = 0
    """Rows that lack at least one picture."""
    failures: dict[str, int] = field(default_factory=dict)
    """Pictures that could not be made, by code."""
    weights: str = ""
    """Digest of the weights that made the pictures."""
    exactly_once: bool = True
    """Whether the output honours conditional writes."""
    made: int = 0
    """Pictures made by the run that wrote this report: none, where the run before it was stopped when all were made."""
    seconds: float = 0.0
    """Of that run, loading the models included."""
    images_per_second: float = 0.0
    """Of that run."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Stage → time behind the pictures that count, of all actors and tasks together."""
    gpus: dict[str, float] = field(default_factory=dict)
    """Pool → GPUs of one of its actors; 1 where they compute on CPUs."""
    cost_per_gpu_hour: float | None = None
    stage_cost: dict[str, float] | None = None
    """Stage → price of its time; None without a price."""

    def as_json(self) -> bytes:
        """For report.json."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


@dataclass(kw_only=True)
class Summary:
    """What records tell, row by row."""

    rows: int = 0
    images: int = 0
    failed: int = 0
    open: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    sample: list[tuple[ManifestRow, Made]] = field(default_factory=list)
    """Rows drawn at random from those that succeeded."""
    examples: list[dict[str, str]] = field(default_factory=list)
    """The first failures."""
    _draw: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, row: ManifestRow, made: Made, still_open: int) -> None:
        """Counts a row in."""
        self.rows += 1
        self.open += still_open
        failures = [record for _, record in made if record.status == "failed"]
        self.images += len(made) - len(failures)
        self.codes.update(record.details["code"] for record in failures)
        for _, record in made:
            self.seconds.update(record.details.get("seconds", {}))
        if failures:
            self.failed += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append({"id": row.id} | {name: failures[0].details[name] for name in ("code", "error")})
            return
        # A reservoir: every row that succeeded is on the page with the same probability.
        place = len(self.sample) if len(self.sample) < SAMPLE else self._draw.randrange(self.rows - self.failed)
        if place < SAMPLE:
            self.sample[place : place + 1] = [(row, made)]


def earlier_report(store: ObjectStore) -> PersonalizeReport | None:
    """The report of the job that finished here last. StorageError where its mark is damaged."""
    try:
        return PersonalizeReport(**json.loads(patiently(lambda: store.get(SUCCESS))))
    except MissingObjectError:
        return None
    except (ValueError, TypeError) as error:
        raise StorageError(f"{store.uri(SUCCESS)} is damaged ({error}); write to another output") from error


def write_outcome(
    store: ObjectStore,
    ledger: Ledger,
    rows: Callable[[], Iterator[ManifestRow]],
    model: ModelIdentity,
    run: PersonalizeReport,
    *,
    why_open: str = "",
) -> PersonalizeReport:
    """Writes succeeded.jsonl, failed.jsonl, report.json, report.html and last _SUCCESS.json; returns the report.

    `run` is what is known of the run itself. Raises StorageError where pictures have no record yet, for such a reason
    as `why_open` tells: the job is to be run again.
    """
    summary = Summary()
    with tempfile.TemporaryFile() as succeeded, tempfile.TemporaryFile() as failed:
        for row, outcome in _outcomes(ledger, rows(), model):
            made = [(piece, record) for piece, record in outcome if record is not None]
            summary.add(row, made, len(outcome) - len(made))
            _write_line(row, made, model, succeeded, failed)
        if summary.open:
            why = f" ({why_open})" if why_open else ""
            raise StorageError(
                f"{summary.open} pictures have no record in {store.uri(RECORDS)} yet{why}; run the same command again"
            )
        _put(store, SUCCEEDED, succeeded)
        _put(store, FAILED, failed)
    report = _completed(run, summary, model)
    page = render(
        "personalize.html.j2", report=report, sample=list(_shown(store, summary.sample)), examples=summary.examples
    )
    for key, data in ((REPORT, report.as_json()), (PAGE, page.encode()), (SUCCESS, report.as_json())):
        _put(store, key, data)
    return report


def _outcomes(
    ledger: Ledger, rows: Iterable[ManifestRow], model: ModelIdentity
) -> Iterator[tuple[ManifestRow, list[tuple[Piece, Record | None]]]]:
    """Each row with its pictures and their records, in the manifest's order."""
    asked: deque[tuple[int, ManifestRow, Piece]] = deque()

    def works() -> Iterator[str]:
        for number, row in enumerate(rows):
            for piece in pieces(row, model):
                asked.append((number, row, piece))
                yield piece.work

    def answered() -> Iterator[tuple[int, ManifestRow, tuple[Piece, Record | None]]]:
        for record in ledger.find_all(works()):
            number, row, piece = asked.popleft()
            yield number, row, (piece, record)

    for _, group in groupby(answered(), key=itemgetter(0)):
        members = list(group)
        yield members[0][1], [outcome for _, _, outcome in members]


def _write_line(row: ManifestRow, made: Made, model: ModelIdentity, succeeded: IO[bytes], failed: IO[bytes]) -> None:
    if any(record.status == "failed" for _, record in made):
        failed.write(_failed_line(row, made))
    elif made:
        succeeded.write(_succeeded_line(row, made, model))


def _pictures(made: Made) -> list[dict[str, object]]:
    return [
        {"key": record.key, "prompt": piece.prompt, "seed": piece.seed, "sha256": record.sha256}
        for piece, record in made
        if record.status == "succeeded"
    ]


def _succeeded_line(row: ManifestRow, made: Made, model: ModelIdentity) -> bytes:
    line = {
        "id": row.id,
        "class_noun": row.class_noun,
        "metadata": dict(row.metadata),
        "weights": model.weights,
        "concept": made[0][1].details["concept"],
        "images": _pictures(made),
    }
    return f"{json.dumps(line)}\n".encode()


def _failed_line(row: ManifestRow, made: Made) -> bytes:
    """The row with the prompts that lack a picture, a manifest to run again; what was wrong; and what was made.

    A prompt that lacks one of several pictures is run again whole, by the same seeds.
    """
    failures = [(piece, record) for piece, record in made if record.status == "failed"]
    wrong = {name: failures[0][1].details[name] for name in ("code", "error")}
    prompts = tuple(dict.fromkeys(piece.prompt for piece, _ in failures))
    again = json.loads(replace(row, prompts=prompts, attempt=row.attempt + 1).to_json())
    return f"{json.dumps(again | wrong | {'pictures': _pictures(made)})}\n".encode()


def _completed(run: PersonalizeReport, summary: Summary, model: ModelIdentity) -> PersonalizeReport:
    seconds = {stage: summary.seconds[stage] for stage in STAGES if stage in summary.seconds}
    price = run.cost_per_gpu_hour
    cost = {stage: each / 3600 * run.gpus[PAID_BY[stage]] for stage, each in seconds.items() if stage in PAID_BY}
    return replace(
        run,
        rows=summary.rows,
        images=summary.images,
        failed=summary.failed,
        failures=dict(sorted(summary.codes.items())),
        weights=model.weights,
        images_per_second=round(run.made / max(run.seconds, 0.1), 2),
        stage_seconds={stage: round(each, 2) for stage, each in seconds.items()},
        stage_cost=None if price is None else {stage: round(hours * price, 4) for stage, hours in cost.items()},
    )


def _shown(store: ObjectStore, sample: Iterable[tuple[ManifestRow, Made]]) -> Iterator[dict[str, object]]:
    """The sampled rows for the page."""
    for row, made in sample:
        references = [_thumbnail(read_uri, uri) for uri in row.images[:3]]
        pictures = [
            (piece.prompt, _thumbnail(store.get, record.key)) for piece, record in made[:SAMPLE_PICTURES] if record.key
        ]
        yield {
            "id": row.id,
            "references": [reference for reference in references if reference],
            "pictures": [(prompt, picture) for prompt, picture in pictures if picture],
            "more": len(made) - len(pictures),
        }


def _thumbnail(read: Callable[..., bytes], name: str) -> str | None:
    """A small copy for the page; None for a picture that has gone since, or is none any more."""
    try:
        data = patiently(partial(read, name, max_bytes=ImageLimits.max_bytes))
        return thumbnail_uri(decode_image(data, name=name), THUMBNAIL)
    except InstantBoothError:
        return None


def _put(store: ObjectStore, key: str, data: Any) -> None:
    patiently(lambda: store.put(key, data))
