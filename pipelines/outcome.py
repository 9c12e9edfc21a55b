"""What a run leaves at the end: a line for each row, a report, and a mark that it is whole. Read from records alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from operator import itemgetter

from instantbooth.errors import MissingObjectError, StorageError
from instantbooth.ledger import Ledger, Record
from instantbooth.manifest import ManifestRow
from instantbooth.storage import ObjectStore
from pipelines.plan import ModelIdentity, Piece, pieces

SUCCEEDED = "succeeded.jsonl"
FAILED = "failed.jsonl"
REPORT = "report.json"
SUCCESS = "_SUCCESS.json"


@dataclass(frozen=True, kw_only=True)
class PersonalizeReport:
    """Counts of a job, over all its runs."""

    rows: int
    images: int
    failed: int
    """Rows that lack at least one picture."""
    failures: dict[str, int] = field(default_factory=dict)
    """Pictures that could not be made, by code."""
    weights: str = ""
    """Digest of the weights that made the pictures."""
    seconds: float = 0.0
    """Of the last run that had anything to do."""


def earlier_report(store: ObjectStore, job: str) -> PersonalizeReport | None:
    """The report of this very job where it is finished."""
    try:
        mark = json.loads(store.get(SUCCESS))
        return PersonalizeReport(**mark["report"]) if mark["job"] == job else None
    except MissingObjectError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{store.uri(SUCCESS)} is damaged ({error}); write to another output") from error


def write_outcome(
    store: ObjectStore, ledger: Ledger, rows: list[ManifestRow], model: ModelIdentity, *, job: str, seconds: float
) -> PersonalizeReport:
    """Writes succeeded.jsonl, failed.jsonl, report.json and last _SUCCESS.json.

    Raises StorageError where pictures have no record yet: the store failed on the way, and the job is to be run again.
    """
    succeeded, failed, codes, images, still_open = [], [], Counter[str](), 0, 0
    for row, outcome in _outcomes(ledger, rows, model):
        records = [record for _, record in outcome if record is not None]
        still_open += len(outcome) - len(records)
        images += sum(record.status == "succeeded" for record in records)
        codes.update(record.details["code"] for record in records if record.status == "failed")
        if any(record.status == "failed" for record in records):
            failed.append(_failed_line(row, records))
        elif len(records) == len(outcome):
            succeeded.append(_succeeded_line(row, outcome, model))
    if still_open:
        raise StorageError(
            f"{still_open} pictures could not be recorded in {store.uri('')}; run the same command again"
        )
    report = PersonalizeReport(
        rows=len(rows),
        images=images,
        failed=len(failed),
        failures=dict(sorted(codes.items())),
        weights=model.weights,
        seconds=round(seconds, 1),
    )
    store.put(SUCCEEDED, "".join(succeeded).encode())
    store.put(FAILED, "".join(failed).encode())
    store.put(REPORT, (json.dumps(asdict(report), indent=2) + "\n").encode())
    store.put(SUCCESS, (json.dumps({"job": job, "report": asdict(report)}, indent=2) + "\n").encode())
    return report


def _outcomes(
    ledger: Ledger, rows: Iterable[ManifestRow], model: ModelIdentity
) -> Iterator[tuple[ManifestRow, list[tuple[Piece, Record | None]]]]:
    """Each row with its pictures and their records, in the manifest's order."""
    planned = [(number, row, piece) for number, row in enumerate(rows) for piece in pieces(row, model)]
    found = zip(planned, ledger.find_all(piece.work for _, _, piece in planned), strict=True)
    flat = ((number, row, (piece, record)) for (number, row, piece), record in found)
    for _, group in groupby(flat, key=itemgetter(0)):
        members = list(group)
        yield members[0][1], [outcome for _, _, outcome in members]


def _succeeded_line(row: ManifestRow, outcome: list[tuple[Piece, Record | None]], model: ModelIdentity) -> str:
    records = [(piece, record) for piece, record in outcome if record is not None]
    images = [
        {"key": record.key, "prompt": piece.prompt, "seed": piece.seed, "sha256": record.sha256}
        for piece, record in records
    ]
    line = {
        "id": row.id,
        "class_noun": row.class_noun,
        "metadata": dict(row.metadata),
        "weights": model.weights,
        "concept": records[0][1].details["concept"],
        "images": images,
    }
    return json.dumps(line) + "\n"


def _failed_line(row: ManifestRow, records: list[Record]) -> str:
    """The row as it came, which makes it a manifest to run again, and what was wrong."""
    first = next(record for record in records if record.status == "failed")
    wrong = {name: first.details[name] for name in ("code", "error")}
    return json.dumps(json.loads(replace(row, attempt=row.attempt + 1).to_json()) | wrong) + "\n"
