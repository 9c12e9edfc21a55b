"""What an ingestion tells: counts as JSON, and a page with examples."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from instantbooth.storage import ObjectStore, open_store
from pipelines.curation.decisions import Decisions
from pipelines.curation.shards import TRAIN, VALIDATION, staged_key, thumbnail_of
from pipelines.page import jpeg_uri, render

TEMPLATE = "report.html.j2"
COVERAGE_BINS = 20
EXAMPLES = 6
"""Pictures shown of each reason."""
EXAMPLES_KEPT = 12


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What became of the pairs: read = kept + the sum of dropped."""

    read: int
    """Pairs of the source, and damages of it, whichever run met them."""
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason → pairs."""
    subjects: dict[str, int] = field(default_factory=dict)
    """Class → pairs kept."""
    nouns: dict[str, int] = field(default_factory=dict)
    """Noun → pairs kept."""
    splits: dict[str, int] = field(default_factory=dict)
    """"train" and "validation" → pairs kept."""
    coverage: list[int] = field(default_factory=list)
    """Kept pairs by the share of the picture that is subject, in steps of 5 %."""
    sides: dict[str, int] = field(default_factory=dict)
    """Shorter side in pixels, by powers of two, → pairs kept."""
    shards: list[str] = field(default_factory=list)
    """Keys of the training shards, below the output folder."""
    validation_shards: list[str] = field(default_factory=list)
    processed: int = 0
    """Pairs that this run curated; the others were known."""
    seconds: float = 0.0
    """Of this run."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A picture of the page."""

    thumbnail: str
    """A data URI; empty where there is no picture."""
    name: str
    text: str
    """The caption, or why it was dropped."""


def summarize(decisions: Decisions, entries: Sequence[Mapping[str, Any]]) -> IngestReport:
    """The report of a data set with the manifest's entries; time is for the caller to add."""
    kept = decisions.table.take(decisions.kept)
    sides = np.minimum(kept["width"].to_numpy(), kept["height"].to_numpy())
    powers, counts = np.unique(np.log2(np.maximum(sides, 1)).astype(int), return_counts=True)
    held_out = int(decisions.validation[decisions.kept].sum())
    return IngestReport(
        read=len(decisions.reasons),
        kept=len(decisions.kept),
        dropped=decisions.dropped(),
        subjects=decisions.counts("subject"),
        nouns=decisions.counts("noun"),
        splits={TRAIN: len(decisions.kept) - held_out, VALIDATION: held_out},
        coverage=np.histogram(kept["coverage"].to_numpy(), bins=COVERAGE_BINS, range=(0, 1))[0].tolist(),
        sides={f"{2**power}–{2 ** (power + 1) - 1}": int(n) for power, n in zip(powers, counts, strict=True)},
        shards=[entry["key"] for entry in entries if entry["split"] == TRAIN],
        validation_shards=[entry["key"] for entry in entries if entry["split"] == VALIDATION],
    )


def report_page(report: IngestReport, decisions: Decisions, output: str, source: str) -> str:
    """The page; pictures are inside, and nothing is loaded from elsewhere."""
    store = open_store(output)
    return render(
        TEMPLATE,
        report=report,
        source=source,
        kept=list(_examples(store, decisions, decisions.kept[:EXAMPLES_KEPT])),
        dropped={
            reason: list(_examples(store, decisions, np.flatnonzero(decisions.reasons == reason)[:EXAMPLES]))
            for reason in report.dropped
        },
    )


def _examples(store: ObjectStore, decisions: Decisions, rows: Sequence[int]) -> Iterator[Example]:
    places = [decisions.place(int(row)) for row in rows]
    columns = ["name", "detail", "caption", "image", "mask", "thumbnail"]
    staged = {
        number: pq.read_table(io.BytesIO(store.get(staged_key(decisions.slices[number].digest))), columns=columns)
        for number in sorted({number for number, _ in places})
    }
    for row, (number, place) in zip(rows, places, strict=True):
        (shown,) = staged[number].slice(place, 1).to_pylist()
        thumbnail = shown["thumbnail"] or (thumbnail_of(shown["image"], shown["mask"]) if shown["image"] else b"")
        original = int(decisions.original[row])
        text = shown["detail"] or shown["caption"]
        yield Example(
            thumbnail=jpeg_uri(thumbnail) if thumbnail else "",
            name=f"{decisions.slices[number].source} {shown['name']}",
            text=text if original < 0 else decisions.likeness(int(row)),
        )
