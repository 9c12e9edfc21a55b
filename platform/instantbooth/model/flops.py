"""Arithmetic: how much of it a piece of work is, and how much a GPU could do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

PEAK_TFLOPS = {
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
    "V100": 125.0,
    "T4": 65.0,
}
"""Part of a GPU's name → dense half-precision TFLOP/s by its data sheet; the first that fits counts."""


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s at best in bf16 or fp16; None for a device that is not listed, and for fp32."""
    if precision == "fp32":
        return None
    return next((1e12 * tflops for part, tflops in PEAK_TFLOPS.items() if part in device_name), None)


def flops_of(passes: Callable[[], object]) -> int:
    """FLOPs of matrix products, convolutions and attention, forward and backward, in what it runs once, uncompiled.

    A multiplication and an addition count one each.
    """
    # The counter knows the products that attention is made of, not every device's kernel for the whole.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.compiler.set_stance("force_eager"), plain, FlopCounterMode(display=False) as counter:
        passes()
    return int(counter.get_total_flops())
