"""What training changes, and that it learns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from instantbooth.errors import ParameterError
from instantbooth.model.encoders import resize_to_tensor
from instantbooth.model.objective import subject_weights
from instantbooth.training.adapters import (
    AdapterObjective,
    AdapterTrainingConfig,
    ExamplePreparer,
    optimizer_for,
    unpacked,
)
from instantbooth.training.ema import EMA
from tests.tiny import portrait, tiny_booth


@pytest.fixture(scope="module")
def batch(tiny: Path) -> dict[str, Tensor]:
    preparer = ExamplePreparer.for_model(str(tiny / "base"), str(tiny / "clip"))
    examples = []
    for seed in range(4):
        image, mask = portrait(seed)
        rng = np.random.default_rng(seed)
        examples.append(preparer(image=image, mask=mask, caption="a photo of a {subject}", noun="cat", rng=rng))
    return unpacked({name: torch.from_numpy(np.stack([each[name] for each in examples])) for name in examples[0]})


def test_gradients_reach_adapters_and_the_two_layers_and_nothing_else(tiny: Path, batch: dict[str, Tensor]) -> None:
    objective = AdapterObjective(tiny_booth(tiny), AdapterTrainingConfig(text_dropout=0, image_dropout=0))
    objective(batch, torch.Generator().manual_seed(0)).backward()
    booth = objective.booth
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in booth.trained.parameters())
    trained = {id(p) for p in booth.trained.parameters()}
    frozen = [booth.base.unet, booth.base.text_encoder, booth.base.vae, booth.image_encoder]
    untouched = [p for module in frozen for p in module.parameters() if id(p) not in trained]
    assert len(untouched) > 100
    assert all(p.grad is None and not p.requires_grad for p in untouched)


def test_the_optimizer_holds_what_is_trained_at_two_learning_rates(tiny: Path) -> None:
    objective = AdapterObjective(tiny_booth(tiny), AdapterTrainingConfig())
    config = AdapterTrainingConfig(adapter_learning_rate=1e-6, encoder_learning_rate=1e-4)
    adapters, encoders = optimizer_for(objective, config).param_groups
    assert (adapters["lr"], encoders["lr"]) == (1e-6, 1e-4)
    held = {id(p) for group in (adapters, encoders) for p in group["params"]}
    assert held == {id(p) for p in objective.parameters() if p.requires_grad}


def test_training_lowers_the_loss_on_a_fixed_batch(tiny: Path, batch: dict[str, Tensor]) -> None:
    config = AdapterTrainingConfig(adapter_learning_rate=1e-2, encoder_learning_rate=1e-2, image_dropout=0)
    objective = AdapterObjective(tiny_booth(tiny), config)
    optimizer = optimizer_for(objective, config)
    losses = []
    for _ in range(60):
        loss = objective(batch, torch.Generator().manual_seed(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < 0.95 * losses[0]


def test_the_same_generator_gives_the_same_loss(tiny: Path, batch: dict[str, Tensor]) -> None:
    objective = AdapterObjective(tiny_booth(tiny), AdapterTrainingConfig())
    losses = [objective(batch, torch.Generator().manual_seed(seed)).item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_the_background_weighs_what_was_asked_and_every_picture_the_same(tiny: Path, batch: dict[str, Tensor]) -> None:
    weights = subject_weights(batch["subject_mask"], 0.25)
    for covered, own in zip(batch["subject_mask"], weights, strict=True):
        assert float(own[covered == 0].max() / own[covered == 1].min()) == pytest.approx(0.25)
        assert float(own.mean()) == pytest.approx(1.0)

    def loss(background_weight: float, covered: Tensor) -> float:
        objective = AdapterObjective(tiny_booth(tiny), AdapterTrainingConfig(background_weight=background_weight))
        value: Tensor = objective(batch | {"subject_mask": covered}, torch.Generator().manual_seed(1))
        return value.item()

    assert loss(0.25, batch["subject_mask"]) != loss(1.0, batch["subject_mask"])
    assert loss(0.25, torch.ones_like(batch["subject_mask"])) == loss(1.0, batch["subject_mask"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("background_weight", 1.5, r"background_weight must be from 0 to 1, is 1\.5"),
        ("text_dropout", 8, "text_dropout must be from 0 to 1, is 8"),
        ("replaced_backgrounds", -0.1, r"replaced_backgrounds must be from 0 to 1, is -0\.1"),
        ("steps", 0, "steps must be at least 1, is 0"),
        ("batch_size", 0, "batch_size must be at least 1"),
        ("clip_norm", 0, "clip_norm must be at least"),
        ("adapter_learning_rate", float("nan"), "adapter_learning_rate must be from 0 to 1, is nan"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(field: str, value: float, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        AdapterTrainingConfig(**{field: value})  # type: ignore[arg-type]


def test_examples_hide_the_background_from_the_reference(tiny: Path) -> None:
    preparer = ExamplePreparer.for_model(str(tiny / "base"), str(tiny / "clip"))
    image, mask = portrait(3)
    pair = {"image": image, "mask": mask, "caption": "a {subject}", "noun": "person"}
    first, again, other = (preparer(**pair, rng=np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first["pixel_values"].shape == (3, 32, 32)
    assert (first["reference_pixels"] == again["reference_pixels"]).all()
    assert (first["reference_pixels"] != other["reference_pixels"]).any()
    darkness = first["reference_pixels"].max(axis=0) < 5
    assert darkness.mean() > 0.05
    assert (first["pixel_values"].max(axis=0) < 5).mean() < 0.01


def test_a_scene_stands_behind_the_reference_and_leaves_the_target_alone(tiny: Path) -> None:
    preparer = ExamplePreparer.for_model(str(tiny / "base"), str(tiny / "clip"))
    image, mask = portrait(3)
    green = Image.new("RGB", (50, 30), (0, 255, 0)), Image.new("L", (50, 30))
    pair = {"image": image, "mask": mask, "caption": "a {subject}", "noun": "person"}
    alone, placed = (preparer(**pair, scene=scene, rng=np.random.default_rng(0)) for scene in (None, green))
    assert (placed["pixel_values"] == alone["pixel_values"]).all()
    assert (placed["subject_mask"] == alone["subject_mask"]).all()
    red, lime, blue = placed["reference_pixels"].astype(int)
    assert ((lime > red + 100) & (lime > blue + 100)).mean() > 0.1
    assert (alone["reference_pixels"].max(axis=0) < 5).mean() > (placed["reference_pixels"].max(axis=0) < 5).mean()


def test_a_picture_that_travels_as_bytes_is_the_same_to_the_last_bit(tiny: Path) -> None:
    image, mask = portrait(3, size=50)
    example = ExamplePreparer.for_model(str(tiny / "base"), str(tiny / "clip"))(
        image=image, mask=mask, caption="a {subject}", noun="person", rng=np.random.default_rng(0)
    )
    assert {example[name].dtype for name in ("pixel_values", "reference_pixels", "subject_mask")} == {np.dtype("uint8")}
    numbers = unpacked({name: torch.from_numpy(value) for name, value in example.items()})
    assert torch.equal(numbers["pixel_values"], resize_to_tensor(image, 32) * 2 - 1)
    covered = np.asarray(mask.resize((16, 16), Image.Resampling.BOX), np.float32)[None] / 255
    assert torch.equal(numbers["subject_mask"], torch.from_numpy(covered))
    assert 0 <= numbers["reference_pixels"].min() < 0.02
    assert 0.5 < numbers["reference_pixels"].max() <= 1


def test_the_average_follows_the_parameters_and_swaps_back() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    ema = EMA([parameter], decay=0.5)
    with torch.no_grad():
        parameter.fill_(1.0)
    for step in range(8):
        ema.update(step)
    assert 0.9 < float(ema.shadow[0][0]) < 1.0
    ema.swap()
    assert float(parameter.detach()[0]) < 1.0
    ema.swap()
    assert float(parameter.detach()[0]) == 1.0
