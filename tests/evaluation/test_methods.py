"""The methods side by side: equal terms for all, and each of them learns what it is meant to learn, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from instantbooth import Personalizer
from instantbooth.errors import ImageError, ParameterError, PromptError
from instantbooth.evaluation.ip_adapter import weights
from instantbooth.evaluation.methods import dreambooth, textual_inversion
from instantbooth.evaluation.methods.dreambooth import DreamBooth, DreamBoothConfig
from instantbooth.evaluation.methods.finetuning import image_latents, noise_prediction_loss, reference_latents
from instantbooth.evaluation.methods.interface import Method, Reference, Sampling
from instantbooth.evaluation.methods.ip_adapter import IPAdapter, IPAdapterConfig
from instantbooth.evaluation.methods.personalizer import InstantBooth
from instantbooth.evaluation.methods.sampling import encode_prompts, sample
from instantbooth.evaluation.methods.textual_inversion import TextualInversion, TextualInversionConfig
from instantbooth.model.base import BaseModel
from instantbooth.model.denoise import unit_noise
from instantbooth.model.weights import tensors_digest
from tests.photographed import CPU, untrained_adapters
from tests.tiny import portrait, tiny_booth

SAMPLING = Sampling(num_inference_steps=2, guidance_scale=3.0)
PROMPTS = ["a photo of a {subject}", "a watercolor of a {subject} at the beach"]
SEEDS = [11, 5]


def references(count: int = 2) -> list[Reference]:
    return [Reference(image=image, mask=mask) for image, mask in (portrait(seed) for seed in range(count))]


def load_base(tiny: Path) -> BaseModel:
    return BaseModel.load(str(tiny / "base"), device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_adapters(tiny, tmp_path_factory.mktemp("ip_adapter"))


def build(name: str, tiny: Path, adapters: Path) -> Method[Any]:
    if name.startswith("instantbooth"):
        return InstantBooth(tiny_booth(tiny), SAMPLING, masked=name.endswith("masked"))
    base = load_base(tiny)
    if name == "textual inversion":
        return TextualInversion(base, SAMPLING, TextualInversionConfig(steps=2))
    if name.startswith("dreambooth"):
        rank = 2 if name.endswith("lora") else 0
        return DreamBooth(base, SAMPLING, DreamBoothConfig(steps=2, prior_pictures=2, lora_rank=rank))
    config = IPAdapterConfig(variant=name.removeprefix("ip-adapter "))
    return IPAdapter(base, tiny / "clip", adapters / config.variant / weights.FILE, SAMPLING, config)


NAMES = [
    "instantbooth",
    "instantbooth masked",
    "textual inversion",
    "dreambooth",
    "dreambooth lora",
    "ip-adapter global",
    "ip-adapter plus",
]


@contextmanager
def first_latents() -> Iterator[list[Tensor]]:
    """What U-Nets are given to denoise, whoever calls them."""
    from diffusers import UNet2DConditionModel

    seen: list[Tensor] = []

    def record(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, UNet2DConditionModel):
            seen.append(inputs[0].clone())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(record)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("name", NAMES)
def test_every_method_starts_on_the_noise_of_the_seeds(name: str, tiny: Path, adapters: Path) -> None:
    method = build(name, tiny, adapters)
    subject = method.fit(references(), "cat")
    with first_latents() as seen:
        pictures = method.generate(subject, PROMPTS, SEEDS)
    assert [picture.size for picture in pictures] == [(32, 32)] * 2
    assert len(seen) == SAMPLING.num_inference_steps
    noise = torch.stack([unit_noise(seed, (4, 16, 16), CPU) for seed in SEEDS])
    # Guidance denoises every row twice: under its prompt, and under none.
    assert torch.equal(seen[0], torch.cat([noise, noise]))


@pytest.mark.parametrize("name", NAMES)
def test_every_method_refuses_prompts_without_a_subject_and_references_without_a_picture(
    name: str, tiny: Path, adapters: Path
) -> None:
    method = build(name, tiny, adapters)
    with pytest.raises(PromptError, match="names no subject"):
        method.generate(method.fit(references(1), "cat"), ["a photo of a cat"], [0])
    with pytest.raises(ImageError, match="reference"):
        method.fit([], "cat")


def test_masked_input_needs_masks(tiny: Path, booth: Personalizer) -> None:
    bare = [Reference(image=each.image) for each in references()]
    with pytest.raises(ParameterError, match="2 of 2 references have no mask"):
        InstantBooth(booth, SAMPLING, masked=True).fit(bare, "cat")
    plain, masked = (InstantBooth(booth, SAMPLING, masked=each).fit(references(), "cat") for each in (False, True))
    assert plain.digest != masked.digest


def subject_loss(base: BaseModel, prompt_embeds: Tensor) -> float:
    """The denoising loss of the references, at the same noises and timesteps every time."""
    latents = reference_latents(base, references()).repeat(32, 1, 1, 1)
    with torch.no_grad():
        texts = prompt_embeds.expand(len(latents), -1, -1)
        return float(noise_prediction_loss(base, latents, texts, Generator().manual_seed(0)))


def test_textual_inversion_learns_an_embedding_and_changes_nothing_else(tiny: Path) -> None:
    base = load_base(tiny)
    before = [tensors_digest(module.state_dict()) for module in (base.unet, base.text_encoder)]
    method = TextualInversion(base, SAMPLING, TextualInversionConfig(steps=60, learning_rate=0.1))
    vector = method.fit(references(), "cat")
    assert [tensors_digest(module.state_dict()) for module in (base.unet, base.text_encoder)] == before
    caption = [textual_inversion.tokenize_subject(base.tokenizer, "a photo of a sks")]
    start = method._embedding_of("cat")
    assert start.shape == vector.shape == (32,)
    losses = [subject_loss(base, method._encode(caption, each)) for each in (start, vector)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("rank", [0, 4])
def test_dreambooth_learns_the_subject_in_a_copy_of_the_base(rank: int, tiny: Path) -> None:
    base = load_base(tiny)
    modules = (base.unet, base.text_encoder)
    before = [tensors_digest(module.state_dict()) for module in modules]
    config = DreamBoothConfig(steps=30, learning_rate=1e-2, prior_pictures=4, lora_rank=rank)
    tuned = DreamBooth(base, SAMPLING, config).fit(references(), "cat").base
    assert [tensors_digest(module.state_dict()) for module in modules] == before
    for own, theirs in ((tuned.unet, base.unet), (tuned.text_encoder, base.text_encoder)):
        own_state = own.state_dict()
        same = [torch.equal(own_state[name], value) for name, value in theirs.state_dict().items() if name in own_state]
        # LoRA leaves the base's own weights: what it learned lies beside them.
        assert all(same) if rank else not any(same[:2])
        assert rank == 0 or any("lora_B" in name and value.abs().sum() > 0 for name, value in own_state.items())
    with torch.no_grad():
        losses = [subject_loss(each, encode_prompts(each, ["a photo of a sks cat"])) for each in (base, tuned)]
    assert losses[1] < 0.95 * losses[0]


def test_prior_preservation_keeps_the_class_as_the_base_shows_it(tiny: Path) -> None:
    base, prompt = load_base(tiny), "a photo of a cat"
    shown = image_latents(base, sample(base, encode_prompts(base, [prompt]).expand(8, -1, -1), range(8), SAMPLING))
    losses = []
    for weight in (0.0, 3.0):
        config = DreamBoothConfig(steps=80, learning_rate=5e-3, prior_pictures=8, prior_weight=weight)
        tuned = DreamBooth(base, SAMPLING, config).fit(references(), "cat").base
        with torch.no_grad():
            texts = encode_prompts(tuned, [prompt] * 8)
            losses.append(float(noise_prediction_loss(tuned, shown, texts, Generator().manual_seed(0))))
    assert losses[1] < 0.9 * losses[0], losses


def test_a_prior_needs_pictures() -> None:
    with pytest.raises(ParameterError, match="prior_pictures must be at least 1"):
        dreambooth.DreamBoothConfig(prior_pictures=0)
