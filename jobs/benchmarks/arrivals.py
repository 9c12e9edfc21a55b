"""Open-loop load: requests arrive at times drawn beforehand, whether or not the server keeps up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Protocol

import numpy as np
from PIL import Image

from instantbooth.model.personalizer import Request

Picture = Future[Image.Image]


class Submit(Protocol):
    """What makes a request's picture."""

    def __call__(self, request: Request, /) -> Picture: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a load was served."""

    seconds: float
    """From the first arrival to the last picture."""
    latencies: tuple[float, ...]
    """Seconds from each arrival to its picture, in the order of the pictures."""

    def summary(self) -> dict[str, float]:
        """Images a second, median latency and its 95th percentile in seconds."""
        median, p95 = np.percentile(self.latencies, [50, 95])
        return {
            "images_per_second": round(len(self.latencies) / self.seconds, 3),
            "p50_s": round(float(median), 2),
            "p95_s": round(float(p95), 2),
        }


def poisson(count: int, rng: np.random.Generator) -> list[float]:
    """Arrival times of a Poisson process at one request a second, the first at 0."""
    gaps = rng.exponential(size=count)
    gaps[0] = 0
    return [float(at) for at in gaps.cumsum()]


def replay(submit: Submit, requests: Sequence[Request], times: Sequence[float]) -> Outcome:
    """Submits each request at its time, in seconds from now, and waits for all of them. Raises what one ended in."""
    done: SimpleQueue[tuple[float, float, Picture]] = SimpleQueue()
    started = time.perf_counter()

    def stamp(at: float, picture: Picture) -> None:
        done.put((at, time.perf_counter() - started, picture))

    for request, at in zip(requests, times, strict=True):
        time.sleep(max(0.0, started + at - time.perf_counter()))
        submit(request).add_done_callback(partial(stamp, at))
    ended = [done.get() for _ in requests]
    for _, _, picture in ended:
        picture.result()
    return Outcome(
        seconds=max(finished for _, finished, _ in ended) - min(times),
        latencies=tuple(finished - at for at, finished, _ in ended),
    )


def at_once(submit: Submit, requests: Sequence[Request]) -> float:
    """Images a second where all requests are there from the start."""
    return len(requests) / replay(submit, requests, [0.0] * len(requests)).seconds
