"""Timing: variants take turns, warm, and the median of each counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.progress import track


@torch.inference_mode()
def measure(variants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each variant; the variants take turns, so that a busy moment meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in track(range(repeats + 1), "measuring", console=Console(stderr=True)):
        for name, variant in variants.items():
            _wait(device)
            started = time.perf_counter()
            variant()
            _wait(device)
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
