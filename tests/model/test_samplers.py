"""The coefficient tables against diffusers' own schedulers, over whole trajectories of a nonlinear model."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from instantbooth.errors import ParameterError
from instantbooth.model.samplers import NoiseSchedule, sampler_step, sampler_table
from instantbooth.parameters import SAMPLERS

SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmsolver++": DPMSolverMultistepScheduler}
STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
# Float32 leaves at most 4e-6 between the two, measured over up to 333 steps.
TOLERANCE = 1e-5


def denoiser(latents, timestep):
    """A fixed nonlinear model of latents and time; latents [B, 3, H, W] of unit variance."""
    generator = torch.Generator().manual_seed(7)
    first, second = (torch.randn(shape, generator=generator) / 4 for shape in ((8, 3, 3, 3), (3, 8, 3, 3)))
    time = torch.sin(timestep.to(latents) / 1000 * torch.arange(1, 9)).view(1, 8, 1, 1)
    hidden = torch.tanh(torch.conv2d(latents, first.to(latents), padding=1) + time)
    return torch.conv2d(hidden, second.to(latents), padding=1)


def noise(seed=0):
    return torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def diffusers_trajectory(name, steps, config):
    """Latents after each step, in the variance preserving space."""
    scheduler = SCHEDULERS[name].from_config(config)
    scheduler.set_timesteps(steps)
    latents = noise() * scheduler.init_noise_sigma
    trajectory = []
    for index, timestep in enumerate(scheduler.timesteps):
        model_output = denoiser(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(model_output, timestep, latents).prev_sample
        scale = (scheduler.sigmas[index + 1] ** 2 + 1) ** -0.5 if name == "euler" else 1.0
        trajectory.append(scale * latents)
    return scheduler.timesteps.float(), torch.stack(trajectory)


def our_trajectory(name, steps, config, seed=0):
    table = sampler_table(name, steps, NoiseSchedule.from_config(config))
    latents = noise(seed) * table.initial_scale
    x0 = torch.zeros_like(latents)
    trajectory = []
    for step, timestep in enumerate(table.timesteps):
        latents, x0 = sampler_step(table.coefficients(step)[None], latents, denoiser(latents, timestep), x0)
        trajectory.append(latents)
    return table.timesteps, torch.stack(trajectory)


def assert_same_trajectory(name, steps, config):
    expected_timesteps, expected = diffusers_trajectory(name, steps, config)
    timesteps, actual = our_trajectory(name, steps, config)
    assert torch.equal(timesteps, expected_timesteps)
    error = (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < TOLERANCE, f"relative error by step: {error.tolist()}"


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 25, 50])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_trajectory_equals_diffusers(name, prediction_type, spacing, steps):
    config = STABLE_DIFFUSION | {"prediction_type": prediction_type, "timestep_spacing": spacing}
    assert_same_trajectory(name, steps, config)


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_equals_diffusers(name):
    config = STABLE_DIFFUSION | {
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    }
    assert_same_trajectory(name, 10, config)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_a_config_leaves_out_takes_the_default_of_each_diffusers_class(name):
    assert_same_trajectory(name, 10, {"clip_sample": False})


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.01, 0.02, 0.05, 0.2]},
    ],
)
def test_noise_levels_equal_diffusers(config):
    expected = DDIMScheduler.from_config(config).alphas_cumprod.double()
    torch.testing.assert_close(NoiseSchedule.from_config(config).alphas_cumprod, expected, rtol=1e-6, atol=0)


def test_rows_of_different_samplers_and_lengths_share_a_batch_unchanged():
    plans = [("ddim", 9), ("euler", 4), ("dpmsolver++", 6)]
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    tables = [sampler_table(name, steps, schedule) for name, steps in plans]
    latents = torch.cat([noise(seed) * table.initial_scale for seed, table in enumerate(tables)])
    previous_x0 = torch.zeros_like(latents)

    for step in range(9):
        rows = [row for row, table in enumerate(tables) if step < table.num_steps]
        coefficients = torch.stack([tables[row].coefficients(step) for row in rows])
        # One row at a time: a convolution rounds differently in another batch, and the claim is about the step.
        outputs = torch.cat([denoiser(latents[row : row + 1], tables[row].timesteps[step]) for row in rows])
        latents[rows], previous_x0[rows] = sampler_step(coefficients, latents[rows], outputs, previous_x0[rows])

    for row, (name, steps) in enumerate(plans):
        _, alone = our_trajectory(name, steps, STABLE_DIFFUSION, seed=row)
        assert torch.equal(latents[row], alone[-1, 0])


def test_half_precision_outputs_leave_latents_in_float32():
    coefficients = sampler_table("ddim", 4, NoiseSchedule.from_config(STABLE_DIFFUSION)).coefficients(0)[None]
    latents, x0 = sampler_step(coefficients, noise(), noise(1).bfloat16(), torch.zeros_like(noise()))
    assert latents.dtype == x0.dtype == torch.float32


@pytest.mark.parametrize("steps", [61, 103])
def test_trailing_spacing_takes_exactly_the_steps_asked_for(steps):
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION | {"timestep_spacing": "trailing"})
    for name in SAMPLERS:
        timesteps = sampler_table(name, steps, schedule).timesteps
        assert len(timesteps) == steps
        assert timesteps[0] == 999
        assert timesteps[-1] >= 0


@pytest.mark.parametrize(
    ("name", "steps", "config", "message"),
    [
        ("dpmsolver", 10, {}, "Did you mean 'dpmsolver\\+\\+'"),
        ("ddim", 0, {}, "num_inference_steps must be from 1 to 1000, the base's, is 0"),
        ("ddim", 1001, {}, "the base's, is 1001"),
        ("ddim", 1000, {"steps_offset": 1}, "use fewer steps"),
        ("dpmsolver++", 1000, {"timestep_spacing": "leading"}, "repeat timesteps"),
        ("ddim", 4, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "zero signal"),
        ("ddim", 4, {"beta_schedule": "laplace"}, "beta_schedule 'laplace' is unknown"),
        ("ddim", 4, {"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction' is unknown"),
        ("ddim", 4, {"timestep_spacing": "linespace"}, "Did you mean 'linspace'"),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(name, steps, config, message):
    with pytest.raises(ParameterError, match=message):
        sampler_table(name, steps, NoiseSchedule.from_config(config))
