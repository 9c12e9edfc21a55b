"""DDIM, Euler and DPM-Solver++ (2M) as tables of coefficients: one row of a batch, one request.

Latents stay in the variance preserving space, x = alpha * x0 + sigma * noise with alpha² + sigma² = 1, which is what
the U-Net expects of all three samplers. There, every step of every one of them reads

    x0 = x0_from_sample * x + x0_from_output * model_output
    x  = sample * x + x0_weight * x0 + x0_previous * x0_of_the_step_before

so a batch may mix samplers, numbers of steps and positions within them, and still steps in one vector expression.

DDIM with eta = 0 (arXiv 2010.02502, eq. 12), Euler on the probability flow ODE (arXiv 2206.00364) and the first order
of DPM-Solver++ (arXiv 2211.01095) are the same update in this space. They differ in the timesteps they visit, in the
noise level they end on, and in Euler's initial scale; DPM-Solver++ adds the second order term. Timesteps and noise
levels follow diffusers' `DDIMScheduler`, `EulerDiscreteScheduler` and `DPMSolverMultistepScheduler`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instantbooth.errors import ParameterError, did_you_mean
from instantbooth.parameters import SAMPLERS

PREDICTION_TYPES: tuple[str, ...] = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS: tuple[str, ...] = ("leading", "linspace", "trailing")
BETA_SCHEDULES: tuple[str, ...] = ("linear", "scaled_linear", "squaredcos_cap_v2")

_DEFAULT_SPACING = {"ddim": "leading", "euler": "linspace", "dpmsolver++": "linspace"}
# Stands for 0 at the end of a schedule of zero terminal SNR, where sigma / alpha would be infinite (diffusers' figure).
_SMALLEST_ALPHA_CUMPROD = 2.0**-24


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """The noise levels a model was trained on, and how its samplers are to visit them.

    Raises ParameterError for an unknown prediction type or timestep spacing.
    """

    alphas_cumprod: Tensor
    """alpha² of every training timestep, float64 [num_train_timesteps], falling; the last one may be 0."""
    prediction_type: str = "epsilon"
    """What the model's output is: "epsilon", "v_prediction" or "sample"."""
    timestep_spacing: str | None = None
    """One of TIMESTEP_SPACINGS; None is each sampler's own default: "leading" for DDIM, "linspace" for the rest."""
    steps_offset: int = 0
    """Added to every timestep under "leading" spacing."""
    set_alpha_to_one: bool = True
    """Whether DDIM ends on noise level 0, or on the lowest one of training. The other two always end on 0."""

    def __post_init__(self) -> None:
        _check_known("prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.timestep_spacing is not None:
            _check_known("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """From the content of a diffusers `scheduler_config.json`, whichever scheduler wrote it.

        Read are the betas (`beta_schedule`, `beta_start`, `beta_end`, `num_train_timesteps`, `trained_betas`,
        `rescale_betas_zero_snr`), `prediction_type`, `timestep_spacing`, `steps_offset` and `set_alpha_to_one`; what is
        missing takes diffusers' default. `clip_sample` and `thresholding` count as False: latents have no bounds to
        clip to. Variants of a sampler (Karras sigmas, other orders, a last sigma above 0) are not offered: not read.

        Raises ParameterError for a beta schedule, prediction type or spacing that is not supported.
        """
        betas = _betas(config)
        if config.get("rescale_betas_zero_snr"):
            betas = _rescale_to_zero_terminal_snr(betas)
        return cls(
            # In float32, as in training by diffusers: these roundings are part of the noise levels the model knows.
            alphas_cumprod=torch.cumprod(1.0 - betas, dim=0).double(),
            prediction_type=config.get("prediction_type", cls.prediction_type),
            timestep_spacing=config.get("timestep_spacing", cls.timestep_spacing),
            steps_offset=config.get("steps_offset", cls.steps_offset),
            set_alpha_to_one=config.get("set_alpha_to_one", cls.set_alpha_to_one),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplerTable:
    """The plan of one row: for each of its steps, the timestep and the five coefficients. All tensors float32 [steps].

    Tables are cached and shared: do not write into them.
    """

    timesteps: Tensor
    """What the model is told; not whole numbers for Euler under "linspace" spacing."""
    x0_from_sample: Tensor
    x0_from_output: Tensor
    sample: Tensor
    x0: Tensor
    x0_previous: Tensor
    """Weight of the step before's x0; 0 at the first step, and throughout for DDIM and Euler."""
    initial_scale: float
    """What standard normal noise is multiplied by to become the first latents."""

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def coefficients(self, step: int) -> Tensor:
        """The row [5] that `sampler_step` takes for this step, in the order of the fields."""
        columns = (self.x0_from_sample, self.x0_from_output, self.sample, self.x0, self.x0_previous)
        return torch.stack([column[step] for column in columns])


def sampler_step(
    coefficients: Tensor, latents: Tensor, model_output: Tensor, previous_x0: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of every row: (next latents, x0), both [B, C, H, W].

    `coefficients` [B, 5] holds each row's `SamplerTable.coefficients` and lies on the device of the rest. `previous_x0`
    is what the step before returned, zeros at first. Keep latents in float32: the widest type given is the type
    returned, so a model output of half precision does no harm.
    """
    x0_from_sample, x0_from_output, sample, x0_weight, x0_previous = coefficients[..., None, None, None].unbind(1)
    x0 = x0_from_sample * latents + x0_from_output * model_output
    return sample * latents + x0_weight * x0 + x0_previous * previous_x0, x0


@lru_cache(maxsize=256)
def sampler_table(name: str, num_inference_steps: int, schedule: NoiseSchedule) -> SamplerTable:
    """The plan of `num_inference_steps` steps with one of `SAMPLERS`.

    Raises ParameterError for an unknown name, for a number of steps the schedule cannot be visited in, and where DDIM
    would start an epsilon model on noise level 1, which tells nothing of x0.
    """
    _check_known("sampler", name, SAMPLERS)
    timesteps = _timesteps(name, num_inference_steps, schedule)
    if name == "ddim":
        levels, next_levels = _ddim_levels(timesteps, schedule)
    else:
        levels, next_levels = _interpolated_levels(timesteps, schedule)
    if schedule.prediction_type == "epsilon" and (levels.alpha == 0).any():
        raise ParameterError(
            "the base predicts epsilon, which cannot start DDIM on zero signal, where its schedule of zero terminal "
            "SNR ends; use a v_prediction model, or the sampler 'euler' or 'dpmsolver++'"
        )

    sample = next_levels.sigma / levels.sigma
    x0 = next_levels.alpha - sample * levels.alpha
    correction = _second_order(levels, next_levels) * x0 if name == "dpmsolver++" else torch.zeros_like(x0)
    x0_from_sample, x0_from_output = _x0_weights(schedule.prediction_type, levels)
    # diffusers' Euler scales its noise by s = sigma / alpha, or by sqrt(s² + 1) under "leading": here sigma, or 1.
    scaled_by_sigma = name == "euler" and _spacing(name, schedule) != "leading"
    return SamplerTable(
        timesteps=torch.from_numpy(timesteps),
        x0_from_sample=x0_from_sample.float(),
        x0_from_output=x0_from_output.float(),
        sample=sample.float(),
        x0=(x0 + correction).float(),
        x0_previous=(-correction).float(),
        initial_scale=levels.sigma[0].item() if scaled_by_sigma else 1.0,
    )


@dataclass(frozen=True, kw_only=True)
class _Levels:
    """Noise levels, one a step: alpha and sigma, float64 [steps], alpha² + sigma² = 1."""

    alpha: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, alphas_cumprod: Tensor) -> _Levels:
        return cls(alpha=alphas_cumprod.sqrt(), sigma=(1 - alphas_cumprod).sqrt())


def _ddim_levels(timesteps: np.ndarray, schedule: NoiseSchedule) -> tuple[_Levels, _Levels]:
    """Levels of DDIM's steps, before and after; its target lies a fixed stride below, whatever the next timestep is."""
    visited = torch.from_numpy(timesteps).long()
    targets = visited - schedule.num_train_timesteps // len(timesteps)
    final = 1.0 if schedule.set_alpha_to_one else schedule.alphas_cumprod[0].item()
    after = schedule.alphas_cumprod[targets.clamp(min=0)].masked_fill(targets < 0, final)
    return _Levels.of(schedule.alphas_cumprod[visited]), _Levels.of(after)


def _interpolated_levels(timesteps: np.ndarray, schedule: NoiseSchedule) -> tuple[_Levels, _Levels]:
    """Levels of Euler's and DPM-Solver++'s steps, before and after: sigma / alpha is linear between timesteps."""
    alphas_cumprod = schedule.alphas_cumprod.masked_fill(schedule.alphas_cumprod == 0, _SMALLEST_ALPHA_CUMPROD)
    ratios = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().numpy()
    visited = np.interp(timesteps, np.arange(len(ratios)), ratios)
    ratio = torch.from_numpy(np.append(visited, 0.0))
    alpha = (ratio.square() + 1).rsqrt()
    sigma = ratio * alpha
    return _Levels(alpha=alpha[:-1], sigma=sigma[:-1]), _Levels(alpha=alpha[1:], sigma=sigma[1:])


def _second_order(levels: _Levels, next_levels: _Levels) -> Tensor:
    """Half of h / h_previous, h being the stride in log(alpha / sigma): DPM-Solver++ 2M's midpoint rule [steps].

    0 at the first step, which has no x0 before it, and at the last, whose stride is infinite.
    """
    stride = (next_levels.alpha / next_levels.sigma).log() - (levels.alpha / levels.sigma).log()
    half = torch.zeros_like(stride)
    half[1:-1] = 0.5 * stride[1:-1] / stride[:-2]
    return half


def _x0_weights(prediction_type: str, levels: _Levels) -> tuple[Tensor, Tensor]:
    """Weights of the sample and of the model's output in x0, [steps] each."""
    if prediction_type == "epsilon":
        return 1 / levels.alpha, -levels.sigma / levels.alpha
    if prediction_type == "v_prediction":
        return levels.alpha, -levels.sigma
    return torch.zeros_like(levels.alpha), torch.ones_like(levels.alpha)


def _timesteps(name: str, steps: int, schedule: NoiseSchedule) -> np.ndarray:
    """The timesteps visited, falling, float32 [steps]."""
    total = schedule.num_train_timesteps
    if not 1 <= steps <= total:
        raise ParameterError(f"num_inference_steps must be from 1 to {total}, the base's, is {steps}; change it")
    # DPM-Solver++ spreads one point more than it has steps, and leaves out the lowest.
    points = steps + 1 if name == "dpmsolver++" else steps
    spacing = _spacing(name, schedule)
    if spacing == "trailing":
        # Rounding lets arange run one point too far for some numbers of steps (61 of 1000), where diffusers takes an
        # extra step at timestep -1; the cut below drops it.
        falling = np.arange(total, 0, -total / steps).round() - 1
    elif spacing == "leading":
        falling = (np.arange(points) * (total // points) + schedule.steps_offset)[::-1]
    else:
        falling = np.linspace(0, total - 1, points)[::-1]
        falling = falling if name == "euler" else falling.round()
    timesteps = falling[:steps].astype(np.float32)
    if timesteps[0] > total - 1 or (np.diff(timesteps) >= 0).any():
        raise ParameterError(
            f"num_inference_steps is {steps}: with {spacing!r} spacing, {name!r} would repeat timesteps or leave the "
            f"{total} of training; use fewer steps"
        )
    return timesteps


def _spacing(name: str, schedule: NoiseSchedule) -> str:
    return schedule.timestep_spacing or _DEFAULT_SPACING[name]


def _betas(config: Mapping[str, Any]) -> Tensor:
    """Variances of the noise added at each training timestep, float32 [num_train_timesteps]."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    name = config.get("beta_schedule", "linear")
    _check_known("beta_schedule", name, BETA_SCHEDULES)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    total: int = config.get("num_train_timesteps", 1000)
    if name == "linear":
        return torch.linspace(start, end, total, dtype=torch.float32)
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, total, dtype=torch.float32).square()
    time = torch.arange(total + 1, dtype=torch.float64) / total
    alphas_cumprod = ((time + 0.008) / 1.008 * torch.pi / 2).cos().square()
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999).float()


def _rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas shifted so that the last timestep is pure noise (arXiv 2305.08891, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0], root[-1]
    alphas_cumprod = ((root - last) * (first / (first - last))).square()
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


def _check_known(parameter: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ParameterError(f"{parameter} {name!r} is unknown. {did_you_mean(name, known)}")
