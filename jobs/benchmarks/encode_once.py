"""What encoding a subject once saves, measured in the bulk job.

Some rows have all prompts of a subject. Beside them, as many prompts are rows of their own with references of their
own, so that the concept is encoded anew for every picture.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from instantbooth.ledger import Ledger
from instantbooth.manifest import ManifestRow
from instantbooth.storage import ObjectStore, read_uri

COUNTS = (1, 4, 16)
"""Prompts of a subject."""
STYLES = ("photo", "watercolor", "pencil drawing", "pixel art picture")
PLACES = ("at the beach", "in the forest", "in the snow", "on the moon")
PROMPTS = tuple(f"a {style} of a {{subject}} {place}" for style, place in product(STYLES, PLACES))
ONCE, ANEW, WARM_UP = "once", "anew", "warm-up"


def write_comparison(subjects: Sequence[ManifestRow], store: ObjectStore, prefix: str) -> None:
    """Writes `prefix`/manifest.jsonl with both kinds of rows, mixed, after one row to warm up."""
    rows = [(f"{ONCE}-{count}-{row.id}", row, PROMPTS[:count]) for row in subjects for count in COUNTS]
    rows += [
        (f"{ANEW}-{count}-{row.id}-{number}", row, PROMPTS[number : number + 1])
        for row in subjects
        for count in COUNTS
        for number in range(count)
    ]
    random.Random(0).shuffle(rows)
    rows = [(WARM_UP, subjects[0], PROMPTS[:1]), *rows]
    lines = []
    for name, row, prompts in rows:
        folder = f"{prefix}/references/{name}"
        # A concept is known by the URIs of its pictures.
        images = _copies(store, folder, row.images)
        masks = row.masks and _copies(store, f"{folder}/masks", row.masks)
        own = replace(row, id=name, images=images, masks=masks, prompts=prompts, metadata={})
        lines.append(own.to_json() + "\n")
    store.put(f"{prefix}/manifest.jsonl", "".join(lines).encode())


def savings(output: ObjectStore) -> dict[str, dict[str, float]]:
    """Prompts of a subject → seconds that all stages took, by their records, encoding once and anew; share saved."""
    seconds: Counter[tuple[str, str]] = Counter()
    for row_id, taken in _seconds(output):
        kind, _, rest = row_id.partition("-")
        seconds[kind, rest.partition("-")[0]] += taken
    return {
        str(count): {
            "once_s": round(seconds[ONCE, str(count)], 3),
            "anew_s": round(seconds[ANEW, str(count)], 3),
            "saved": round(1 - seconds[ONCE, str(count)] / seconds[ANEW, str(count)], 3),
        }
        for count in COUNTS
    }


def _copies(store: ObjectStore, folder: str, uris: Sequence[str]) -> tuple[str, ...]:
    keys = [f"{folder}/{number}" for number in range(len(uris))]
    for key, uri in zip(keys, uris, strict=True):
        store.put(key, read_uri(uri))
    return tuple(map(store.uri, keys))


def _seconds(output: ObjectStore) -> Iterator[tuple[str, float]]:
    """Row id and seconds of every picture."""
    ledger = Ledger(output)
    for record in ledger.find_all(ledger.committed()):
        if record is not None and record.key is not None:
            yield record.key.split("/")[1], sum(record.details["seconds"].values())
