"""Textual Inversion (Gal et al., arXiv 2208.01618): one new word, whose embedding alone is optimised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Generator, Tensor, nn
from transformers import CLIPTextModel

from instantbooth.evaluation.methods.finetuning import (
    BOUNDS,
    descend,
    draw_rows,
    noise_prediction_loss,
    reference_latents,
)
from instantbooth.evaluation.methods.interface import Method, Reference, Sampling
from instantbooth.evaluation.methods.sampling import sample
from instantbooth.model.base import BaseModel
from instantbooth.model.conditioning import inject
from instantbooth.parameters import check_bounds
from instantbooth.prompts import PLACEHOLDER_TOKEN, SUBJECT_FIELD, expand, tokenize_subject
from instantbooth.training.attention import write_out_attention

TEMPLATES = (
    "a photo of a {subject}",
    "a picture of a {subject}",
    "a close-up photo of a {subject}",
    "a photo of the {subject}",
)
"""Captions of the references while the word is learned, drawn at random."""


@dataclass(frozen=True, kw_only=True)
class TextualInversionConfig:
    """The defaults are the miniature's. For Stable Diffusion 1.x the values in parentheses are usual."""

    steps: int = 1000
    """Optimizer steps (3000; 5000 in the paper)."""
    learning_rate: float = 5e-3
    """AdamW's (5e-4 for one picture in a step, times the batch size)."""
    batch_size: int = 4
    """Pictures in a step (4)."""
    weight_decay: float = 0.0
    """AdamW's (0.01)."""
    seed: int = 0
    """All random numbers of a fit follow from it."""

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)


class TextualInversion(Method[Tensor]):
    """A subject is the embedding [W] of the new word, which stands in the prompt alone, without a class noun."""

    def __init__(self, base: BaseModel, sampling: Sampling, config: TextualInversionConfig) -> None:
        write_out_attention(base.unet, base.text_encoder)
        self.base = base
        self.sampling = sampling
        self.config = config

    def fit(self, references: Sequence[Reference], class_noun: str) -> Tensor:
        """Starts at the class noun's embedding and minimises the denoising loss of the references."""
        latents, config = reference_latents(self.base, references), self.config
        vector = nn.Parameter(self._embedding_of(class_noun).float())
        captions = [tokenize_subject(self.base.tokenizer, _named(each)) for each in TEMPLATES]

        def loss(generator: Generator) -> Tensor:
            rows = draw_rows(len(latents), config.batch_size, generator)
            chosen = torch.randint(len(captions), (config.batch_size,), generator=generator).tolist()
            prompt_embeds = self._encode([captions[n] for n in chosen], vector)
            return noise_prediction_loss(self.base, latents[rows], prompt_embeds, generator)

        descend(
            [vector],
            loss,
            steps=config.steps,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            seed=config.seed,
        )
        return vector.detach()

    @torch.no_grad()
    def generate(self, subject: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Pictures of prompts in which the new word stands for the subject."""
        captions = [tokenize_subject(self.base.tokenizer, _named(prompt)) for prompt in prompts]
        return sample(self.base, self._encode(captions, subject), seeds, self.sampling)

    def _embedding_of(self, noun: str) -> Tensor:
        last = self.base.tokenizer(noun, add_special_tokens=False)["input_ids"][-1]
        weight: Tensor = self.base.text_encoder.get_input_embeddings().weight
        return weight[last].detach().clone()

    def _encode(self, captions: Sequence[tuple[list[int], int]], vector: Tensor) -> Tensor:
        ids, positions = zip(*captions, strict=True)
        with embedded(self.base.text_encoder, torch.tensor(positions), vector.expand(len(ids), -1)):
            return self.base.encode_text(torch.tensor(ids))


@contextmanager
def embedded(text_encoder: CLIPTextModel, positions: Tensor, vectors: Tensor) -> Iterator[None]:
    """Within it, the word at `positions` [B] has the embedding `vectors` [B, W], whatever its token id says."""

    def replace(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return inject(output, positions.to(output.device), vectors)

    hook = text_encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _named(prompt: str) -> str:
    expand(prompt, "noun")
    return prompt.replace(SUBJECT_FIELD, PLACEHOLDER_TOKEN)
