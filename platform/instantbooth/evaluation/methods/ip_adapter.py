"""IP-Adapter as a method: image tokens beside the text's, each with a cross-attention of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from instantbooth.errors import ImageError, ParameterError, did_you_mean
from instantbooth.evaluation.ip_adapter import weights
from instantbooth.evaluation.methods.interface import Method, Reference, Sampling
from instantbooth.evaluation.methods.sampling import encode_prompts, sample
from instantbooth.images import check_image, check_mask, subject_square
from instantbooth.model.base import BaseModel
from instantbooth.model.encoders import ImageEncoder
from instantbooth.parameters import check_bounds
from instantbooth.prompts import SUBJECT_FIELD, expand, tokenize_subject


@dataclass(frozen=True, kw_only=True)
class IPAdapterConfig:
    """The defaults are the miniature's. For Stable Diffusion 1.x the values in parentheses are usual."""

    variant: str = "global"
    """One of instantbooth.evaluation.ip_adapter.weights.VARIANTS."""
    scale: float = 1.0
    """Strength of the image tokens (0.6 where a prompt shall be followed too)."""

    def __post_init__(self) -> None:
        check_bounds(self, {"scale": (0.0, math.inf)})
        if self.variant not in weights.VARIANTS:
            raise ParameterError(f"variant {self.variant!r} is unknown. {did_you_mean(self.variant, weights.VARIANTS)}")


@dataclass(frozen=True, kw_only=True)
class ImagePrompt:
    """A subject's features, of each reference [1, N, …] and of no picture [1, N, …]."""

    features: Tensor
    nothing: Tensor
    class_noun: str


class IPAdapter(Method[ImagePrompt]):
    """A subject is what CLIP sees in the references; their image tokens stand side by side."""

    def __init__(
        self, base: BaseModel, image_encoder: Path, file: Path, sampling: Sampling, config: IPAdapterConfig
    ) -> None:
        """`base` is changed: it gets the adapter of `file`. Raises WeightsError."""
        state = weights.load(file, config.variant)
        weights.check_fits(base.unet, state, file)
        weights.check_reads(image_encoder, state, file)
        weights.attach(base.unet, state).requires_grad_(False)
        weights.set_scale(base.unet, config.scale)
        self.base = base
        self.sampling = sampling
        self.config = config
        self.image_encoder = ImageEncoder(
            image_encoder, patch_layer=weights.PLUS_LAYER, device=base.device, dtype=base.unet.dtype
        )

    @torch.inference_mode()
    def fit(self, references: Sequence[Reference], class_noun: str) -> ImagePrompt:
        """Reads the references' features: of the subject alone where its mask is known, as in training."""
        if not references:
            raise ImageError("no reference images given; pass at least one")
        squares = [_square(reference, f"reference {n}") for n, reference in enumerate(references, start=1)]
        pixels = torch.stack([self.image_encoder.preprocess(square) for square in squares]).to(self.base.device)
        features, nothing = weights.image_features(self.image_encoder, self.config.variant, pixels)
        return ImagePrompt(features=features[None], nothing=nothing.expand_as(features)[None], class_noun=class_noun)

    @torch.inference_mode()
    def generate(self, subject: ImagePrompt, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Pictures of prompts in which the class noun stands for the subject."""
        for prompt in prompts:
            tokenize_subject(self.base.tokenizer, expand(prompt, subject.class_noun))
        texts = [prompt.replace(SUBJECT_FIELD, subject.class_noun) for prompt in prompts]
        prompted = _ImagePrompted(self.base.unet, subject, guided=self.sampling.guidance_scale > 1)
        return sample(self.base, encode_prompts(self.base, texts), seeds, self.sampling, unet=prompted)


class _ImagePrompted:
    """The U-Net with one subject's features: those of no picture for the unconditional half behind the conditional."""

    def __init__(self, unet: Any, subject: ImagePrompt, *, guided: bool) -> None:
        self.unet = unet
        self.dtype = unet.dtype
        self.subject = subject
        self.guided = guided

    def __call__(self, latents: Tensor, timesteps: Tensor, text: Tensor, **arguments: Any) -> Any:
        rows = len(latents) // 2 if self.guided else len(latents)
        halves = [self.subject.features] * rows + [self.subject.nothing] * (len(latents) - rows)
        return self.unet(
            latents, timesteps, text, added_cond_kwargs=weights.image_arguments(torch.cat(halves)), **arguments
        )


def _square(reference: Reference, name: str) -> Image.Image:
    image = check_image(reference.image, name=name)
    mask = None if reference.mask is None else check_mask(reference.mask, image, f"the mask of {name}")
    return subject_square(image, mask)
