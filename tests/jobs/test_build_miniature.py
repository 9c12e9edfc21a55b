"""The miniature from nothing: every stage in its smallest size, gone on with, and shipped."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from instantbooth import Personalizer
from instantbooth.errors import ParameterError
from instantbooth.miniature.pairs import loop_of
from instantbooth.miniature.recipe import GPU, NEEDS, RECIPES, STAGES, Recipe, Workshop, build
from instantbooth.miniature.shipping import ship
from instantbooth.model.record import RECORD
from instantbooth.presets import miniature_folder, miniature_preset
from instantbooth.training.adapters import AdapterTrainingConfig
from instantbooth.training.loop import LoopConfig

CPU = torch.device("cpu")


def smallest() -> Recipe:
    """Two steps of everything."""
    recipe = replace(
        GPU,
        pretraining_pictures=8,
        later_pictures=16,
        adapter_pictures=12,
        judging_identities=8,
        held_out_identities=8,
        validation_subjects=2,
        defaults=replace(GPU.defaults, num_inference_steps=2),
    )
    loops = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    loops = {name: loop for name, loop in loops.items() if isinstance(loop, LoopConfig)}
    shorter = {name: replace(loop, steps=2, batch_size=8, decay_steps=1) for name, loop in loops.items()}
    adapters, backgrounds = (replace(each, steps=2, batch_size=8) for each in recipe.rounds)
    return replace(recipe, **shorter, adapters=adapters, backgrounds=backgrounds)


@pytest.mark.full
def test_a_build_from_nothing_can_be_repeated_gone_on_with_and_shipped(tmp_path: Path) -> None:
    recipe, folder = smallest(), tmp_path / "built"
    record = build(folder, recipe, device=CPU)
    assert build(folder, recipe, device=CPU) == record, "what is made is not made again"

    adapters = {path: path.read_bytes() for path in (folder / "models/adapters").iterdir()}
    unet = folder / "models/base/unet/diffusion_pytorch_model.safetensors"
    whole = unet.read_bytes()
    unet.write_bytes(whole[:1000])
    del record["refinement"]
    (folder / "models/RECORD.json").write_text(json.dumps(record))
    record = build(folder, recipe, device=CPU)
    assert unet.read_bytes() == whole, "a stage cut short while it saved is made up for"

    with pytest.raises(ParameterError, match="holds the stage 'adapters'"):
        build(folder, replace(recipe, adapters=AdapterTrainingConfig(steps=3)), device=CPU)
    del record["adapters"]
    (folder / "models/RECORD.json").write_text(json.dumps(record | {"begun": {"adapters": 60.0}}))
    other = replace(recipe, adapters=replace(recipe.adapters, background_weight=1.0))
    with pytest.raises(ParameterError, match="holds the stage 'adapters'"):
        build(folder, other, device=CPU)
    repeated = build(folder, recipe, device=CPU)
    assert repeated["adapters"]["seconds"] >= 60, "of all sittings"
    assert {path: path.read_bytes() for path in adapters} == adapters, "with their scales again"

    ship(folder / "models", tmp_path / "shipped")
    assert ship(folder / "models", tmp_path / "shipped") <= 40e6
    preset = miniature_preset(tmp_path / "shipped")
    Personalizer.from_pretrained(preset.base, weights=preset.weights, image_encoder=preset.image_encoder, device="cpu")


def test_a_stage_that_the_recipe_leaves_out_does_nothing(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, RECIPES["cpu"], CPU)
    assert STAGES["decoder"](shop) == {}
    assert not list(tmp_path.iterdir())


def test_a_stage_needs_only_stages_before_it() -> None:
    order = list(STAGES)
    assert all(order.index(need) < order.index(stage) for stage, needed in NEEDS.items() for need in needed)


def test_the_shipped_weights_were_made_by_the_recipe_that_is_named() -> None:
    made_by = json.loads((miniature_folder() / RECORD).read_text())["made_by"]
    assert made_by == {
        "command": "python -m jobs.build_miniature recipe:gpu",
        "recipe": json.loads(json.dumps(asdict(RECIPES["gpu"]))),
    }


def test_shipping_replaces_nothing_but_what_was_shipped(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(ParameterError, match="holds something else than shipped models"):
        ship(tmp_path / "models", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "the only copy"


def test_two_learning_rates_are_refused_where_there_is_one() -> None:
    with pytest.raises(ParameterError, match="make them equal"):
        loop_of(AdapterTrainingConfig(encoder_learning_rate=1e-4))
