"""How many U-Net rows should share a step: measured, since no two machines agree."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from instantbooth import Concept, Personalizer
from instantbooth.model.adapter import KeysValues
from instantbooth.model.denoise import Row, RowBatch
from instantbooth.model.samplers import sampler_table

NEAR_BEST = 0.95
"""The knee is the smallest number of rows that reaches this share of the best rows per second."""
TYPICAL_REFERENCES = 3
"""Reference images of the subjects that are measured."""
MOST_REFERENCES = 16
"""Of the subjects for whom memory must suffice, as many as a manifest's row may have."""


def measure_steps(
    booth: Personalizer, *, max_rows: int, repeats: int = 3, patience_s: float = 20.0
) -> dict[int, float]:
    """Seconds of a step of the model's own size, for 1, 2, 4 … `max_rows` U-Net rows, the fastest of `repeats`.

    What else the machine does only adds to them. Two rows and more are guided requests. Stops doubling once the
    measurements took `patience_s` seconds, or where memory does not suffice for as many subjects of the most reference
    images.
    """
    seconds: dict[int, float] = {}
    started = time.perf_counter()
    typical, largest = (_keys_values(booth, references) for references in (TYPICAL_REFERENCES, MOST_REFERENCES))
    rows = 1
    while rows <= max_rows and (not seconds or time.perf_counter() - started < patience_s):
        try:
            seconds_of_step(_batch(booth, rows, largest, steps=1))
            batch = _batch(booth, rows, typical, steps=repeats + 1)
            seconds_of_step(batch)
            seconds[rows] = min(seconds_of_step(batch) for _ in range(repeats))
        except torch.OutOfMemoryError:
            break
        rows *= 2
    return seconds


def knee(seconds: Mapping[int, float]) -> int:
    """The rows beyond which a step takes longer almost in proportion: more of them add waiting, hardly throughput."""
    throughput = {rows: rows / each for rows, each in seconds.items()}
    best = max(throughput.values())
    return min(rows for rows, each in throughput.items() if each >= NEAR_BEST * best)


def typical_batch(booth: Personalizer, rows: int, *, steps: int) -> RowBatch:
    """A batch of so many U-Net rows of the model's own size, as they are measured: of typical subjects."""
    return _batch(booth, rows, _keys_values(booth, TYPICAL_REFERENCES), steps=steps)


def seconds_of_step(batch: RowBatch) -> float:
    """What the batch's next step takes, until the device has done it."""
    started = time.perf_counter()
    batch.step()
    wait_for(batch.unet.device)
    return time.perf_counter() - started


def _batch(booth: Personalizer, rows: int, keys_values: Mapping[str, KeysValues], *, steps: int) -> RowBatch:
    """One request without guidance, or as many with it as have so many U-Net rows."""
    base = booth.base
    side = int(base.unet.config.sample_size)
    text = torch.zeros(base.tokenizer.model_max_length, base.text_width, device=base.device, dtype=base.unet.dtype)
    return RowBatch(
        base.unet,
        [
            Row(
                table=sampler_table("ddim", steps, base.schedule),
                prompt_embeds=text,
                negative_embeds=text,
                guidance_scale=1.0 if rows == 1 else 2.0,
                latents=torch.zeros(base.unet.config.in_channels, side, side, device=base.device),
                keys_values=keys_values,
            )
            for _ in range(max(1, rows // 2))
        ],
    )


def _keys_values(booth: Personalizer, references: int) -> Mapping[str, KeysValues]:
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


def wait_for(device: torch.device) -> None:
    """Until the device has done what this thread told it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
