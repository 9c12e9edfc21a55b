"""Raw text-image pairs become curated Parquet shards.

Source: a folder with `metadata.jsonl`, in the form that Hugging Face's image folders have, one object a line:

    {"file_name": "images/1.jpg", "mask_file_name": "masks/1.png", "text": "a photo of a woman at the beach"}

Output: `shards/*.parquet` (columns of SCHEMA), `dropped.jsonl` (one line per dropped pair, with its reason), and,
written last, `dataset.json`: the counts and the list of shards. What it does not list is no part of the data set.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from instantbooth.errors import ImageError, ParameterError, StorageError
from instantbooth.images import check_mask, decode_image, mask_coverage
from instantbooth.prompts import CLASS_NOUNS, class_of, insert_field
from instantbooth.storage import ObjectStore, open_store

METADATA = "metadata.jsonl"
DATASET = "dataset.json"
DROPPED = "dropped.jsonl"
MAX_FILE_BYTES = 20_000_000
SCHEMA = pa.schema(
    {
        "id": pa.string(),  # SHA-256 of image and caption
        "image": pa.binary(),  # as it came
        "mask": pa.binary(),  # PNG, "L", of the image's size
        "caption": pa.string(),  # with {subject} in the noun's place
        "noun": pa.string(),  # as the caption had it: "woman"
        "subject": pa.string(),  # its class: "person"
    }
)
RECORD = pa.schema({name: pa.string() for name in ("subject", "reason", "detail", "shard")} | {"line": pa.int64()})
NOUN = re.compile(rf"\b({'|'.join(noun for nouns in CLASS_NOUNS.values() for noun in nouns)})\b")


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """What is read, what is kept, and where it goes."""

    source: str
    """URI of the folder with metadata.jsonl."""
    output: str
    """URI of the folder for shards and records; a new one for each ingestion."""
    min_coverage: float = 0.1
    """Least share of the picture that the subject's mask covers (the paper's)."""
    max_coverage: float = 0.7
    """Largest share of the picture that the subject's mask covers (the paper's)."""
    rows_per_shard: int = 64
    """Pairs read for one shard."""
    rows_per_group: int = 32
    """Pairs in one Parquet row group."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_coverage < self.max_coverage <= 1:
            raise ParameterError(
                f"coverage must rise within 0 to 1, is {self.min_coverage} to {self.max_coverage}; 0.1 to 0.7 is usual"
            )
        if min(self.rows_per_shard, self.rows_per_group) < 1:
            raise ParameterError("rows_per_shard and rows_per_group must be at least 1")


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What became of the pairs: read = kept + the sum of dropped."""

    read: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason → pairs."""
    subjects: dict[str, int] = field(default_factory=dict)
    """Class → pairs kept."""
    shards: list[str] = field(default_factory=list)
    """Keys below the output folder."""


class Dropped(Exception):
    """A pair that is not kept: a short reason to count, and the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def ingest(config: IngestConfig) -> IngestReport:
    """Curates every pair of the source. One bad pair costs itself alone.

    Raises StorageError where metadata.jsonl cannot be read or the output cannot be written.
    """
    source, output = open_store(config.source), open_store(config.output)
    lines = [
        {"line": number, "metadata": text}
        for number, text in enumerate(source.get(METADATA).decode(errors="replace").splitlines(), start=1)
        if text.strip()
    ]
    if not lines:
        raise StorageError(f"{source.uri(METADATA)} is empty; write one JSON object a line")
    records = (
        ray.data.from_items(lines, override_num_blocks=-(-len(lines) // config.rows_per_shard))
        .map(partial(curate_row, store=source, config=config))
        .map_batches(
            partial(write_shard, store=output, rows_per_group=config.rows_per_group),
            batch_size=config.rows_per_shard,
            batch_format="pyarrow",
        )
    )
    report, drops = _count(records.iter_rows())
    output.put(DROPPED, "".join(json.dumps(drop) + "\n" for drop in drops).encode())
    output.put(DATASET, json.dumps(asdict(report), indent=2).encode())
    return report


def read_report(dataset: str) -> IngestReport:
    """The report of an ingestion's output folder. Raises StorageError where there is none."""
    store = open_store(dataset)
    if not store.exists(DATASET):
        raise StorageError(f"there is no {DATASET} in {dataset}; point to the output of an ingestion that finished")
    return IngestReport(**json.loads(store.get(DATASET)))


