"""What curation writes: staged slices, then shards without duplicates. Names are digests of what decides the content.

staged/<slice>.parquet   every pair of a slice: what it became, or why it was dropped
units/<unit>.json        the slices of a unit that has been read to its end: a later run need not read it again
train/<name>.parquet     shards, columns of SCHEMA
validation/<name>.parquet
dropped/<name>.jsonl     one line a dropped pair: source, name, reason, detail
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from instantbooth.errors import ConditionalWriteError, ImageError
from instantbooth.images import decode_image
from instantbooth.ledger import digest_of
from instantbooth.storage import ObjectStore, patiently
from pipelines.curation.pairs import Pair, Slice

TRAIN = "train"
VALIDATION = "validation"
THUMBNAIL_SIDE = 96
THUMBNAILS = 2
"""Of each reason, in each slice: what the report chooses its examples from."""

SCHEMA = pa.schema(
    {
        "id": pa.string(),  # SHA-256 of image and caption
        "image": pa.binary(),  # as it came
        "mask": pa.binary(),  # PNG, "L", of the image's size
        "caption": pa.string(),  # with {subject} in the noun's place
        "noun": pa.string(),  # as the caption had it, in lower case: "woman"
        "subject": pa.string(),  # its class: "person"
    }
)
FATE = pa.schema(
    {
        "name": pa.string(),  # what people find it by
        "reason": pa.string(),  # "" for a pair that may be kept
        "id": pa.string(),
        "picture": pa.string(),  # SHA-256 of the image
        "look": pa.binary(),  # perceptual hash
        "noun": pa.string(),
        "subject": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "coverage": pa.float32(),
    }
)
STAGED = pa.schema(
    [
        *FATE,
        *(pa.field(name, pa.string()) for name in ("detail", "caption")),
        *(pa.field(name, pa.binary()) for name in ("image", "mask", "thumbnail")),
    ]
)

ENTRY = {"key": str, "split": str, "rows": int, "bytes": int, "sha256": str, "source": str}
"""What the manifest says of each file."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The shards of one slice, before they are written."""

    slice: str
    source: str
    """Key of the file that it was cut from."""
    splits: Mapping[str, tuple[int, ...]]
    """Split → the places within the slice of the pairs that are kept."""
    duplicates: Mapping[int, tuple[str, str]]
    """Place → reason and detail."""
    some_dropped: bool
    format: str
    """Digest of whatever else decides the bytes of a shard."""
    tables: Mapping[str, pa.Table] = field(default_factory=dict)
    """Split → columns of SCHEMA and whatever was precomputed, once loaded."""
    dropped: bytes = b""
    """JSON lines, once loaded."""

    @property
    def shards(self) -> dict[str, str]:
        """Key of each shard, with its split."""
        return {
            f"{split}/{digest_of(self.slice, rows, self.format)}.parquet": split
            for split, rows in self.splits.items()
            if rows
        }

    @property
    def dropped_key(self) -> str:
        """Key of the dropped pairs' list; not written where there is none."""
        return f"dropped/{digest_of(self.slice, sorted(self.duplicates.items()))}.jsonl"

    @property
    def keys(self) -> set[str]:
        """Everything that is to be written."""
        return {*self.shards, *({self.dropped_key} if self.some_dropped else ())}


def staged_key(slice_digest: str) -> str:
    """Where a slice is staged."""
    return f"staged/{slice_digest}.parquet"


def unit_key(unit: str) -> str:
    """Where it is noted that a unit is done."""
    return f"units/{unit}.json"


def stage(item: dict[str, Slice], *, store: ObjectStore) -> dict[str, Any]:
    """Writes what became of a slice's pairs, unless an earlier run did; returns what the driver must know of it."""
    part = item["slice"]
    if not part.staged:
        _put(store, staged_key(part.digest), parquet_of(_staged_table(part.pairs)))
    known = {name: getattr(part, name) for name in ("unit", "number", "last", "digest", "source", "settled")}
    return known | {"pairs": len(part.pairs)}


