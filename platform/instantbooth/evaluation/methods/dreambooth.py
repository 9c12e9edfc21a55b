"""DreamBooth (Ruiz et al., arXiv 2208.12242): the U-Net and the text encoder finetuned, whole or by LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from torch import Generator, Tensor, nn
from transformers import CLIPTextModel

from instantbooth.errors import ParameterError
from instantbooth.evaluation.methods.finetuning import (
    BOUNDS,
    descend,
    draw_rows,
    image_latents,
    noise_prediction_loss,
    reference_latents,
)
from instantbooth.evaluation.methods.interface import Method, Reference, Sampling
from instantbooth.evaluation.methods.sampling import encode_prompts, sample
from instantbooth.model.base import BaseModel
from instantbooth.parameters import check_bounds
from instantbooth.prompts import expand
from instantbooth.training.attention import write_out_attention

PROMPT = "a photo of a {subject}"
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
OWN_BOUNDS = {"prior_weight": (0.0, math.inf), "prior_pictures": (0, math.inf), "lora_rank": (0, math.inf)}
"""Lowest and highest value of the fields that DreamBooth alone has."""


@dataclass(frozen=True, kw_only=True)
class DreamBoothConfig:
    """The defaults are the miniature's. For Stable Diffusion 1.x the values in parentheses are usual."""

    steps: int = 400
    """Optimizer steps (800)."""
    learning_rate: float = 1e-4
    """AdamW's (2e-6 to 5e-6 for all weights, 1e-4 for LoRA)."""
    batch_size: int = 4
    """References in a step, and as many pictures of the class (1)."""
    prior_weight: float = 1.0
    """Of the loss on pictures of the class, which keep the noun's meaning (1)."""
    prior_pictures: int = 64
    """Pictures of the class that the base makes, once for all its subjects (100 to 200)."""
    lora_rank: int = 0
    """Rank of the LoRA matrices in every attention layer; 0 finetunes all weights."""
    weight_decay: float = 0.01
    """AdamW's (0.01)."""
    seed: int = 0
    """All random numbers of a fit follow from it."""

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS | OWN_BOUNDS)
        if self.prior_weight and self.prior_pictures < 1:
            raise ParameterError(
                f"prior_pictures must be at least 1 with prior_weight {self.prior_weight}, is {self.prior_pictures}; "
                "64 is the default, and prior_weight 0 does without"
            )


@dataclass(frozen=True, kw_only=True)
class TunedBase:
    """A base finetuned to one subject."""

    base: BaseModel
    class_noun: str


class DreamBooth(Method[TunedBase]):
    """A subject is a base of its own, to which "V̂ noun" means the subject."""

    def __init__(self, base: BaseModel, sampling: Sampling, config: DreamBoothConfig) -> None:
        self.base = base
        self.sampling = sampling
        self.config = config
        self._priors: dict[str, Tensor] = {}

    def prepare(self, class_noun: str) -> None:
        """Makes the pictures of the class."""
        if self.config.prior_weight and class_noun not in self._priors:
            count = self.config.prior_pictures
            prompts = encode_prompts(self.base, [_class_prompt(class_noun)]).expand(count, -1, -1)
            self._priors[class_noun] = image_latents(self.base, sample(self.base, prompts, range(count), self.sampling))

    def fit(self, references: Sequence[Reference], class_noun: str) -> TunedBase:
        """Finetunes a copy of the base on the references, with prior preservation."""
        self.prepare(class_noun)
        latents, config = reference_latents(self.base, references), self.config
        tuned = replace(self.base, unet=deepcopy(self.base.unet), text_encoder=deepcopy(self.base.text_encoder))
        write_out_attention(tuned.unet, tuned.text_encoder)
        parameters = self._trainable(tuned.unet, tuned.text_encoder)
        prompts, count = [expand(PROMPT, class_noun), _class_prompt(class_noun)], config.batch_size
        # Twice: each half's mean is wanted, and the loss is the mean of both together.
        weights = 2 * torch.tensor([1.0, config.prior_weight], device=latents.device)
        weights = weights.repeat_interleave(count).view(-1, 1, 1, 1)

        def loss(generator: Generator) -> Tensor:
            own = latents[draw_rows(len(latents), count, generator)]
            if not config.prior_weight:
                texts = encode_prompts(tuned, prompts[:1]).expand(count, -1, -1)
                return noise_prediction_loss(tuned, own, texts, generator)
            prior = self._priors[class_noun]
            rows = torch.cat([own, prior[draw_rows(len(prior), count, generator)]])
            texts = encode_prompts(tuned, prompts).repeat_interleave(count, dim=0)
            return noise_prediction_loss(tuned, rows, texts, generator, weights)

        descend(
            parameters,
            loss,
            steps=config.steps,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            seed=config.seed,
        )
        for module in (tuned.unet, tuned.text_encoder):
            module.requires_grad_(False)
        return TunedBase(base=tuned, class_noun=class_noun)

    @torch.no_grad()
    def generate(self, subject: TunedBase, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Pictures of prompts in which "V̂ noun" stands for the subject."""
        texts = [expand(prompt, subject.class_noun) for prompt in prompts]
        return sample(subject.base, encode_prompts(subject.base, texts), seeds, self.sampling)

    def _trainable(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> list[nn.Parameter]:
        if not self.config.lora_rank:
            unet.requires_grad_(True)
            text_encoder.requires_grad_(True)
        else:
            torch.manual_seed(self.config.seed)
            for module, targets in ((unet, UNET_TARGETS), (text_encoder, TEXT_TARGETS)):
                rank = self.config.lora_rank
                module.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        parameters = [*unet.parameters(), *text_encoder.parameters()]
        return [each for each in parameters if each.requires_grad]


def _class_prompt(noun: str) -> str:
    return PROMPT.format(subject=noun)
