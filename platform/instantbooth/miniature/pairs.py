"""Rendered pairs as the examples of a training: what every method that learns from them is given."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from instantbooth.errors import ParameterError
from instantbooth.miniature.autoencoder import encode_latents
from instantbooth.miniature.corpus import Corpus
from instantbooth.miniature.crops import on_black, on_scenes, subject_crops, to_unit
from instantbooth.model.weights import tensors_digest
from instantbooth.training.adapters import AdapterTrainingConfig
from instantbooth.training.loop import LoopConfig


class Pairs:
    """Targets as latents, and their subjects cut out, masked and augmented."""

    def __init__(
        self, corpus: Corpus, latents: Tensor, *, masked: bool = True, replaced_backgrounds: float = 0.0
    ) -> None:
        """`latents` [N, C, h, w] are the corpus's, scaled. Not `masked`, the crops keep their background.

        `replaced_backgrounds` is AdapterTrainingConfig's: so many are framed more loosely, before another background
        or, not `masked`, before their own.
        """
        self.masked = masked
        self.replaced_backgrounds = replaced_backgrounds
        self.corpus = corpus
        self.latents = latents
        self._images, self._masks = torch.from_numpy(corpus.images), torch.from_numpy(corpus.masks)

    def draw(self, examples: int, generator: Generator) -> tuple[list[int], dict[str, Tensor]]:
        """Rows of the corpus, drawn with replacement, and what a training computes the loss of.

        That is `latents` [B, C, h, w], `reference_pixels` [B, 3, 64, 64] and `subject_mask` [B, 1, h, w].
        """
        rows = torch.randint(len(self.corpus), (examples,), generator=generator)
        crops = self._crops(rows, generator)
        latents = self.latents[rows]
        covered = F.interpolate(self._masks[rows, None].float() / 255, size=list(latents.shape[-2:]), mode="area")
        return rows.tolist(), {"latents": latents, "reference_pixels": crops, "subject_mask": covered}

    def _crops(self, rows: Tensor, generator: Generator) -> Tensor:
        images, masks = self._images[rows], self._masks[rows]
        pixels = on_black(images, masks) if self.masked else to_unit(images)
        if not self.replaced_backgrounds:
            return subject_crops(pixels, masks, generator)
        others = torch.randint(len(self.corpus), (len(rows),), generator=generator)
        replaced = torch.rand(len(rows), generator=generator) < self.replaced_backgrounds
        looseness = torch.rand(len(rows), generator=generator) * replaced
        if self.masked:
            placed = on_scenes(images, masks, self._images[others], self._masks[others])
            pixels = torch.where(replaced[:, None, None, None], placed, pixels)
        return subject_crops(pixels, masks, generator, looseness=looseness)


def corpus_latents(corpus: Corpus, vae: AutoencoderKL, folder: Path) -> Tensor:
    """The corpus's scaled latents [N, C, h, w], encoded once and kept in `folder`."""
    encoder = {name: each for name, each in vae.state_dict().items() if name.startswith(("encoder.", "quant_conv."))}
    made_of = sha256(corpus.images.tobytes() + tensors_digest(encoder).encode()).hexdigest()
    path = folder / f"latents-{len(corpus)}-{made_of[:8]}.safetensors"
    if not path.exists():
        encoded = encode_latents(vae, torch.from_numpy(corpus.images)) * vae.config.scaling_factor
        partial = path.with_suffix(".partial")
        save_file({"latents": encoded.contiguous()}, partial)
        partial.rename(path)
    return load_file(path)["latents"]


def loop_of(config: AdapterTrainingConfig) -> LoopConfig:
    """One machine's loop with a method's hyperparameters; the rate falls over the second half of the steps.

    Raises ParameterError for two learning rates: the loop has one.
    """
    if config.encoder_learning_rate != config.adapter_learning_rate:
        raise ParameterError(
            f"adapter_learning_rate is {config.adapter_learning_rate:g} and encoder_learning_rate "
            f"{config.encoder_learning_rate:g}; a training on one machine has one rate: make them equal"
        )
    return LoopConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        processes=2,
        learning_rate=config.adapter_learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps // 2,
        weight_decay=config.weight_decay,
        ema_decay=config.ema_decay,
        clip_norm=config.clip_norm,
        seed=config.seed,
    )
