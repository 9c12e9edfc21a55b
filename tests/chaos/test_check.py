"""The check of the chaos runs notices what it is there for: outputs with a fault each, and what broken ledgers leave.

These ledgers are driven by hand here, by as few calls as show their defects, on a folder that loses answers. Every
interleaving of calls is the matter of test_ledger.py; that the job's own stages keep to the ledger, of the chaos runs.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import pytest

from instantbooth.errors import TransientStorageError
from instantbooth.ledger import Ledger, Record, digest_of
from instantbooth.storage import FileStore
from tests.broken_ledgers import ListsInsteadOfReading, RetryIsALoss, Unconditional
from tests.chaos.check import Output, differences, faults_of

IDS = ["ada", "eve"]


def sound() -> dict[str, bytes]:
    """An output of two rows, one of them failed."""
    image = sha256(b"pixels").hexdigest()
    made = Record(work="a1", attempt="1", status="succeeded", key="images/ada/0.png", sha256=image)
    failed = Record(work="e1", attempt="2", status="failed", details={"code": "image", "error": "broken"})
    return {
        "images/ada/0.png": b"pixels",
        "records/a1/a1.json": made.to_bytes(),
        "records/e1/e1.json": failed.to_bytes(),
        "succeeded.jsonl": json.dumps({"id": "ada", "images": [{"key": made.key, "sha256": image}]}).encode() + b"\n",
        "failed.jsonl": json.dumps({"id": "eve", "code": "image", "pictures": []}).encode() + b"\n",
        "_SUCCESS.json": b"{}",
    }


def found(objects: dict[str, bytes], **applied: int) -> list[str]:
    times = {f"/bucket/out/{key}": 1 for key in objects} | {f"/bucket/out/{k}": n for k, n in applied.items()}
    return list(faults_of(Output(objects=objects), IDS, 2, times))


def test_a_sound_output_has_no_fault() -> None:
    assert found(sound()) == []
    assert not list(differences(Output(objects=sound()), Output(objects=sound())))


def test_an_unconditional_write_is_noticed() -> None:
    assert found(sound(), **{"records/a1/a1.json": 2}) == ["/bucket/out/records/a1/a1.json was written 2 times"]
    replaced = sound() | {"images/ada/0.png": b"others"}
    assert found(replaced) == ["images/ada/0.png is not what its record says"]


def test_a_lost_and_a_doubled_item_are_noticed() -> None:
    lost = sound() | {"failed.jsonl": b""}
    assert found(lost) == ["row eve is lost"]
    unrecorded = {key: data for key, data in sound().items() if key != "records/e1/e1.json"}
    assert found(unrecorded) == ["1 rows are told to have failed, 0 records say so", "2 pictures have 1 records"]
    doubled = sound() | {"failed.jsonl": sound()["failed.jsonl"] + b'{"id": "ada", "code": "image", "pictures": []}\n'}
    assert found(doubled) == ["row ada is told 2 times", "2 rows are told to have failed, 1 records say so"]
    strange = sound() | {"succeeded.jsonl": sound()["succeeded.jsonl"] + b'{"id": "bob", "images": []}\n'}
    assert found(strange) == ["row bob is told and not in the manifest"]
    unmade = sound() | {"succeeded.jsonl": sound()["succeeded.jsonl"].replace(b"0.png", b"2.png")}
    assert found(unmade) == [
        "images/ada/2.png is listed otherwise than recorded",
        "images/ada/0.png is recorded and told nowhere",
    ]
    orphan = sound() | {"images/ada/1.png": b"pixels"}
    assert found(orphan) == ["images/ada/1.png is there and in no record"]


@pytest.mark.parametrize("key", ["images/ada/0.png", "failed.jsonl"])
def test_a_difference_from_an_undisturbed_run_is_noticed(key: str) -> None:
    other = {"images/ada/0.png": b"pixelz", "failed.jsonl": b'{"id": "eve", "code": "prompt", "pictures": []}\n'}
    assert list(differences(Output(objects=sound()), Output(objects=sound() | {key: other[key]})))


def test_outputs_without_pictures_are_no_proof_of_equality() -> None:
    bare = Output(objects={"failed.jsonl": b""})
    assert list(differences(bare, bare)) == ["there is no picture to compare"]


@dataclass(frozen=True)
class Unlucky(FileStore):
    """A folder whose listings show nothing yet, and which loses the answers to some writes."""

    applied: Counter[str] = field(default_factory=Counter)
    """Path → writes that took place."""
    to_lose: list[str] = field(default_factory=list)
    """Keys whose next write takes place and is not confirmed."""

    def put(self, key: str, data: bytes | io.BufferedIOBase) -> None:
        super().put(key, data)
        self._note(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        wrote = super().put_if_absent(key, data)
        if wrote:
            self._note(key)
        return wrote

    def list(self, prefix: str = "") -> Iterator[str]:
        return iter(())

    def _note(self, key: str) -> None:
        self.applied[f"/out/{key}"] += 1
        if key in self.to_lose:
            self.to_lose.remove(key)
            raise TransientStorageError("the answer got lost")


def attempt_all(ledger: Ledger, store: Unlucky) -> None:
    """Three rows, and a line for each record that a worker was told: where the ledger is sound, one for each row.

    Two workers make ada's picture, and not alike; the answer to bob's record is lost; of two workers on eve's row one
    cannot do it. All workers have found the rows open.
    """
    ada, bob, eve = (digest_of(name) for name in ("ada", "bob", "eve"))
    store.to_lose.append(f"records/{bob[:2]}/{bob}.json")
    told = [
        ("ada", ledger.succeed(ada, "images/ada/0.png", b"ada by one", {})),
        ("ada", ledger.succeed(ada, "images/ada/0.png", b"ada by the other", {})),
        ("bob", ledger.succeed(bob, "images/bob/0.png", b"bob", {})),
        ("eve", ledger.succeed(eve, "images/eve/0.png", b"eve", {})),
        ("eve", ledger.fail(eve, {"code": "image", "error": "broken"})),
    ]
    lines: dict[str, dict[str, bytes]] = {"succeeded.jsonl": {}, "failed.jsonl": {}}
    for name, record in told:
        if record is not None:
            images = [{"key": record.key, "sha256": record.sha256}]
            told_as = {"images": images} if record.status == "succeeded" else {"pictures": []}
            line = json.dumps({"id": name, **told_as, **record.details}).encode() + b"\n"
            lines[f"{record.status}.jsonl"][record.attempt] = line
    for name, by_attempt in lines.items():
        store.put(name, b"".join(by_attempt.values()))
    store.put("_SUCCESS.json", b"{}")


@pytest.mark.parametrize(
    ("ledger", "faults"),
    [
        (Ledger, set()),
        (Unconditional, {"row ada is told 2 times", "/out/images/ada/0.png was written 2 times"}),
        (RetryIsALoss, {"row bob is lost"}),
        (ListsInsteadOfReading, {"row eve is told 2 times", "1 rows are told to have failed, 0 records say so"}),
    ],
)
def test_what_a_broken_ledger_leaves_is_noticed(ledger: type[Ledger], faults: set[str], tmp_path: Path) -> None:
    store = Unlucky(tmp_path)
    attempt_all(ledger(store, pause_s=0), store)
    found = list(faults_of(Output.read(FileStore(tmp_path)), ["ada", "bob", "eve"], 3, store.applied))
    assert faults <= set(found)
    assert bool(faults) == bool(found)
