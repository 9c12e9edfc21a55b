"""One U-Net step of guided requests: bare, with adapters on saved keys and values, with the equation computed anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from instantbooth import Concept, Personalizer
from instantbooth.errors import ParameterError
from instantbooth.machine import machine
from instantbooth.model.adapter import GatedAdapter, References, adapter_kwargs, attach
from instantbooth.model.base import device_of
from instantbooth.model.conditioning import batch_references, concept_keys_values
from instantbooth.model.loading import DTYPES, Precision
from jobs import cli
from jobs.benchmarks.timing import measure
from jobs.goals import at_most, conclude

SD15_TOKENS = (257, 77)
"""Of a reference image, and of a prompt."""
REFERENCE_COUNTS = (1, 3, 5)
MOST_OVER_BARE = 1.15


@dataclass(frozen=True, kw_only=True)
class AdapterBenchmark:
    """What the adapters add to a U-Net step."""

    full_size: bool = False
    """Stable Diffusion 1.5's shapes at 512 pixels with random weights, instead of the miniature."""
    requests: int = 4
    """Requests in the step; each costs two rows, one of them unconditional."""
    repeats: int = 15
    """Runs of each variant, after one to warm up."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Precision = "bf16" if torch.cuda.is_available() else "fp32"
    """In which numbers the U-Net and the adapters compute."""

    def __post_init__(self) -> None:
        for name in ("requests", "repeats"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} must be at least 1, is {getattr(self, name)}; raise it")


class WrittenOut(nn.Module):
    """An adapter that computes the paper's equation anew at every step, for the rows that have references."""

    def __init__(self, adapter: GatedAdapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, hidden_states: Tensor, references: References) -> Tensor:
        """As GatedAdapter.forward, from patch features."""
        covered = len(references.scale)
        features = references.patch_features
        assert features is not None
        updated = self.adapter.equation(hidden_states[:covered], features, references.scale)
        return torch.cat([updated, hidden_states[covered:]])


def adapter(options: cli.Flat[AdapterBenchmark]) -> None:
    """Prints the ratios and the medians behind them as JSON; exit status 1 where a goal is missed."""
    device, dtype = device_of(options.device), DTYPES[options.precision]
    unet, (tokens, prompt_tokens) = (
        (_full_size_unet(device, dtype), SD15_TOKENS) if options.full_size else _miniature_unet(device, dtype)
    )
    adapters = attach(unet, int(unet.config.cross_attention_dim)).requires_grad_(False)
    variants = variants_of(unet, adapters, requests=options.requests, tokens=tokens, prompt_tokens=prompt_tokens)
    medians = measure(variants, options.repeats, device)
    over_bare = {n: round(medians[f"saved_{n}"] / medians["bare"], 3) for n in REFERENCE_COUNTS}
    over_equation = {n: round(medians[f"saved_{n}"] / medians[f"equation_{n}"], 3) for n in REFERENCE_COUNTS}
    conclude(
        {
            "model": "Stable Diffusion 1.5 shapes at 512" if options.full_size else "miniature",
            "machine": machine(options.device),
            "precision": options.precision,
            "requests": options.requests,
            "saved_over_bare": over_bare,
            "saved_over_equation": over_equation,
            "median_milliseconds": {name: round(1000 * value, 1) for name, value in medians.items()},
        },
        {
            "saved over bare, one reference": at_most(over_bare[1], MOST_OVER_BARE),
            "saved over equation": at_most(max(over_equation.values()), 1.0),
        },
    )


def variants_of(
    unet: UNet2DConditionModel, adapters: nn.ModuleDict, *, requests: int, tokens: int, prompt_tokens: int
) -> dict[str, Callable[[], Tensor]]:
    """The steps to measure: "bare", and "saved_n" and "equation_n" for n reference images of `tokens` each.

    All see the same random input; each returns what the U-Net predicts, [2 · requests, C, h, w].
    """
    rows, width = 2 * requests, int(unet.config.cross_attention_dim)
    side, channels = int(unet.config.sample_size), int(unet.config.in_channels)
    new = partial(torch.randn, device=unet.device, dtype=unet.dtype)
    sample, text = new(rows, channels, side, side), new(rows, prompt_tokens, width)
    timesteps = torch.full((rows,), 500, device=unet.device)

    def step(kwargs: dict[str, object] | None) -> Callable[[], Tensor]:
        return lambda: unet(sample, timesteps, text, cross_attention_kwargs=kwargs).sample

    variants = {"bare": step(None)}
    for count in REFERENCE_COUNTS:
        features = new(requests, count * tokens, width)
        scale = torch.ones(requests, 1, 1, device=unet.device, dtype=unet.dtype)
        concepts = [concept_keys_values(adapters, _concept(each)) for each in features]
        saved = step(adapter_kwargs(batch_references(concepts, scale)))
        variants[f"saved_{count}"] = _with_fusers(unet, adapters, saved, written_out=False)
        anew = step(adapter_kwargs(References(scale=scale, patch_features=features)))
        variants[f"equation_{count}"] = _with_fusers(unet, adapters, anew, written_out=True)
    return variants


def _with_fusers(
    unet: UNet2DConditionModel, adapters: nn.ModuleDict, variant: Callable[[], Tensor], *, written_out: bool
) -> Callable[[], Tensor]:
    blocks = {
        block.fuser.layer: block for block in unet.modules() if isinstance(getattr(block, "fuser", None), GatedAdapter)
    }
    fusers = {layer: WrittenOut(adapter) if written_out else adapter for layer, adapter in adapters.items()}

    def prepared() -> Tensor:
        for layer, block in blocks.items():
            block.fuser = fusers[layer]
        return variant()

    return prepared


def _concept(patch_features: Tensor) -> Concept:
    return Concept(
        concept_embedding=patch_features[:1],
        patch_features=patch_features,
        class_noun="person",
        encoder_digest="",
        image_digests=("",),
        created="",
    )


def _miniature_unet(device: torch.device, dtype: torch.dtype) -> tuple[UNet2DConditionModel, tuple[int, int]]:
    booth = Personalizer.from_pretrained("miniature", device=device, dtype=dtype)
    return booth.base.unet, (booth.image_encoder.num_tokens, booth.base.tokenizer.model_max_length)


def _full_size_unet(device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    torch.manual_seed(0)
    with device:
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return unet.eval().to(dtype)
