"""How long a request waits for its first step, and how long a cancelled one still takes part."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from threading import Event
from typing import Any

import numpy as np

from instantbooth import Personalizer
from instantbooth.engine import Engine, EngineConfig, Progress
from instantbooth.model.personalizer import Request


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The engine's counters at a time."""

    at: float
    steps: int
    rows: int
    step_seconds: float

    @classmethod
    def of(cls, engine: Engine) -> Moment:
        """Now."""
        stats = engine.stats()
        return cls(at=time.perf_counter(), steps=stats.steps, rows=stats.rows, step_seconds=stats.step_seconds)


@dataclass(frozen=True, kw_only=True)
class Delay:
    """From a call to the step that heeds it."""

    steps: int
    """Steps, the one in progress included, that still went by without heeding it."""
    seconds: float
    """Until the heeding step began."""


def delays(booth: Personalizer, long_request: Request, *, row_budget: int, trials: int) -> dict[str, Any]:
    """Joins and cancels at random moments, with room for one guided request beside those that are running."""
    background = max(1, row_budget // 2 - 1)
    log: list[Moment] = []
    joined, left = [], []
    rng = random.Random(0)
    with Engine(booth, EngineConfig(row_budget=2 * background + 2)) as engine:
        running = [
            engine.submit(long_request, listener=lambda progress: log.append(Moment.of(engine))),
            *(engine.submit(long_request) for _ in range(background - 1)),
        ]
        _wait_for(lambda: len(log) > 2)
        pause = 3 * (log[-1].at - log[-2].at)
        for trial in range(1, trials + 1):
            begun = Event()
            time.sleep(rng.uniform(0, pause))
            joined.append(Moment.of(engine))
            ticket = engine.submit(long_request, listener=_telling(begun))
            begun.wait()
            time.sleep(rng.uniform(0, pause))
            left.append(Moment.of(engine))
            ticket.cancel()
            _wait_for(lambda trial=trial: engine.stats().ended.get("cancelled") == trial)
        last = len(log)
        _wait_for(lambda: len(log) > last + 2)
        for each in running:
            each.cancel()
    usual = 2 * background
    return {
        "join": _summary([_delay(log, call, lambda rows: rows > usual) for call in joined]),
        "cancel": _summary([_delay(log, call, lambda rows: rows == usual) for call in left]),
        "median_step_ms": round(1000 * float(np.median(np.diff([each.step_seconds for each in log]))), 1),
    }


def _delay(log: list[Moment], call: Moment, heeded: Callable[[int], bool]) -> Delay:
    """The first step begun after the call whose number of rows shows that it was heeded."""
    for before, after in pairwise(log):
        if after.steps > call.steps and heeded(after.rows - before.rows):
            began = after.at - (after.step_seconds - before.step_seconds)
            return Delay(steps=after.steps - call.steps - 1, seconds=max(0.0, began - call.at))
    raise AssertionError("no step heeded the call")


def _summary(delays: list[Delay]) -> dict[str, float]:
    return {
        "most_steps": max(delay.steps for delay in delays),
        "median_ms": round(1000 * float(np.median([delay.seconds for delay in delays])), 1),
        "most_ms": round(1000 * max(delay.seconds for delay in delays), 1),
    }


def _telling(begun: Event) -> Callable[[Progress], None]:
    return lambda progress: begun.set()


def _wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)
