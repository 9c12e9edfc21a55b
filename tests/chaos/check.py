"""Whether an output keeps the promises: every row told once, every picture once and whole, none lost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256

from instantbooth.ledger import RECORDS, Record
from instantbooth.storage import ObjectStore
from pipelines.outcome import SUCCEEDED, SUCCESS
from pipelines.places import FAILED
from pipelines.plan import IMAGES


@dataclass(frozen=True, kw_only=True)
class Output:
    """All that an output holds."""

    objects: Mapping[str, bytes]
    """Key → bytes."""

    @classmethod
    def read(cls, store: ObjectStore) -> Output:
        """The whole output, concepts apart."""
        keys = [key for key in store.list() if not key.startswith("concepts/")]
        with ThreadPoolExecutor(16) as readers:
            return cls(objects=dict(zip(keys, readers.map(store.get, keys), strict=True)))

    def lines(self, name: str) -> list[dict[str, object]]:
        """The rows of a JSON Lines file."""
        return [json.loads(line) for line in self.objects[name].splitlines()]

    def records(self) -> list[Record]:
        """Every record."""
        return [
            Record.from_bytes(data)
            for key, data in self.objects.items()
            if key.startswith(f"{RECORDS}/") and key.endswith(".json")
        ]


def faults_of(output: Output, ids: Sequence[str], items: int, applied: Mapping[str, int]) -> Iterator[str]:
    """Every promise that is broken, in words.

    `ids` are the manifest's, `items` the pictures they ask for, `applied` how often the server wrote each object.
    """
    if SUCCESS not in output.objects:
        yield "the output is not marked as whole"
        return
    told = [row["id"] for name in (SUCCEEDED, FAILED) for row in output.lines(name)]
    yield from (f"row {each} is told {count} times" for each, count in Counter(told).items() if count > 1)
    yield from (f"row {each} is lost" for each in sorted(set(ids) - set(told)))
    yield from (f"row {each} is told and not in the manifest" for each in sorted(set(told) - set(ids)))
    records = output.records()
    failed = sum(record.status == "failed" for record in records)
    if len(output.lines(FAILED)) > failed:
        yield f"{len(output.lines(FAILED))} rows are told to have failed, {failed} records say so"
    if len({record.work for record in records}) != items:
        yield f"{items} pictures have {len({record.work for record in records})} records"
    made = {record.key: record for record in records if record.status == "succeeded"}
    stored = {key for key in output.objects if key.startswith(f"{IMAGES}/")}
    yield from (f"{key} is recorded and not there" for key in sorted(made.keys() - stored))
    yield from (f"{key} is there and in no record" for key in sorted(stored - made.keys()))
    for key in sorted(stored & made.keys()):
        if sha256(output.objects[key]).hexdigest() != made[key].sha256:
            yield f"{key} is not what its record says"
    told_of = [image for row in output.lines(SUCCEEDED) for image in row["images"]]
    told_of += [image for row in output.lines(FAILED) for image in row["pictures"]]
    listed = {image["key"]: image["sha256"] for image in told_of}
    recorded = {key: record.sha256 for key, record in made.items()}
    yield from (f"{key} is listed otherwise than recorded" for key in listed if listed[key] != recorded.get(key))
    yield from (f"{key} is recorded and told nowhere" for key in sorted(recorded.keys() - listed.keys()))
    for key, count in applied.items():
        if count > 1 and any(f"/{kind}/" in key for kind in (IMAGES, RECORDS)) and not key.endswith(".self-test"):
            yield f"{key} was written {count} times"


def differences(one: Output, other: Output) -> Iterator[str]:
    """Where two outputs of the same manifest differ in their pictures, or in which rows failed and why."""
    first, second = (
        {key: data for key, data in each.objects.items() if key.startswith(f"{IMAGES}/")} for each in (one, other)
    )
    if not first:
        yield "there is no picture to compare"
    yield from (f"{key} is in one output alone" for key in sorted(first.keys() ^ second.keys()))
    yield from (f"{key} differs" for key in sorted(first.keys() & second.keys()) if first[key] != second[key])
    codes = [{(row["id"], row["code"]) for row in each.lines(FAILED)} for each in (one, other)]
    yield from (f"row {each[0]} failed in one output alone ({each[1]})" for each in sorted(codes[0] ^ codes[1]))
