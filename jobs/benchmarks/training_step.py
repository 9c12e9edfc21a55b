"""The step of a training alone, eager and compiled, beside the step of diffusers' own text-to-image training."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel

from instantbooth import Personalizer
from instantbooth.model.flops import flops_of, peak_flops
from instantbooth.training.adapters import AdapterTrainingConfig, ExamplePreparer, unpacked
from instantbooth.training.session import ComputeConfig, TrainingSession

Step = Callable[[], object]
WARM = 3
"""Steps before the clock starts: compilation, and cuDNN's search for its algorithms."""


def compare_steps(
    base: Path, image_encoder: Path, *, batch_size: int, steps: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Variant → samples_per_second, and on a GPU peak_memory_mb and flops_utilisation. All in bf16."""
    batch = examples(base, image_encoder, batch_size)
    variants: dict[str, Callable[[], Step]] = {
        "eager": partial(our_step, base, image_encoder, batch, device, compiled=False),
        "diffusers": lambda: diffusers_step(base, batch, device)[0],
        # Last: what is compiled may keep its model in memory.
        "compiled": partial(our_step, base, image_encoder, batch, device, compiled=True),
    }
    return {name: measured_step(make, batch_size, steps, device) for name, make in variants.items()}


def examples(base: Path, image_encoder: Path, count: int) -> dict[str, Tensor]:
    """A batch as the feed makes it, of noise with a square for its subject."""
    preparer = ExamplePreparer.for_model(str(base), str(image_encoder))
    side = preparer.image_size
    mask = Image.new("L", (side, side))
    mask.paste(255, (side // 4, side // 4, side * 3 // 4, side * 3 // 4))
    made = []
    for number in range(count):
        rng = np.random.default_rng(number)
        image = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        example = preparer(image=image, mask=mask, caption="a photo of a {subject}", noun="person", rng=rng)
        made.append(example | {"position": np.int64(number)})
    return unpacked({name: torch.from_numpy(np.stack([each[name] for each in made])) for name in made[0]})


def our_step(
    base: Path, image_encoder: Path, batch: dict[str, Tensor], device: torch.device, *, compiled: bool
) -> Step:
    """The step that jobs.train makes: adapters and encoders learn, everything else is frozen."""
    booth = Personalizer.untrained(base, image_encoder=image_encoder, device=device)
    config = AdapterTrainingConfig(batch_size=len(batch["position"]))
    session = TrainingSession(booth=booth, config=config, compute=ComputeConfig(compile=compiled))
    return lambda: session.advance(batch)


def diffusers_step(base: Path, batch: dict[str, Tensor], device: torch.device) -> tuple[Step, UNet2DConditionModel]:
    """The step of diffusers' examples/text_to_image: the U-Net learns in float32 under autocast, the rest is bf16."""
    half = torch.bfloat16
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae", torch_dtype=half).to(device).requires_grad_(False)
    text = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=half).to(device).requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32).to(device).train()
    schedule = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)
    pixels, ids = batch["pixel_values"].to(device, half), batch["input_ids"].to(device)

    def step() -> None:
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(schedule.config.num_train_timesteps, (len(latents),), device=device)
        noisy = schedule.add_noise(latents, noise, timesteps)
        with torch.autocast(device.type, dtype=half):
            prediction = unet(noisy, timesteps, text(ids)[0]).sample
        F.mse_loss(prediction.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, unet


def measured_step(make: Callable[[], Step], batch_size: int, steps: int, device: torch.device) -> dict[str, float]:
    """What `compare_steps` says of one variant, alone in memory."""
    gc.collect()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step = make()
    for _ in range(WARM):
        step()
    seconds = _seconds(step, steps, device) / steps
    result = {"samples_per_second": round(batch_size / seconds, 2)}
    if on_gpu:
        result["peak_memory_mb"] = float(torch.cuda.max_memory_allocated(device) // 2**20)
        if peak := peak_flops(torch.cuda.get_device_name(device), "bf16"):
            result["flops_utilisation"] = round(flops_of(step) / seconds / peak, 3)
    return result


def _seconds(step: Step, steps: int, device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began = now()
    for _ in range(steps):
        step()
    return now() - began
