"""How many U-Net rows should share a step: measured, since no two machines agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

from instantbooth import Personalizer
from instantbooth.model.denoise import Row, RowBatch
from instantbooth.model.samplers import sampler_table

NEAR_BEST = 0.9
"""The knee is the smallest number of rows that reaches this share of the best rows per second."""


def measure_steps(
    booth: Personalizer, *, max_rows: int, repeats: int = 3, patience_s: float = 20.0
) -> dict[int, float]:
    """Median seconds of a step of the model's own size, for 1, 2, 4 … `max_rows` rows.

    Stops doubling once the measurements took `patience_s` seconds, or where memory ends.
    """
    seconds: dict[int, float] = {}
    started = time.perf_counter()
    rows = 1
    while rows <= max_rows and (not seconds or time.perf_counter() - started < patience_s):
        try:
            seconds[rows] = _median_step(booth, rows, repeats)
        except torch.OutOfMemoryError:
            break
        rows *= 2
    return seconds


def knee(seconds: Mapping[int, float]) -> int:
    """The rows beyond which a step takes longer almost in proportion: more of them add waiting, hardly throughput."""
    throughput = {rows: rows / each for rows, each in seconds.items()}
    best = max(throughput.values())
    return min(rows for rows, each in throughput.items() if each >= NEAR_BEST * best)


def _median_step(booth: Personalizer, rows: int, repeats: int) -> float:
    base = booth.base
    side = int(base.unet.config.sample_size)
    text = torch.zeros(base.tokenizer.model_max_length, base.text_width, device=base.device, dtype=base.unet.dtype)
    batch = RowBatch(
        base.unet,
        [
            Row(
                table=sampler_table("ddim", repeats + 1, base.schedule),
                prompt_embeds=text,
                negative_embeds=text,
                guidance_scale=1.0,
                latents=torch.zeros(base.unet.config.in_channels, side, side, device=base.device),
            )
            for _ in range(rows)
        ],
    )
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        batch.step()
        wait_for(base.device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def wait_for(device: torch.device) -> None:
    """Until the device has done what this thread told it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
