"""Noising, and the denoising loss (equation 1 of the paper)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from instantbooth.model.samplers import NoiseSchedule


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Noisy latents at `timesteps` [B], and what the U-Net should predict of them (its prediction type's target).

    Timesteps on the CPU spare a GPU a wait.
    """
    alpha, sigma = signal_and_noise(timesteps, schedule, latents)
    noisy = alpha * latents + sigma * noise
    targets = {"epsilon": noise, "v_prediction": alpha * noise - sigma * latents, "sample": latents}
    return noisy, targets[schedule.prediction_type]


def signal_and_noise(timesteps: Tensor, schedule: NoiseSchedule, like: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ [B, 1, 1, 1] at integer timesteps."""
    kept = schedule.alphas_cumprod[timesteps.cpu()].view(-1, 1, 1, 1)
    return kept.sqrt().to(like), (1 - kept).sqrt().to(like)


def denoising_loss(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """L = E ‖target − prediction‖²; with weights [B, 1, h, w] or [B, 1, 1, 1], the weighted squares' mean."""
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    return errors.mean() if weights is None else (errors * weights).mean()


def subject_weights(covered: Tensor, background_weight: float) -> Tensor:
    """Weights [B, 1, h, w] of mean 1 in every picture, from the share of each latent pixel that the subject covers.

    A pixel without the subject has `background_weight` times the weight of one that is all subject.
    """
    weights = background_weight + (1 - background_weight) * covered
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-3)


def draw_timesteps(rows: int, schedule: NoiseSchedule, generator: torch.Generator) -> Tensor:
    """Uniform integer timesteps [rows], on the CPU."""
    return torch.randint(schedule.num_train_timesteps, (rows,), generator=generator)
