"""The miniature's text encoder and U-Net, trained together on rendered pictures and their captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Generator, Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from instantbooth.miniature.autoencoder import LATENT_CHANNELS
from instantbooth.miniature.corpus import Corpus
from instantbooth.miniature.vocabulary import MAX_LENGTH
from instantbooth.model.objective import add_noise, denoising_loss, draw_timesteps
from instantbooth.model.samplers import NoiseSchedule
from instantbooth.training.attention import write_out_attention
from instantbooth.training.loop import LoopConfig, train

TEXT_WIDTH = 128
DESCRIBED = 0.4
"""Share of captions that also tell some of the identity ("… of a woman with pale skin, round glasses wearing …")."""
PLACEHOLDER_SHARE = 0.15
"""Share of captions with the placeholder before the noun, so that it is a known, meaningless word to the base."""
EMPTY = 0.1
"""Share of empty captions, for classifier-free guidance."""


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder of 0.7 M parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """An untrained U-Net of 11 M parameters with 10 transformer blocks, heads 64 wide."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(1, 2, 3),
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class Captioned:
    """Pictures as latents and their tokenized captions: what the base learns from."""

    def __init__(self, corpus: Corpus, latents: Tensor, tokenizer: CLIPTokenizer, *, placeholder: str) -> None:
        """`latents` [N, C, h, w] are the corpus's, scaled; `placeholder` comes into some captions."""
        self.corpus = corpus
        self.latents = latents
        self._tokenizer = tokenizer
        self._placeholder = placeholder

    def draw(self, examples: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Latents [B, C, h, w] and token ids [B, L] of rows drawn with replacement."""
        rows = torch.randint(len(self.corpus), (examples,), generator=generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        words = [_training_caption(self.corpus, int(row), rng, self._placeholder) for row in rows]
        tokens = self._tokenizer(
            words, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        )
        return self.latents[rows], tokens.input_ids


def train_diffusion(
    name: str,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    pictures: Captioned,
    config: LoopConfig,
    *,
    folder: Path,
) -> list[float]:
    """Fits both, v-prediction at uniform timesteps; leaves the averaged weights and returns the losses."""
    write_out_attention(unet, text_encoder)
    schedule = NoiseSchedule.from_config(new_scheduler().config)

    def draw(examples: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        latents, ids = pictures.draw(examples, generator)
        timesteps = draw_timesteps(examples, schedule, generator)
        return latents, ids, timesteps, torch.randn(latents.shape, generator=generator)

    def loss(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        latents, ids, timesteps, noise = batch
        prompt_embeds = text_encoder(ids.to(unet.device)).last_hidden_state
        noisy, target = add_noise(latents.to(unet.device), noise.to(unet.device), timesteps, schedule)
        return denoising_loss(unet(noisy, timesteps.to(unet.device), prompt_embeds).sample, target)

    return train(name, nn.ModuleList([unet, text_encoder]), draw, loss, config, folder=folder, device=unet.device)


def describe(caption: str, noun: str, phrases: list[str]) -> str:
    """Puts identity phrases behind the noun.

    >>> describe("a photo of a woman at the beach", "woman", ["pale skin", "round glasses"])
    'a photo of a woman with pale skin, round glasses at the beach'
    """
    return caption.replace(f" {noun}", f" {noun} with {', '.join(phrases)}", 1)


def _training_caption(corpus: Corpus, row: int, rng: np.random.Generator, placeholder: str) -> str:
    if rng.random() < EMPTY:
        return ""
    caption, noun = corpus.captions[row], corpus.nouns[row]
    if rng.random() < DESCRIBED:
        phrases = corpus.descriptions[row].split(", ")
        kept = [phrase for phrase in phrases if rng.random() < 0.6]
        caption = describe(caption, noun, kept) if kept else caption
    if rng.random() < PLACEHOLDER_SHARE:
        caption = caption.replace(f" {noun}", f" {placeholder} {noun}", 1)
    return caption