def load_draft(item: dict[str, Draft], *, store: ObjectStore) -> dict[str, Draft]:
    """Reads the staged slice: the rows of each shard, and a line for every dropped pair."""
    draft = item["draft"]
    staged = pq.read_table(io.BytesIO(patiently(partial(store.get, staged_key(draft.slice)))))
    tables = {split: staged.take(list(rows)).select(SCHEMA.names) for split, rows in draft.splits.items() if rows}
    lines = []
    for place, row in enumerate(staged.select(["name", "reason", "detail"]).to_pylist()):
        reason, detail = draft.duplicates.get(place, (row["reason"], row["detail"]))
        if reason:
            line = {"source": draft.source, "name": row["name"], "reason": reason, "detail": detail}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return {"draft": replace(draft, tables=tables, dropped="".join(lines).encode())}


def write_draft(item: dict[str, Draft], *, store: ObjectStore, rows_per_group: int) -> dict[str, str]:
    """Writes the shards of a slice and its dropped pairs; returns the manifest's entries as JSON."""
    draft = item["draft"]
    entries = []
    for key, split in draft.shards.items():
        data = _put(store, key, parquet_of(draft.tables[split], rows_per_group))
        entries.append(entry_of(key, data, split=split, rows=draft.tables[split].num_rows, source=draft.source))
    if draft.dropped:
        data = _put(store, draft.dropped_key, draft.dropped)
        entries.append(entry_of(draft.dropped_key, data, split="", rows=data.count(b"\n"), source=draft.source))
    return {"entries": json.dumps(entries)}


def entry_of(key: str, data: bytes, *, split: str, rows: int, source: str) -> dict[str, Any]:
    """An object as the manifest lists it."""
    digest = hashlib.sha256(data).hexdigest()
    return {"key": key, "split": split, "rows": rows, "bytes": len(data), "sha256": digest, "source": source}


def parquet_of(table: pa.Table, rows_per_group: int | None = None) -> bytes:
    """A table as a Parquet file; encoded pictures do not get smaller, so nothing is compressed."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=rows_per_group, compression="none")
    return buffer.getvalue()


def thumbnail_of(image: bytes, mask: bytes = b"") -> bytes:
    """A small JPEG, in which the background of a masked picture is pale; empty for what cannot be decoded."""
    try:
        picture = decode_image(image).convert("RGB")
        if mask:
            pale = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.75)
            picture = Image.composite(picture, pale, decode_image(mask).convert("L"))
    except ImageError:
        return b""
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    return buffer.getvalue()


def _put(store: ObjectStore, key: str, data: bytes) -> bytes:
    """What is stored under the key in the end: an earlier run's bytes stand.

    A store without conditional writes does as well for one run at a time: keys are digests of what lies there.
    """
    try:
        return patiently(lambda: data if store.put_if_absent(key, data) else store.get(key))
    except ConditionalWriteError:
        if patiently(lambda: store.exists(key)):
            return patiently(lambda: store.get(key))
        patiently(lambda: store.put(key, data))
        return data


def _staged_table(pairs: Sequence[Pair]) -> pa.Table:
    shown: dict[str, int] = {}
    rows = []
    for pair in pairs:
        row = {name: getattr(pair, name) for name in STAGED.names if hasattr(pair, name)} | {"reason": ""}
        if not pair.reason:
            rows.append(row | {"picture": pair.picture_digest})
            continue
        shown[pair.reason] = shown.get(pair.reason, 0) + 1
        thumbnail = thumbnail_of(pair.image) if pair.image and shown[pair.reason] <= THUMBNAILS else b""
        blank = {"image": b"", "mask": b"", "id": "", "caption": ""}
        rows.append(row | blank | {"reason": pair.reason.value, "picture": "", "thumbnail": thumbnail})
    return pa.Table.from_pylist(rows, STAGED)
