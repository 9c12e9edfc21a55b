"""What the methods that optimise for each subject share: its latents, a batch's denoising loss, and the descent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image, ImageOps
from torch import Generator, Tensor, nn

from instantbooth.errors import ImageError
from instantbooth.evaluation.methods.interface import Reference
from instantbooth.images import check_image
from instantbooth.model.base import BaseModel
from instantbooth.model.encoders import resize_to_tensor
from instantbooth.model.loading import autocast
from instantbooth.model.objective import add_noise, denoising_loss, draw_timesteps

CLIP_NORM = 1.0
BOUNDS = {
    "steps": (1, math.inf),
    "learning_rate": (0.0, math.inf),
    "batch_size": (1, math.inf),
    "weight_decay": (0.0, 1.0),
    "seed": (0, 2**63 - 1),
}
"""Lowest and highest value of the fields that all configurations have."""


def reference_latents(base: BaseModel, references: Sequence[Reference]) -> Tensor:
    """Scaled latents [N, C, h, w] of the references' middle squares. Raises ImageError without any."""
    if not references:
        raise ImageError("no reference images given; pass at least one")
    images = [check_image(each.image, name=f"reference {n}") for n, each in enumerate(references, start=1)]
    return image_latents(base, [image.convert("RGB") for image in images])


@torch.no_grad()
def image_latents(base: BaseModel, images: Sequence[Image.Image], *, batch_size: int = 8) -> Tensor:
    """Scaled latents [N, C, h, w] of RGB pictures, cut to their middle square."""
    side = base.image_size
    squares = [ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC) for image in images]
    pixels = torch.stack([resize_to_tensor(square, side) for square in squares]) * 2 - 1
    return torch.cat([base.encode_pixels(batch) for batch in pixels.split(batch_size)])


def noise_prediction_loss(
    base: BaseModel, latents: Tensor, prompt_embeds: Tensor, generator: Generator, weights: Tensor | None = None
) -> Tensor:
    """The denoising loss of latents [B, C, h, w] under their prompts [B, T, W], noise and timesteps drawn anew.

    Weights are as `denoising_loss` has them.
    """
    timesteps = draw_timesteps(len(latents), base.schedule, generator).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    noisy, target = add_noise(latents, noise, timesteps, base.schedule)
    return denoising_loss(base.unet(noisy, timesteps, prompt_embeds).sample, target, weights)


def draw_rows(count: int, rows: int, generator: Generator) -> Tensor:
    """Indices [rows] below `count`: each as often as any other, in random order, before one comes once more."""
    rounds = -(-rows // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:rows]


def descend(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Generator], Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
) -> list[float]:
    """AdamW, in bfloat16 where the device has it; the rate is constant, then falls to 0 over the second half.

    Returns all losses.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay, fused=True)
    generator = Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, 2 * (1 - step / steps))
        with autocast(trained[0].device):
            value = loss(generator)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        losses.append(float(value.detach()))
    return losses
