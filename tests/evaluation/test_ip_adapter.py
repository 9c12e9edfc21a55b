"""IP-Adapter's weights are the authors': diffusers' own pipeline loads them and makes the same pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from instantbooth.errors import ParameterError, WeightsError
from instantbooth.evaluation.ip_adapter import weights
from instantbooth.evaluation.ip_adapter.origin import MODELS, check_origin, trained_for
from instantbooth.evaluation.ip_adapter.training import IPAdapterObjective
from instantbooth.evaluation.methods.interface import Reference, Sampling
from instantbooth.evaluation.methods.ip_adapter import IPAdapter, IPAdapterConfig
from instantbooth.images import subject_square
from instantbooth.miniature.ip_adapter import train_ip_adapter
from instantbooth.miniature.recipe import RECIPES
from instantbooth.miniature.world import Scene
from instantbooth.model.base import BaseModel
from instantbooth.model.denoise import unit_noise
from instantbooth.model.encoders import ImageEncoder
from instantbooth.model.record import RECORD
from instantbooth.model.weights import tensors_digest
from instantbooth.presets import miniature_folder, peers_folder
from instantbooth.prompts import tokenize
from instantbooth.training.adapters import AdapterTrainingConfig, Draws, draw
from jobs.train_ip_adapter import IPAdapterJob, check_record, plan, run
from tests.tiny import four_pictures, portrait

CPU = torch.device("cpu")
STEPS = 4


def objective(tiny: Path, variant: str, **settings: float) -> IPAdapterObjective:
    base = BaseModel.load(str(tiny / "base"), device=CPU, dtype=torch.float32)
    encoder = ImageEncoder(tiny / "clip", patch_layer=weights.PLUS_LAYER, device=CPU, dtype=torch.float32)
    return IPAdapterObjective(base, encoder, variant, AdapterTrainingConfig(**settings))


def batch(trained: IPAdapterObjective) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(4, 4, 16, 16, generator=generator),
        "reference_pixels": torch.rand(4, 3, 32, 32, generator=generator),
        "subject_mask": torch.rand(4, 1, 16, 16, generator=generator),
        "input_ids": torch.tensor([tokenize(trained.base.tokenizer, "a photo of a cat")] * 4),
    }


def draws_of(trained: IPAdapterObjective) -> Draws:
    return draw(trained.base, trained.config, 4, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("variant", weights.VARIANTS)
def test_diffusers_own_pipeline_makes_the_same_pictures_of_the_saved_file(
    variant: str, tiny: Path, tmp_path: Path
) -> None:
    trained = objective(tiny, variant)
    with torch.no_grad():
        for parameter in trained.trained[1:].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    weights.save(trained.state(), tmp_path / weights.FILE)

    base = BaseModel.load(str(tiny / "base"), device=CPU, dtype=torch.float32)
    sampling = Sampling(sampler="ddim", num_inference_steps=STEPS, guidance_scale=3.0)
    config = IPAdapterConfig(variant=variant, scale=0.7)
    method = IPAdapter(base, tiny / "clip", tmp_path / weights.FILE, sampling, config)
    subjects = [
        [Reference(image=image, mask=mask) for image, mask in map(portrait, seeds)] for seeds in ((0, 1), (2, 3))
    ]
    ours = [method.generate(method.fit(each, "cat"), ["a photo of a {subject}"], [9])[0] for each in subjects]
    assert np.abs(np.asarray(ours[0], int) - np.asarray(ours[1], int)).mean() > 1, "the references change nothing"

    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny / "base",
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(tiny / "clip"),
        feature_extractor=CLIPImageProcessor.from_pretrained(tiny / "clip"),
        safety_checker=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_ip_adapter(str(tmp_path), subfolder="", weight_name=weights.FILE)
    pipeline.set_ip_adapter_scale(0.7)
    squares = [subject_square(each.image, each.mask).resize((32, 32), 3) for each in subjects[0]]
    theirs = pipeline(
        "a photo of a cat",
        ip_adapter_image=[squares],
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        latents=unit_noise(9, (1, 4, 16, 16), CPU),
    ).images[0]
    # Eight bits a channel: rounding may differ by one.
    assert np.abs(np.asarray(ours[0], int) - np.asarray(theirs, int)).max() <= 1


@pytest.mark.parametrize("variant", weights.VARIANTS)
def test_training_reaches_the_adapter_alone_and_lowers_its_loss(variant: str, tiny: Path) -> None:
    trained = objective(tiny, variant, text_dropout=0.0, image_dropout=0.3)
    examples = batch(trained)
    optimizer = torch.optim.AdamW(trained.trained.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = trained(examples, draws_of(trained))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < losses[0]
    reached = {id(p) for p in trained.parameters() if p.grad is not None}
    assert reached == {id(p) for p in trained.trained.parameters()}


def test_dropped_pictures_have_the_features_of_none(tiny: Path) -> None:
    for variant in weights.VARIANTS:
        trained = objective(tiny, variant, text_dropout=0.0, image_dropout=1.0)
        examples = batch(trained)
        losses = [
            trained(examples | {"reference_pixels": pixels}, draws_of(trained)).item()
            for pixels in (examples["reference_pixels"], 1 - examples["reference_pixels"])
        ]
        assert losses[0] == losses[1]


def test_wrong_files_are_refused(tiny: Path, tmp_path: Path) -> None:
    state = objective(tiny, "plus").state()
    weights.save(state, tmp_path / "plus.safetensors")
    with pytest.raises(WeightsError, match=r"no IP-Adapter of the variant 'global'"):
        weights.load(tmp_path / "plus.safetensors", "global")
    with pytest.raises(WeightsError, match=r"jobs\.train_ip_adapter"):
        weights.load(tmp_path / "absent.safetensors", "plus")
    narrow = {name: tensor[:8] for name, tensor in state["ip_adapter"].items()}
    base = BaseModel.load(str(tiny / "base"), device=CPU, dtype=torch.float32)
    with pytest.raises(WeightsError, match="does not fit the base"):
        weights.check_fits(base.unet, state | {"ip_adapter": narrow}, tmp_path)
    weights.check_reads(tiny / "clip", state, tmp_path)
    with pytest.raises(WeightsError, match=r"proj_in\.weight is \(32, 24\), .* width \d+; name the CLIP"):
        weights.check_reads(miniature_folder() / "clip", state, tmp_path)
    with pytest.raises(WeightsError, match="no CLIP image encoder"):
        weights.check_reads(tmp_path, state, tmp_path)
    encoder = ImageEncoder(tiny / "clip", patch_layer=weights.PLUS_LAYER, device=CPU, dtype=torch.float32)
    with pytest.raises(WeightsError, match=r"Did you mean 'plus'"):
        weights.new_state(base.unet, encoder, "pluss")


def test_an_adapter_of_another_base_is_refused_and_one_without_a_record_is_not(tiny: Path, tmp_path: Path) -> None:
    file, record = tmp_path / weights.FILE, tmp_path / RECORD
    check_origin(file, tiny / "base", tiny / "clip")
    record.write_text(json.dumps({MODELS: trained_for(tiny / "base", tiny / "clip")}))
    check_origin(file, tiny / "base", tiny / "clip")
    other = miniature_folder()
    with pytest.raises(WeightsError, match=r"trained for another tokenizer .* jobs\.train_ip_adapter"):
        check_origin(file, other / "base", tiny / "clip")
    with pytest.raises(WeightsError, match="trained for another image_encoder"):
        check_origin(file, tiny / "base", other / "clip")
    record.write_text("{}")
    with pytest.raises(WeightsError, match="does not say which models"):
        check_origin(file, tiny / "base", tiny / "clip")


def test_it_is_trained_as_instantbooth_is_and_what_is_there_is_of_the_same(tmp_path: Path) -> None:
    job = IPAdapterJob(output=tmp_path, recipe=RECIPES["gpu"])
    planned = plan(job, miniature_folder(), "plus")
    shares = {"text_dropout": 0.05, "image_dropout": 0.05, "both_dropout": 0.05}
    assert planned["rounds"] == [asdict(each) | shares for each in RECIPES["gpu"].rounds]
    (tmp_path / "plus").mkdir()
    (tmp_path / "plus" / RECORD).write_text(json.dumps(planned | {"loss": 0.1}))
    check_record(tmp_path / "plus" / RECORD, planned)
    with pytest.raises(ParameterError, match=r"with rounds .*; repeat its options, or name another --output"):
        run(replace(job, recipe=replace(job.recipe, adapters=AdapterTrainingConfig())))
    changed = planned[MODELS] | {"unet": "another"}
    with pytest.raises(ParameterError, match="with models"):
        check_record(tmp_path / "plus" / RECORD, planned | {MODELS: changed})


@pytest.mark.parametrize("variant", weights.VARIANTS)
def test_the_shipped_weights_are_of_the_shipped_miniature_and_of_its_recipe(variant: str) -> None:
    models, job = miniature_folder(), IPAdapterJob()
    shipped = peers_folder() / "ip_adapter" / variant
    check_origin(shipped / weights.FILE, models / "base", models / "clip")
    check_record(shipped / RECORD, plan(job, models, variant))
    assert json.loads((shipped / RECORD).read_text())["steps"] == sum(each.steps for each in job.recipe.rounds)


def test_what_is_trained_already_is_shipped_in_half_precision(tmp_path: Path, tiny: Path) -> None:
    trained, shipped = tmp_path / "trained", tmp_path / "shipped"
    state = objective(tiny, "plus").state()
    weights.save(state, trained / "plus" / weights.FILE)
    job = IPAdapterJob(output=trained, ship=shipped, variants=("plus",), models=tiny)
    (trained / "plus" / RECORD).write_text(json.dumps(plan(job, tiny, "plus")))
    run(job)
    halves = weights.load(shipped / "plus" / weights.FILE, "plus")
    assert {part: set(tensors) for part, tensors in halves.items()} == {part: set(state[part]) for part in state}
    for name, tensor in state["ip_adapter"].items():
        assert torch.equal(halves["ip_adapter"][name], tensor.half())
    check_origin(shipped / "plus" / weights.FILE, tiny / "base", tiny / "clip")


@pytest.fixture
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    """A process without Ray, whose threads do not survive the fork that several training processes come from."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def train_miniature(folder: Path, steps: int) -> tuple[int, str]:
    """Steps on four rendered pictures: how many losses there are, and what was learned."""
    corpus = four_pictures(Scene())
    models = miniature_folder()
    base = BaseModel.load(str(models / "base"), device=CPU, dtype=torch.float32)
    encoder = ImageEncoder(models / "clip", patch_layer=weights.PLUS_LAYER, device=CPU, dtype=torch.float32)
    latents = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    first = AdapterTrainingConfig(steps=steps, batch_size=2)
    rounds = (first, replace(first, steps=1, replaced_backgrounds=1.0))
    trained, losses = train_ip_adapter("global", base, encoder, corpus, latents, rounds, folder=folder)
    return len(losses), tensors_digest(trained.state()["ip_adapter"])


def test_a_training_that_is_started_again_ends_with_the_same_weights(
    tmp_path: Path, elsewhere: ProcessPoolExecutor
) -> None:
    in_peace = elsewhere.submit(train_miniature, tmp_path / "in peace", 4).result()
    assert in_peace[0] == 5
    assert elsewhere.submit(train_miniature, tmp_path / "shorter", 2).result()[1] != in_peace[1]
    assert elsewhere.submit(train_miniature, tmp_path / "in peace", 4).result() == in_peace
