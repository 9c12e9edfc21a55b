"""The miniature's VAE: 64×64×3 pixels to 16×16×8 latents, in diffusers' AutoencoderKL."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Generator, Tensor, nn

from instantbooth.miniature.corpus import Corpus
from instantbooth.training.attention import write_out_attention
from instantbooth.training.loop import LoopConfig, train

LATENT_CHANNELS = 8
LATENT_SIDE = 16
KL_WEIGHT = 1e-6
EDGE_WEIGHT = 1.0
"""Weight of the difference of image gradients: without it eyes and night windows dissolve."""
COLOR_WEIGHT = 1.0
"""Weight of the difference of 8-pixel averages: without it the colours of large areas are learned last."""
SUBJECT_WEIGHT = 2.0
"""Weight of the subject's pixels against the background's 1."""


def new_vae() -> AutoencoderKL:
    """An untrained VAE of 1.7 M parameters."""
    return AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )


def train_vae(corpus: Corpus, config: LoopConfig, *, folder: Path, device: torch.device) -> AutoencoderKL:
    """Fits L1 on pixels and on their gradients, with a slight pull of the latents to a unit normal."""
    vae = new_vae().to(device)
    write_out_attention(vae)
    images, masks = torch.from_numpy(corpus.images), torch.from_numpy(corpus.masks)

    def draw(examples: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(corpus), (examples,), generator=generator)
        noise = torch.randn((examples, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE), generator=generator)
        return images[rows], masks[rows], noise

    def loss(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        shown, covered, noise = (part.to(device) for part in batch)
        pixels = to_pixels(shown)
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        value: Tensor = reconstruction_loss(decoded, pixels, covered) + KL_WEIGHT * posterior.kl().mean()
        return value

    train("vae", vae, draw, loss, config, folder=folder, device=device)
    sample = encode_latents(vae, images[:1024])
    vae.register_to_config(scaling_factor=round(1 / float(sample.std()), 4))
    return vae


def train_decoder(vae: AutoencoderKL, corpus: Corpus, latents: Tensor, config: LoopConfig, *, folder: Path) -> None:
    """Goes on with the decoder alone, as was done for Stable Diffusion's VAE: the latents stay what they are.

    `latents` [N, 8, h, w] are the corpus's, scaled.
    """
    write_out_attention(vae)
    images, masks = torch.from_numpy(corpus.images), torch.from_numpy(corpus.masks)
    trained = nn.ModuleList([vae.decoder, vae.post_quant_conv])

    def draw(examples: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(corpus), (examples,), generator=generator)
        return images[rows], masks[rows], latents[rows] / vae.config.scaling_factor

    def loss(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        shown, covered, encoded = (part.to(vae.device) for part in batch)
        return reconstruction_loss(vae.decode(encoded).sample, to_pixels(shown), covered)

    trained.requires_grad_(True)
    train("decoder", trained, draw, loss, config, folder=folder, device=vae.device)
    trained.requires_grad_(False)


def reconstruction_loss(decoded: Tensor, pixels: Tensor, masks: Tensor) -> Tensor:
    """L1 on pixels, on their gradients and on large areas; `masks` uint8 [N, H, W] weigh the subject more."""
    weight = 1 + (SUBJECT_WEIGHT - 1) * (masks > 127).float()[:, None]
    difference = decoded.float() - pixels
    edges = (difference.diff(dim=-1).abs() * weight[..., 1:]).mean() + (
        difference.diff(dim=-2).abs() * weight[..., 1:, :]
    ).mean()
    colors = F.avg_pool2d(difference, 8).abs().mean()
    return (difference.abs() * weight).mean() + COLOR_WEIGHT * colors + EDGE_WEIGHT * edges


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in −1 … 1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: Tensor, *, batch_size: int = 64) -> Tensor:
    """Unscaled mean latents [N, 8, H/4, W/4] of uint8 images [N, H, W, 3], on the CPU."""
    batches = [vae.encode(to_pixels(batch).to(vae.device)).latent_dist.mean.cpu() for batch in images.split(batch_size)]
    return torch.cat(batches)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of encoding and decoding uint8 images [N, H, W, 3]."""
    pixels = to_pixels(images).to(vae.device)
    restored = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    return float(10 * torch.log10(4 / F.mse_loss(restored, pixels)))
