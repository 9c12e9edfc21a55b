"""A Stable Diffusion folder and a CLIP with random weights, built in a second: real classes, real formats."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from instantbooth import Personalizer
from instantbooth.miniature.corpus import Corpus, identity_of, subject_seed
from instantbooth.miniature.vocabulary import learn_tokenizer
from instantbooth.miniature.world import Scene, render

WIDTH = 32
CAPTIONS = (
    "a photo of a person at the beach",
    "a watercolor of a cat wearing a crown",
    "man woman kitten boy girl lady",
    "a close - up pencil drawing or pixel art picture",
)


def tiny_model(folder: Path) -> Path:
    """Writes base/ and clip/ under `folder` and returns it."""
    torch.manual_seed(0)
    tokenizer = learn_tokenizer(CAPTIONS, placeholder="sks")
    tokenizer.model_max_length = 24
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        ),
        text_encoder=CLIPTextModel(_text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "base")
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "projection_dim": 16}
    vision |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = _text_config(tokenizer).to_dict()
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / "clip")
    return folder


def tiny_booth(folder: Path, personalizer: type[Personalizer] = Personalizer) -> Personalizer:
    """The tiny model with trained parts drawn at random, gates open."""
    booth = personalizer.untrained(folder / "base", image_encoder=folder / "clip", device="cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in booth.trained.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return booth


def portrait(seed: int, size: int = 40) -> tuple[Image.Image, Image.Image]:
    """A coloured disc on noise, and its mask."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    disc = (x - size / 2) ** 2 + (y - size / 2) ** 2 < (size / 3) ** 2
    pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
    pixels[disc] = rng.integers(0, 255, 3, dtype=np.uint8)
    return Image.fromarray(pixels), Image.fromarray(disc.astype(np.uint8) * 255)


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def four_pictures(scene: Scene) -> Corpus:
    """Four held-out subjects in one scene, under captions of a cat."""
    seeds = [subject_seed("validation", number) for number in range(4)]
    pictures = [render(identity_of(seed), scene) for seed in seeds]
    return Corpus(
        images=np.stack([np.asarray(each.image) for each in pictures]),
        masks=np.stack([np.asarray(each.mask) for each in pictures]),
        identities=np.array(seeds),
        labels=np.zeros((4, 1), np.int64),
        captions=["a photo of a cat"] * 4,
        nouns=["cat"] * 4,
        descriptions=[""] * 4,
    )
