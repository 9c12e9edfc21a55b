"""How fast a training is, and what it takes."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(kw_only=True)
class Pace:
    """Of the steps since the last checkpoint. What lies between steps, validating and saving, does not count."""

    batch_size: int
    """Samples of a step, over all workers."""
    device: torch.device
    seconds_at_peak: float | None = None
    """Seconds that this worker's share of a step would take at the device's peak; None where that is not known."""
    _steps: int = 0
    _seconds: dict[str, float] = field(default_factory=lambda: {"waiting": 0.0, "computing": 0.0})

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time until a batch is there."""
        with self._counted("waiting"):
            yield

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Counts the time of a step, and the step."""
        with self._counted("computing"):
            yield
        self._steps += 1

    def metrics(self) -> dict[str, float]:
        """Samples/s, the share of time in which data was waited for, FLOPs utilisation where known, peak memory."""
        seconds = sum(self._seconds.values())
        metrics = {
            "samples_per_second": self._steps * self.batch_size / seconds,
            "waiting_for_data": self._seconds["waiting"] / seconds,
            "peak_memory_mb": float(peak_memory_mb(self.device)),
        }
        if self.seconds_at_peak is not None:
            metrics["flops_utilisation"] = self._steps * self.seconds_at_peak / seconds
        return metrics

    def restart(self) -> None:
        """Counts from here on."""
        self._steps = 0
        self._seconds = dict.fromkeys(self._seconds, 0.0)

    @contextmanager
    def _counted(self, kind: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[kind] += time.perf_counter() - began


def peak_memory_mb(device: torch.device) -> int:
    """The most memory that this process has held: of the GPU, else of main memory. MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
