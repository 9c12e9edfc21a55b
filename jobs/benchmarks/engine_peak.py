"""What a step is worth: against one request at a time, eager and compiled, and against the card's own peak."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from instantbooth import Personalizer
from instantbooth.engine.knee import seconds_of_step, typical_batch
from instantbooth.model.flops import flops_of, peak_flops

ONE_REQUEST = 2
"""U-Net rows of one guided request."""


def against_one_request(
    booth: Personalizer, seconds: Mapping[int, float], row_budget: int, *, repeats: int, backend: str = "inductor"
) -> dict[str, float]:
    """Rows a second at the knee over those of one guided request, eager and compiled, from the curve's seconds."""
    at_the_knee = row_budget / seconds[row_budget]
    compiled = compiled_seconds(booth, repeats=repeats, backend=backend)
    return {
        "knee_over_one_eager": round(at_the_knee * seconds[ONE_REQUEST] / ONE_REQUEST, 3),
        "knee_over_one_compiled": round(at_the_knee * compiled / ONE_REQUEST, 3),
        "one_compiled_milliseconds": round(1000 * compiled, 1),
    }


def compiled_seconds(booth: Personalizer, *, repeats: int, backend: str) -> float:
    """Seconds of a compiled step of one guided request, the fastest of `repeats`; two before them warm up."""
    batch = typical_batch(booth, ONE_REQUEST, steps=repeats + 2)
    batch.unet = torch.compile(batch.unet, backend=backend)
    return min([seconds_of_step(batch) for _ in range(repeats + 2)][2:])


def share_of_peak(booth: Personalizer, seconds: Mapping[int, float], rows: int, device_name: str) -> dict[str, float]:
    """Floating-point operations of a step of so many rows, and what share of the card's peak they make use of.

    A card whose peak is not known has no share.
    """
    flops = flops_of_step(booth, rows)
    rate = flops / seconds[rows]
    found = {
        "teraflops_in_a_step": round(flops / 1e12, 6),
        "teraflops_a_second": round(rate / 1e12, 4),
    }
    peak = peak_flops(device_name, "bf16")
    return found if peak is None else found | {"share_of_peak": round(rate / peak, 3)}


def flops_of_step(booth: Personalizer, rows: int) -> int:
    """Of a step of so many rows, as `flops_of` counts them: its requests are alike, so one is counted."""
    batch = typical_batch(booth, min(rows, ONE_REQUEST), steps=1)
    return flops_of(batch.step) * max(1, rows // ONE_REQUEST)
