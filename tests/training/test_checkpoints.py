"""Checkpoints: what is whole is used, what is damaged is passed over, what need not stay goes."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from instantbooth.errors import StorageError
from instantbooth.storage import UNFINISHED, FileStore
from instantbooth.training.checkpoints import Checkpoints, Saver

FILES = {"state.pt": b"s" * 1000, "weights/config.json": b"{}"}


def written(folder: Path, steps: dict[int, float], **keep: int) -> Checkpoints:
    checkpoints = Checkpoints(store=FileStore(folder), **keep)
    for step, loss in steps.items():
        checkpoints.save(step, FILES | {"step": str(step).encode()}, loss=loss)
    return checkpoints


def test_the_newest_comes_back_byte_for_byte(tmp_path: Path) -> None:
    checkpoint, files = written(tmp_path, {10: 0.5, 20: 0.4}).latest()
    assert (checkpoint.step, checkpoint.loss) == (20, 0.4)
    assert files == FILES | {"step": b"20"}
    assert Checkpoints(store=FileStore(tmp_path / "empty")).latest() is None


@pytest.mark.parametrize(
    "damage", ["flipped", "cut", "missing", "no manifest", "manifest cut", "manifest undigested", "manifest of another"]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    checkpoints = written(tmp_path, {10: 0.5, 20: 0.4})
    folder = tmp_path / "checkpoints" / "000000020"
    state, manifest = folder / "state.pt", folder / "manifest.json"
    match damage:
        case "flipped":
            state.write_bytes(b"s" * 999 + b"t")
        case "cut":
            state.write_bytes(b"s" * 999)
        case "missing":
            state.unlink()
        case "no manifest":
            manifest.unlink()
        case "manifest cut":
            manifest.write_bytes(manifest.read_bytes()[:-20])
        case "manifest undigested":
            manifest.write_text(json.dumps(json.loads(manifest.read_text())["checkpoint"]))
        case "manifest of another":
            manifest.write_bytes((tmp_path / "checkpoints" / "000000010" / "manifest.json").read_bytes())
    checkpoint, files = checkpoints.latest()
    assert (checkpoint.step, files["step"]) == (10, b"10")
    checkpoints.save(20, FILES | {"step": b"20"}, loss=0.4)
    assert checkpoints.latest()[0].step == 20


def test_no_bit_of_a_manifest_flips_unseen(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, {10: 0.5, 20: 0.4})
    manifest = tmp_path / "checkpoints" / "000000020" / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        manifest.write_bytes(flipped)
        checkpoint, files = checkpoints.latest()
        assert (checkpoint.step, files["step"]) == (10, b"10"), bytes(flipped)


def test_the_last_and_the_best_stay_and_nothing_of_the_others(tmp_path: Path) -> None:
    losses = {10: 0.5, 20: 0.1, 30: 0.4, 40: 0.3, 50: 0.6}
    checkpoints = written(tmp_path, losses, keep_last=2, keep_best=1)
    assert checkpoints.steps() == [20, 40, 50]
    assert {key.split("/")[1] for key in FileStore(tmp_path).list("checkpoints/")} == {
        "000000020",
        "000000040",
        "000000050",
    }


def test_damaged_ones_do_not_count_among_those_that_stay(tmp_path: Path) -> None:
    written(tmp_path, {10: 0.1, 20: 0.2, 30: 0.3}, keep_last=3, keep_best=0)
    for step in (20, 30):
        (tmp_path / "checkpoints" / f"{step:09d}" / "state.pt").write_bytes(b"s" * 999 + b"t")
    assert written(tmp_path, {40: 0.4}, keep_last=2, keep_best=0).steps() == [10, 40]


def test_what_a_killed_writer_left_unfinished_does_not_stay(tmp_path: Path) -> None:
    written(tmp_path, {10: 0.1})
    cut = [tmp_path / "checkpoints" / f"{step:09d}" / f"{UNFINISHED}1" for step in (10, 15)]
    for file in cut:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"s")
    # Uploaded in part, one of them by a run that is further on.
    uploaded = [tmp_path / "checkpoints" / f"{step:09d}" / "state.pt" for step in (15, 25)]
    for file in uploaded:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"s")
    assert written(tmp_path, {20: 0.1}).steps() == [10, 20]
    assert not any(file.exists() for file in cut)
    assert [file.exists() for file in uploaded] == [False, True]
    written(tmp_path, {30: 0.1})
    assert not uploaded[1].exists()


def test_the_best_is_never_one_that_cannot_be_compared(tmp_path: Path) -> None:
    losses = {10: math.inf, 20: 0.4, 30: math.nan, 40: math.inf, 50: math.inf}
    assert written(tmp_path, losses, keep_last=1, keep_best=1).steps() == [20, 50]


class Death(BaseException):
    """The process is gone."""


@dataclass(frozen=True)
class MortalStore(FileStore):
    """Dies before its n-th change."""

    left: list[int]

    def put(self, key: str, data: bytes) -> None:
        self._live()
        super().put(key, data)

    def delete(self, key: str) -> None:
        self._live()
        super().delete(key)

    def _live(self) -> None:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise Death


@pytest.mark.parametrize("changes", range(9))
def test_a_save_that_dies_anywhere_leaves_a_whole_checkpoint(tmp_path: Path, changes: int) -> None:
    """Four writes of the new one, five deletions of the oldest."""
    written(tmp_path, {10: 0.3, 20: 0.2}, keep_last=2, keep_best=0)
    mortal = Checkpoints(store=MortalStore(tmp_path, [changes]), keep_last=2, keep_best=0)
    files = FILES | {"step": b"30"}
    try:
        mortal.save(30, files, loss=0.1)
        died = False
    except Death:
        died = True
    assert died == (changes < 8)
    step = 30 if changes >= 4 else 20
    checkpoint, found = Checkpoints(store=FileStore(tmp_path)).latest()
    assert (checkpoint.step, found["step"]) == (step, str(step).encode())
    written(tmp_path, {30: 0.1, 40: 0.1}, keep_last=2, keep_best=0)
    assert Checkpoints(store=FileStore(tmp_path)).steps() == [30, 40]


def test_saving_goes_on_beside_and_a_failure_is_raised_later() -> None:
    saver, may_end, done = Saver(), threading.Event(), []
    saver.start(lambda: (may_end.wait(), done.append("first")))
    assert not done
    may_end.set()
    saver.start(lambda: done.append("second"))
    saver.wait()
    assert done == ["first", "second"]

    def failing() -> None:
        raise StorageError("the disk is full")

    saver.start(failing)
    with pytest.raises(StorageError, match="full"):
        saver.wait()
    saver.wait()
