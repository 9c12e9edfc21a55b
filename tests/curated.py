"""A curated data set without an ingestion: portraits in shards of a few rows, and the manifest that lists them."""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256

import pyarrow as pa

from instantbooth.images import encode_png
from instantbooth.storage import ObjectStore
from pipelines.curation.precompute import Precomputed
from pipelines.curation.shards import TRAIN, VALIDATION, entry_of, parquet_of
from pipelines.ingest import MANIFEST
from tests.tiny import portrait


def write_curated(
    store: ObjectStore,
    rows: int,
    *,
    rows_per_shard: int = 6,
    validation: int = 4,
    precomputed: Precomputed | None = None,
    **columns: object,
) -> list[str]:
    """Writes the data set, the same values of `columns` in every row; returns the ids of the training split."""
    ids, entries = [], []
    for split, count in ((TRAIN, rows), (VALIDATION, validation)):
        made = [_row(f"{split}-{number}", number) | columns for number in range(count)]
        ids += [row["id"] for row in made] if split == TRAIN else []
        for start in range(0, count, rows_per_shard):
            chunk = made[start : start + rows_per_shard]
            key, data = f"{split}/{start:03d}.parquet", parquet_of(pa.Table.from_pylist(chunk))
            store.put(key, data)
            entries.append(entry_of(key, data, split=split, rows=len(chunk), source="portraits"))
    manifest = {"version": 1, "rules": "", "precomputed": precomputed and asdict(precomputed), "files": entries}
    store.put(MANIFEST, json.dumps(manifest).encode())
    return ids


def _row(name: str, seed: int) -> dict[str, object]:
    image, mask = portrait(seed)
    return {
        "id": sha256(name.encode()).hexdigest(),
        "image": encode_png(image),
        "mask": encode_png(mask),
        "caption": "a photo of a {subject} at the beach",
        "noun": "cat",
        "subject": "cat",
    }
