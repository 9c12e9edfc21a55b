"""Denoising a batch of requests, each with its own sampler, steps, guidance, identity and noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from instantbooth.model.adapter import References, adapter_kwargs
from instantbooth.model.samplers import SamplerTable, sampler_step

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


@dataclass(frozen=True, kw_only=True)
class DenoisingBatch:
    """Row i of each field belongs to request i."""

    latents: Tensor
    """Unit noise [B, C, H, W]."""
    tables: Sequence[SamplerTable]
    """Each row's sampler and number of steps."""
    prompt_embeds: Tensor
    """[B, T, W], the concept injected."""
    negative_embeds: Tensor
    """[B, T, W]; used in rows whose guidance is above 1."""
    guidance_scales: Sequence[float]
    """At 1 or below a row costs one U-Net row, above it two."""
    references: References | None
    """The identities; one row each. None for the base alone."""


@torch.inference_mode()
def denoise(unet: UNet2DConditionModel, batch: DenoisingBatch) -> Iterator[Tensor]:
    """Yields the latents [B, C, H, W] after every step; rows with fewer steps stand still once they are done.

    A closed generator frees everything, so cancelling is leaving the loop.
    """
    device = batch.latents.device
    scales = torch.tensor([table.initial_scale for table in batch.tables], device=device)
    latents = batch.latents * scales.view(-1, 1, 1, 1)
    previous_x0 = torch.zeros_like(latents)
    guidance = torch.tensor(list(batch.guidance_scales), device=device)
    running = torch.empty(0)
    for step in range(max(table.num_steps for table in batch.tables)):
        active = [row for row, table in enumerate(batch.tables) if step < table.num_steps]
        if len(active) != len(running):
            running = torch.tensor(active, device=device)
            guided = torch.nonzero(guidance[running] > 1).flatten()
            text = torch.cat([batch.prompt_embeds[running], batch.negative_embeds[running[guided]]])
            kwargs = None if batch.references is None else adapter_kwargs(batch.references.rows(running))
        coefficients = torch.stack([batch.tables[row].coefficients(step) for row in active]).to(device)
        timesteps = torch.stack([batch.tables[row].timesteps[step] for row in active]).to(device)
        sample = latents[running]
        output = unet(
            torch.cat([sample, sample[guided]]).to(unet.dtype),
            torch.cat([timesteps, timesteps[guided]]),
            text,
            cross_attention_kwargs=kwargs,
        ).sample.float()
        conditional, unconditional = output[: len(active)], output[len(active) :]
        strength = guidance[running[guided]].view(-1, 1, 1, 1)
        conditional[guided] = unconditional + strength * (conditional[guided] - unconditional)
        latents[running], previous_x0[running] = sampler_step(coefficients, sample, conditional, previous_x0[running])
        yield latents


def unit_noise(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Noise [B, *shape], every row from a generator of its own: the same seed gives the same noise in any company."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)
