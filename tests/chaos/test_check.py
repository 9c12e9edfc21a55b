"""The check of the chaos runs notices what it is there for."""

from __future__ import annotations

import json
from hashlib import sha256

import pytest

from instantbooth.ledger import Record
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
        "failed.jsonl": json.dumps({"id": "eve", "code": "image"}).encode() + b"\n",
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
    assert found(unrecorded) == ["2 pictures have 1 records"]
    doubled = sound() | {"failed.jsonl": sound()["failed.jsonl"] + b'{"id": "ada", "code": "image"}\n'}
    assert found(doubled) == ["row ada is told 2 times"]
    orphan = sound() | {"images/ada/1.png": b"pixels"}
    assert found(orphan) == ["images/ada/1.png is there and in no record"]


@pytest.mark.parametrize("key", ["images/ada/0.png", "failed.jsonl"])
def test_a_difference_from_an_undisturbed_run_is_noticed(key: str) -> None:
    other = {"images/ada/0.png": b"pixelz", "failed.jsonl": b'{"id": "eve", "code": "prompt"}\n'}
    assert list(differences(Output(objects=sound()), Output(objects=sound() | {key: other[key]})))
