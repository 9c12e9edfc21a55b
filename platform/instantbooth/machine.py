"""The machine that something runs on, as every result names it."""

from __future__ import annotations

import platform

import torch


def machine(device: torch.device | str) -> str:
    """The machine: a CPU by its vector units too, for several kinds share a name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()}), {count} thread{'s' if count > 1 else ''}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
