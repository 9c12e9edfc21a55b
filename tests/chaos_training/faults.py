"""A training worker that dies at chosen points.

A point is rank/place/when/count: this rank, on its count-th call of that place since it was started, before the call,
after it, or halfway through a file's bytes. Points are met in order, each once: what was met is noted before it acts.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train

from instantbooth.storage import UNFINISHED, FileStore
from instantbooth.training.checkpoints import Checkpoints
from instantbooth.training.session import TrainingSession
from pipelines import trainer

PLACES = {
    "step": (TrainingSession, "advance"),
    "gradient": (TrainingSession, "gradient"),
    "average": (TrainingSession, "_average"),
    "snapshot": (TrainingSession, "snapshot"),
    "save": (Checkpoints, "save"),
    "put": (FileStore, "put"),
    "delete": (FileStore, "delete"),
    "prune": (Checkpoints, "_prune"),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of the plan."""

    rank: int
    place: str
    when: str
    """before, after or halfway."""
    count: int
    target: str = "worker"
    """Whom it meets: this worker, or the driver."""
    signal: str = "SIGKILL"


def plan_in(folder: Path) -> list[Point]:
    """What is to be met."""
    return [Point(**each) for each in json.loads((folder / "plan.json").read_text())]


def met_in(folder: Path) -> int:
    """How many points were met."""
    path = folder / "met"
    return len(path.read_text().splitlines()) if path.exists() else 0


def crashing_worker(settings: dict[str, Any]) -> trainer.Ending:
    """`train_worker`, up to the next point of the plan."""
    folder = Path(os.environ["CHAOS_FOLDER"])
    plan, number = plan_in(folder), met_in(folder)
    if number < len(plan) and plan[number].rank == ray.train.get_context().get_world_rank():
        _arm(plan[number], folder)
    return trainer.train_worker(settings)


def _arm(point: Point, folder: Path) -> None:
    owner, name = PLACES[point.place]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def armed(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        due = calls == point.count
        if due and point.when == "before":
            _meet(point, folder)
        if due and point.when == "halfway":
            store, key, data = arguments
            (store.root / key).parent.mkdir(parents=True, exist_ok=True)
            (store.root / key).with_name(f"{UNFINISHED}chaos").write_bytes(data[: len(data) // 2])
            _meet(point, folder)
        result = original(*arguments, **options)
        if due and point.when == "after":
            _meet(point, folder)
        return result

    setattr(owner, name, armed)


def _meet(point: Point, folder: Path) -> None:
    with (folder / "met").open("a") as file:
        file.write(f"{point}\n")
        file.flush()
        os.fsync(file.fileno())
    number = signal.Signals[point.signal]
    os.kill(os.getpid() if point.target == "worker" else int((folder / "driver").read_text()), number)
    # SIGTERM leaves it time; after SIGKILL nothing more may happen.
    if number == signal.SIGKILL:
        time.sleep(60)
