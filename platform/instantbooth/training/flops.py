"""Arithmetic of a training step, against what the device could do at best."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from instantbooth.model.flops import flops_of, peak_flops
from instantbooth.training.session import TrainingSession


def seconds_at_peak(session: TrainingSession, batch: Mapping[str, Tensor]) -> float | None:
    """Seconds that a step would take at the GPU's peak; None without a GPU, or where its peak is not known."""
    if session.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(session.device), session.compute.precision)
    if peak is None:
        return None
    flops = flops_of(lambda: session.gradient(batch))
    session.optimizer.zero_grad()
    return flops / peak