def curate_row(row: dict[str, Any], *, store: ObjectStore, config: IngestConfig) -> dict[str, Any]:
    """A pair in the columns of SCHEMA with reason "", or its `reason` and `detail` with the other columns empty."""
    empty: dict[str, Any] = dict.fromkeys(SCHEMA.names) | {"line": row["line"], "reason": "", "detail": ""}
    try:
        return empty | _curate(row["metadata"], store, config)
    except Dropped as dropped:
        return empty | {"reason": dropped.reason, "detail": dropped.detail}


def write_shard(table: pa.Table, *, store: ObjectStore, rows_per_group: int) -> pa.Table:
    """Writes the kept pairs of one batch as a shard named by its content; returns RECORD, one row a pair."""
    rows = table.to_pylist()
    kept = [{name: row[name] for name in SCHEMA.names} for row in rows if not row["reason"]]
    shard = ""
    if kept:
        buffer = io.BytesIO()
        # Encoded pictures do not get smaller.
        pq.write_table(pa.Table.from_pylist(kept, SCHEMA), buffer, row_group_size=rows_per_group, compression="none")
        name = hashlib.sha256("".join(row["id"] for row in kept).encode()).hexdigest()[:16]
        shard = f"shards/{name}.parquet"
        store.put(shard, buffer.getvalue())
    return pa.Table.from_pylist([row | {"shard": "" if row["reason"] else shard} for row in rows], RECORD)


def find_noun(text: str) -> str:
    """The class noun of a caption, as a whole word. Raises Dropped where there is none, or more than one."""
    nouns = NOUN.findall(text)
    if not nouns:
        raise Dropped("no class noun", f"{text!r} names no subject of a known class")
    if len(nouns) > 1:
        raise Dropped("several subjects", f"{text!r} names {' and '.join(nouns)}")
    return str(nouns[0])


def _curate(metadata: str, store: ObjectStore, config: IngestConfig) -> dict[str, Any]:
    try:
        pair = json.loads(metadata)
        image_key, mask_key, text = pair["file_name"], pair["mask_file_name"], pair["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise Dropped("bad metadata", f"{type(error).__name__}: {error}") from error
    noun = find_noun(str(text).strip())
    data, mask_data = _read(store, image_key), _read(store, mask_key)
    try:
        image = decode_image(data, name=image_key)
        mask = check_mask(decode_image(mask_data, name=mask_key), image, mask_key)
    except ImageError as error:
        raise Dropped("unusable image or mask", str(error)) from error
    coverage = mask_coverage(mask)
    if coverage < config.min_coverage:
        raise Dropped("subject too small", f"covers {coverage:.1%}, at least {config.min_coverage:.0%} is needed")
    if coverage > config.max_coverage:
        raise Dropped("subject too large", f"covers {coverage:.1%}, at most {config.max_coverage:.0%} is used")
    encoded = io.BytesIO()
    mask.save(encoded, "PNG")
    return {
        "id": hashlib.sha256(data + b"\0" + text.encode()).hexdigest(),
        "image": data,
        "mask": encoded.getvalue(),
        "caption": insert_field(text.strip(), noun),
        "noun": noun,
        "subject": class_of(noun),
    }


def _read(store: ObjectStore, key: str) -> bytes:
    try:
        return store.get(key, max_bytes=MAX_FILE_BYTES)
    except StorageError as error:
        raise Dropped("unreadable file", str(error)) from error


def _count(records: Iterator[dict[str, Any]]) -> tuple[IngestReport, list[dict[str, Any]]]:
    dropped: Counter[str] = Counter()
    subjects: Counter[str] = Counter()
    shards: set[str] = set()
    drops = []
    for record in records:
        if record["reason"]:
            dropped[record["reason"]] += 1
            drops.append({name: record[name] for name in ("line", "reason", "detail")})
        else:
            subjects[record["subject"]] += 1
            shards.add(record["shard"])
    kept = subjects.total()
    report = IngestReport(
        read=kept + dropped.total(),
        kept=kept,
        dropped=dict(dropped.most_common()),
        subjects=dict(sorted(subjects.items())),
        shards=sorted(shards),
    )
    return report, sorted(drops, key=lambda drop: drop["line"])
