"""Stable Diffusion 1.5's true configuration with random weights: it makes noise at the true speed."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from instantbooth.miniature.vocabulary import learn_tokenizer
from instantbooth.model.base import device_of

CAPTIONS = ("a photo of a person at the beach", "a watercolor of a man or woman", "a kitten wearing a crown")


def write_full_size(folder: Path) -> None:
    """Writes the base and image_encoder/, CLIP ViT-L/14, in bfloat16: 2.7 GB."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        # Drawn on a GPU where there is one: a CPU takes 14 s.
        with device_of(None):
            base, image_encoder = _base(), _image_encoder()
        base.save_pretrained(folder)
        image_encoder.save_pretrained(folder / "image_encoder")
    finally:
        torch.set_default_dtype(default)
    CLIPImageProcessor().save_pretrained(folder / "image_encoder")


def _base() -> StableDiffusionPipeline:
    tokenizer = learn_tokenizer(CAPTIONS, placeholder="sks")
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _image_encoder() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            projection_dim=768,
            num_hidden_layers=24,
            num_attention_heads=16,
            patch_size=14,
        )
    )
