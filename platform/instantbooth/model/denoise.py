"""Denoising rows that share a U-Net: each with its own sampler, steps, guidance, identity and noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from instantbooth.model.adapter import KeysValues, adapter_kwargs
from instantbooth.model.conditioning import batch_references
from instantbooth.model.samplers import SamplerTable, sampler_step

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


@dataclass(kw_only=True, eq=False)
class Row:
    """A picture on its way: all that its next step needs, and nothing of its company."""

    table: SamplerTable
    """Its sampler and number of steps."""
    prompt_embeds: Tensor
    """[T, W], the concept injected."""
    negative_embeds: Tensor | None
    """[T, W]; None where the guidance is 1 or below, which has no use for it."""
    guidance_scale: float
    """At 1 or below a step costs one U-Net row, above it two."""
    latents: Tensor
    """[C, H, W]; unit noise at first."""
    adapter_scale: float = 0.0
    """β."""
    keys_values: Mapping[str, KeysValues] | None = None
    """The concept's, as concept_keys_values gives them; None for the base alone."""
    previous_x0: Tensor | None = None
    """What the step before took for the clean latents [C, H, W]; None before the first."""
    step: int = 0
    """Steps taken."""

    def __post_init__(self) -> None:
        self.latents = self.latents * self.table.initial_scale

    @property
    def done(self) -> bool:
        """Whether every step is taken."""
        return self.step >= self.table.num_steps

    @property
    def guided(self) -> bool:
        """Whether guidance doubles its cost."""
        return self.guidance_scale > 1


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Sizes a batch is padded to, so that a compiled U-Net or a graph meets few shapes."""

    conditional: int
    """Rows with their prompts."""
    unconditional: int
    """Rows with their negative prompts, for guidance."""
    reference_tokens: int | None = None
    """Tokens of the longest concept."""


class RowBatch:
    """Rows of one size that take their next steps together. Only the rows themselves hold state."""

    def __init__(self, unet: UNet2DConditionModel, rows: Sequence[Row], shape: BatchShape | None = None) -> None:
        """Stacks what stays the same from step to step. Rows have all a concept, or none of them has.

        `shape` is at least as large as the rows need; the padding repeats rows, and its output is left aside.
        """
        self.unet = unet
        self.rows = list(rows)
        device = self.rows[0].latents.device
        guided = [index for index, row in enumerate(self.rows) if row.guided]
        shape = shape or BatchShape(conditional=len(self.rows), unconditional=len(guided))
        self.guided = torch.tensor(guided, dtype=torch.long, device=device)
        self.strength = torch.tensor([self.rows[i].guidance_scale for i in guided], device=device).view(-1, 1, 1, 1)
        conditional = _padded(range(len(self.rows)), shape.conditional)
        unconditional = _padded(guided, shape.unconditional)
        self.order = torch.tensor(conditional + unconditional, device=device)
        self.first_unconditional = len(conditional)
        negative = [row.negative_embeds for row in self.rows if row.guided and row.negative_embeds is not None]
        padding = [self.rows[0].prompt_embeds] * (len(unconditional) - len(guided))
        self.text = torch.stack([*(self.rows[i].prompt_embeds for i in conditional), *negative, *padding])
        concepts = [self.rows[i].keys_values for i in conditional]
        self.kwargs = None
        if concepts[0] is not None:
            scales = torch.tensor([self.rows[i].adapter_scale for i in conditional], device=device)
            known = [each for each in concepts if each is not None]
            self.kwargs = adapter_kwargs(batch_references(known, scales, tokens=shape.reference_tokens))

    @torch.inference_mode()
    def step(self) -> None:
        """Takes the next step of every row; should it fail, no row has changed."""
        rows = self.rows
        latents = torch.stack([row.latents for row in rows])
        previous = torch.stack([row.latents if row.previous_x0 is None else row.previous_x0 for row in rows])
        coefficients = torch.stack([row.table.coefficients(row.step) for row in rows]).to(latents.device)
        timesteps = torch.stack([row.table.timesteps[row.step] for row in rows]).to(latents.device)
        output = self._predict(latents, timesteps)
        latents, clean = sampler_step(coefficients, latents, output, previous)
        for row, row_latents, row_clean in zip(rows, latents, clean, strict=True):
            row.latents, row.previous_x0, row.step = row_latents, row_clean, row.step + 1

    def _predict(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        output = self.unet(
            latents[self.order].to(self.unet.dtype),
            timesteps[self.order],
            self.text,
            cross_attention_kwargs=self.kwargs,
        ).sample.float()
        conditional: Tensor = output[: len(self.rows)]
        unconditional = output[self.first_unconditional :][: len(self.guided)]
        conditional[self.guided] = unconditional + self.strength * (conditional[self.guided] - unconditional)
        return conditional


def denoise(unet: UNet2DConditionModel, rows: Sequence[Row], shape: BatchShape | None = None) -> Iterator[Tensor]:
    """Yields the latents [B, C, H, W] after every step; rows with fewer steps stand still once they are done.

    The batch shrinks as rows are done, or keeps the `shape` that is given. A closed generator frees everything, so
    cancelling is leaving the loop.
    """
    batch = None
    while running := [row for row in rows if not row.done]:
        if batch is None or len(batch.rows) != len(running):
            batch = RowBatch(unet, running, shape)
        batch.step()
        yield torch.stack([row.latents for row in rows])


def unit_noise(seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal noise from a generator of its own: the same seed gives the same noise in any company."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _padded(indices: Sequence[int], size: int) -> list[int]:
    """The indices, then the first of all rows as often as it takes."""
    return [*indices, *[0] * (size - len(indices))]
