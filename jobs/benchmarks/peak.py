"""How much of a GPU's arithmetic the U-Net takes at a rate of pictures."""

from __future__ import annotations

import torch

from instantbooth import Concept, Personalizer
from instantbooth.config import GenerationDefaults
from instantbooth.model.denoise import denoise
from instantbooth.model.flops import PEAK_TFLOPS, flops_of, peak_flops

H100_TFLOPS = PEAK_TFLOPS["H100"]


def known_peak() -> float | None:
    """Dense bf16 TFLOP/s of this machine's GPU; None without one, or with one whose peak is not known."""
    peak = peak_flops(torch.cuda.get_device_name(), "bf16") if torch.cuda.is_available() else None
    return peak and peak / 1e12


@torch.inference_mode()
def unet_tflop(booth: Personalizer, concept: Concept) -> float:
    """10¹² floating-point operations of the U-Net and its adapters in one step of a picture, counted as they are done.

    A guided picture has two rows in a step, of which the adapters work on one.
    """
    [row] = booth.rows(booth.requests("a photo of a {subject}", concept, num_inference_steps=1))
    row.keys_values = booth.keys_values(concept)
    return flops_of(lambda: list(denoise(booth.base.unet, [row]))) / 1e12


def share_of_peak(pictures_per_s: float, tflop: float, defaults: GenerationDefaults, peak_tflops: float) -> float:
    """What the U-Net takes for pictures of these settings; `tflop` is of a step of one picture."""
    return pictures_per_s * defaults.num_inference_steps * tflop / peak_tflops
