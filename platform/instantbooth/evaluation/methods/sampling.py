"""Sampling a base, changed by a method or not: the same sampler, steps, guidance and noise for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from instantbooth.errors import ParameterError
from instantbooth.evaluation.methods.interface import Sampling
from instantbooth.model.base import BaseModel
from instantbooth.model.denoise import Row, denoise, unit_noise
from instantbooth.model.personalizer import MAX_BATCH
from instantbooth.model.samplers import sampler_table
from instantbooth.prompts import tokenize


@torch.inference_mode()
def sample(
    base: BaseModel, prompt_embeds: Tensor, seeds: Sequence[int], sampling: Sampling, *, unet: Any = None
) -> list[Image.Image]:
    """A picture of the base's own size for each row of `prompt_embeds` [B, T, W] and its seed.

    `unet` stands for the base's own: anything called like it. Raises ParameterError where counts differ.
    """
    if len(prompt_embeds) != len(seeds):
        raise ParameterError(f"there are {len(prompt_embeds)} prompts but {len(seeds)} seeds; pass one for each")
    table = sampler_table(sampling.sampler, sampling.num_inference_steps, base.schedule)
    side = int(base.unet.config.sample_size)
    shape = (int(base.unet.config.in_channels), side, side)
    empty = encode_prompts(base, [""])[0]
    pictures: list[Image.Image] = []
    for start in range(0, len(seeds), MAX_BATCH):
        rows = [
            Row(
                table=table,
                prompt_embeds=text,
                negative_embeds=empty,
                guidance_scale=sampling.guidance_scale,
                latents=unit_noise(seed, shape, base.device),
            )
            for text, seed in zip(prompt_embeds[start : start + MAX_BATCH], seeds[start:], strict=False)
        ]
        for latents in denoise(unet or base.unet, rows):
            pass
        pictures += base.decode(latents)
    return pictures


def encode_prompts(base: BaseModel, prompts: Sequence[str]) -> Tensor:
    """Texts as they are → the base's prompt embeddings [B, T, W]."""
    return base.encode_text(torch.tensor([tokenize(base.tokenizer, prompt) for prompt in prompts]))
