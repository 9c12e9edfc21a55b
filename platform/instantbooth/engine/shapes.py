"""The few shapes that batches are padded to, and the U-Net compiled for each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from instantbooth import Personalizer
from instantbooth.engine.knee import keys_values_of_nobody, row_of_nobody
from instantbooth.errors import EngineError
from instantbooth.model.conditioning import reference_tokens
from instantbooth.model.denoise import BatchShape, Row, RowBatch
from instantbooth.parameters import MAX_REFERENCES

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Batches hold a bucket's number of requests, all guided or none, each with MAX_REFERENCES unless one has more."""

    buckets: tuple[int, ...]
    """Numbers of requests, rising. Empty pads nothing."""
    tokens_per_image: int
    """Of a reference image."""

    def padded_rows(self, requests: int, rows: int) -> float:
        """U-Net rows of so many requests that have `rows` by themselves; infinite where no bucket holds them."""
        if not self.buckets:
            return rows
        return self._bucket(requests) * (2 if rows > requests else 1)

    def of(self, rows: Sequence[Row]) -> BatchShape | None:
        """What these, which a bucket holds, are padded to; None where nothing is padded."""
        if not self.buckets:
            return None
        longest = max((reference_tokens(row.keys_values) for row in rows if row.keys_values is not None), default=0)
        return self._shape(int(self._bucket(len(rows))), guided=any(row.guided for row in rows), tokens=longest)

    def within(self, row_budget: int) -> list[BatchShape]:
        """Every shape of at most so many U-Net rows, and those of one request, which always fits."""
        return [
            self._shape(requests, guided=guided)
            for requests in self.buckets
            for guided in (True, False)
            if requests == self.buckets[0] or requests * (1 + guided) <= row_budget
        ]

    def _bucket(self, requests: int) -> float:
        return next((bucket for bucket in self.buckets if bucket >= requests), math.inf)

    def _shape(self, requests: int, *, guided: bool, tokens: int = 0) -> BatchShape:
        return BatchShape(
            conditional=requests,
            unconditional=requests if guided else 0,
            reference_tokens=max(tokens, MAX_REFERENCES * self.tokens_per_image),
        )


def default_buckets(row_budget: int) -> tuple[int, ...]:
    """Powers of two up to the budget, and the most requests that it holds with guidance and without."""
    powers = {2**n for n in range(row_budget.bit_length())}
    return tuple(sorted(powers | {max(1, row_budget // 2), row_budget}))


def compile_unet(booth: Personalizer, shapes: Sequence[BatchShape], *, backend: str) -> UNet2DConditionModel:
    """The U-Net, compiled for pictures of the model's own size in batches of these shapes, and run once in each.

    It is never compiled again: any other shape runs as it is. Raises EngineError where it cannot be compiled.
    """
    keys_values = keys_values_of_nobody(booth, 1)
    try:
        unet: UNet2DConditionModel = torch.compile(  # type: ignore[call-overload]  # its overloads lack the limit
            booth.base.unet, backend=backend, dynamic=False, recompile_limit=len(shapes), isolate_recompiles=True
        )
        for shape in shapes:
            row = row_of_nobody(booth, keys_values, guided=shape.unconditional > 0, steps=1)
            RowBatch(unet, [row], shape).step()
    except Exception as error:
        raise EngineError(f"the U-Net cannot be compiled by {backend}: {error}; leave compile off") from error
    return unet
