"""How many U-Net rows should share a step: measured, since no two machines agree."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from itertools import count, takewhile

import numpy as np
import torch

from instantbooth import Concept, Personalizer
from instantbooth.engine.scheduler import Size
from instantbooth.model.adapter import KeysValues
from instantbooth.model.denoise import Row, RowBatch
from instantbooth.model.samplers import sampler_table
from instantbooth.parameters import MAX_REFERENCES

NEAR_BEST = 0.98
"""The knee is the smallest number of rows that reaches this share of the best rows per second."""
TYPICAL_REFERENCES = 3
"""Reference images of the subjects that are measured."""
REPEATS = 5
"""Measurements of each step."""
PATIENCE_S = 20.0
"""For measuring the model's own size."""
OTHERS_PATIENCE_S = 10.0
"""For measuring all other sizes."""


class RowBudgets:
    """U-Net rows that may share a step, for pictures of any size: those of as many pixels take as long.

    Between the sizes that were measured the budget follows a straight line on logarithmic scales, beyond them it falls
    and rises with the number of pixels.
    """

    def __init__(self, by_side: Mapping[int, int], *, most: int) -> None:
        """`by_side` has the budgets of square pictures by their side in pixels. No size has more than `most` rows:
        small pictures have large concepts, too."""
        self._pixels = sorted(side**2 for side in by_side)
        self._rows = [by_side[math.isqrt(pixels)] for pixels in self._pixels]
        self._most = most
        self._known: dict[Size, int] = {}

    def of(self, size: Size) -> int:
        """At least 1."""
        if size not in self._known:
            self._known[size] = self._of(size[0] * size[1])
        return self._known[size]

    def _of(self, pixels: int) -> int:
        known = min(max(pixels, self._pixels[0]), self._pixels[-1])
        logarithm = np.interp(math.log(known), np.log(self._pixels), np.log(self._rows))
        rows = int(math.exp(logarithm) + 1e-6)
        return min(self._most, max(1, rows * known // pixels))


def measure_budgets(booth: Personalizer, *, max_rows: int, patience_s: float = OTHERS_PATIENCE_S) -> dict[int, int]:
    """The knee by the side of square pictures: the model's own, its double, its half and so on to the smallest.

    Beyond its own there are only those for which `patience_s` seconds and the memory suffice.
    """
    native, step = booth.base.image_size, booth.base.size_step
    own = measure_steps(booth, max_rows=max_rows)
    budgets = {native: knee(own)}
    halves = takewhile(lambda side: side >= step and side % step == 0, (native >> n for n in count(1)))
    sides = [*halves, 2 * native]
    until = time.perf_counter() + patience_s
    for number, side in enumerate(sides):
        share = (until - time.perf_counter()) / (len(sides) - number)
        # Attention takes time in proportion to the square of the pixels.
        expected = (REPEATS + 2) * own[1] * (side / native) ** 4
        if expected < share and (steps := measure_steps(booth, side=side, max_rows=max_rows, patience_s=share)):
            budgets[side] = knee(steps)
    return budgets


def measure_steps(
    booth: Personalizer,
    *,
    max_rows: int,
    side: int | None = None,
    repeats: int = REPEATS,
    patience_s: float = PATIENCE_S,
    least_rows: int = 1,
) -> dict[int, float]:
    """Seconds of a step for 1, 2, 4 … `max_rows` U-Net rows, the median of `repeats`.

    Pictures are square, `side` pixels or the model's own size. Two rows and more are guided requests. The numbers of
    rows take turns: what else the machine does meets them all. Stops doubling once the measurements would take
    `patience_s` seconds, though not before `least_rows`, or where memory does not suffice for as many subjects of the
    most reference images.
    """
    seconds: dict[int, list[float]] = {}
    started = time.perf_counter()
    typical, largest = (keys_values_of_nobody(booth, references) for references in (TYPICAL_REFERENCES, MAX_REFERENCES))

    def measured(rows: int, keys_values: Mapping[str, KeysValues]) -> float:
        return seconds_of_step(_batch(booth, rows, keys_values, side=side, steps=1))

    rows = 1
    while rows <= max_rows and (rows <= least_rows or (time.perf_counter() - started) * (1 + repeats / 2) < patience_s):
        try:
            for warming_up in (largest, typical):
                measured(rows, warming_up)
        except torch.OutOfMemoryError:
            break
        seconds[rows] = []
        rows *= 2
    for _ in range(repeats):
        for rows, each in seconds.items():
            each.append(measured(rows, typical))
    return {rows: statistics.median(each) for rows, each in seconds.items()}


def knee(seconds: Mapping[int, float]) -> int:
    """The rows beyond which a step takes longer almost in proportion: more of them add waiting, hardly throughput."""
    throughput = {rows: rows / each for rows, each in seconds.items()}
    best = max(throughput.values())
    return min(rows for rows, each in throughput.items() if each >= NEAR_BEST * best)


def typical_batch(booth: Personalizer, rows: int, *, steps: int) -> RowBatch:
    """A batch of so many U-Net rows of the model's own size, as they are measured: of typical subjects."""
    return _batch(booth, rows, keys_values_of_nobody(booth, TYPICAL_REFERENCES), steps=steps)


def seconds_of_step(batch: RowBatch) -> float:
    """What the batch's next step takes, until the device has done it."""
    started = time.perf_counter()
    batch.step()
    wait_for(batch.unet.device)
    return time.perf_counter() - started


def row_of_nobody(
    booth: Personalizer, keys_values: Mapping[str, KeysValues], *, guided: bool, side: int | None = None, steps: int
) -> Row:
    """A row that stands for any other: a square picture of `side` pixels, or of the model's own size."""
    base = booth.base
    latents = (side or base.image_size) // base.vae_factor
    text = torch.zeros(base.tokenizer.model_max_length, base.text_width, device=base.device, dtype=base.unet.dtype)
    return Row(
        table=sampler_table("ddim", steps, base.schedule),
        prompt_embeds=text,
        negative_embeds=text if guided else None,
        guidance_scale=2.0 if guided else 1.0,
        latents=torch.zeros(base.unet.config.in_channels, latents, latents, device=base.device),
        keys_values=keys_values,
    )


def keys_values_of_nobody(booth: Personalizer, references: int) -> Mapping[str, KeysValues]:
    """Those of a subject that is not there; their size is what counts."""
    width = booth.base.text_width
    concept = Concept.of(
        torch.zeros(references, width),
        torch.zeros(references, booth.image_encoder.num_tokens, width),
        class_noun="person",
        encoder_digest="",
        image_digests=[""] * references,
    )
    return booth.keys_values(concept)


def _batch(
    booth: Personalizer, rows: int, keys_values: Mapping[str, KeysValues], *, side: int | None = None, steps: int
) -> RowBatch:
    """One request without guidance, or as many with it as have so many U-Net rows."""
    requests = max(1, rows // 2)
    return RowBatch(
        booth.base.unet,
        [row_of_nobody(booth, keys_values, guided=rows > 1, side=side, steps=steps) for _ in range(requests)],
    )


def wait_for(device: torch.device) -> None:
    """Until the device has done what this thread told it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
