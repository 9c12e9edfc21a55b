"""IP-Adapter for the miniature world: trained on the pairs that InstantBooth is trained on, as long as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from instantbooth.evaluation.ip_adapter.training import IPAdapterObjective
from instantbooth.miniature.corpus import Corpus
from instantbooth.miniature.pairs import Pairs, loop_of
from instantbooth.model.base import BaseModel
from instantbooth.model.encoders import ImageEncoder
from instantbooth.prompts import tokenize
from instantbooth.training.adapters import AdapterTrainingConfig, Draws, draw
from instantbooth.training.loop import train


def training_of(config: AdapterTrainingConfig) -> AdapterTrainingConfig:
    """InstantBooth's training as IP-Adapter's, with its authors' shares of rows without text, picture, or both.

    Without both is how guidance asks it, in every step; InstantBooth's answer to that is the frozen base's.
    """
    return replace(config, text_dropout=0.05, image_dropout=0.05, both_dropout=0.05)


def train_ip_adapter(
    variant: str,
    base: BaseModel,
    image_encoder: ImageEncoder,
    corpus: Corpus,
    latents: Tensor,
    rounds: Sequence[AdapterTrainingConfig],
    *,
    folder: Path,
) -> tuple[IPAdapterObjective, list[float]]:
    """Trains round after round, or resumes from `folder`; the adapter is built into the base's U-Net.

    `latents` [N, C, h, w] are the corpus's, scaled. Returns the objective, which holds the averaged weights, and the
    loss of every step.
    """
    objective = IPAdapterObjective(base, image_encoder, variant, rounds[0])
    ids = torch.tensor([tokenize(base.tokenizer, caption) for caption in corpus.captions])
    losses = []
    for number, config in enumerate(rounds, start=1):
        objective.config = config
        pairs = Pairs(corpus, latents, replaced_backgrounds=config.replaced_backgrounds)
        losses += _train_round(f"ip-adapter-{variant}-{number}", objective, pairs, ids, folder=folder)
    objective.trained.requires_grad_(False)
    return objective, losses


def _train_round(name: str, objective: IPAdapterObjective, pairs: Pairs, ids: Tensor, *, folder: Path) -> list[float]:
    base, config = objective.base, objective.config

    def draw_batch(examples: int, generator: Generator) -> tuple[dict[str, Tensor], Draws]:
        rows, batch = pairs.draw(examples, generator)
        batch |= {"input_ids": ids[rows]}
        return batch, draw(base, config, examples, generator)

    def loss(drawn: tuple[dict[str, Tensor], Draws]) -> Tensor:
        value: Tensor = objective(*drawn)
        return value

    return train(name, objective, draw_batch, loss, loop_of(config), folder=folder, device=base.device)
