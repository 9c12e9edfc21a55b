"""Which model a job is given, found out before it is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from instantbooth import Personalizer
from instantbooth.errors import WeightsError
from pipelines.model import ModelConfig


@pytest.fixture
def model(tiny: Path, booth: Personalizer, tmp_path: Path) -> ModelConfig:
    booth.save_weights(tmp_path)
    return ModelConfig(base=str(tiny / "base"), image_encoder=str(tiny / "clip"), weights=str(tmp_path))


def test_weights_are_known_by_their_tensors_and_by_their_defaults(model: ModelConfig) -> None:
    before = model.identity()
    config = Path(str(model.weights), "config.json")
    config.write_text(config.read_text().replace('"guidance_scale": 7.5', '"guidance_scale": 5.0'))
    after = model.identity()
    assert after.config != before.config
    assert replace(after, config=before.config) == before


def test_a_part_that_is_not_there_is_named_before_anything_is_loaded(model: ModelConfig, tmp_path: Path) -> None:
    for wrong, words in (
        ({"base": "/no/such/base"}, "'/no/such/base' is neither a folder nor a preset"),
        ({"base": str(tmp_path)}, "is no Stable Diffusion folder: it lacks tokenizer"),
        ({"image_encoder": None}, "has no image_encoder/"),
        ({"image_encoder": "/no/clip"}, "'/no/clip' is no folder"),
        ({"segmenter": "/no/segmenter"}, "'/no/segmenter' is no folder"),
        ({"weights": None}, "comes without trained weights"),
        ({"weights": "/no/weights"}, "/no/weights/config.json does not exist"),
        ({"weights": str(tmp_path.parent)}, "config.json does not exist"),
    ):
        with pytest.raises(WeightsError, match=words):
            replace(model, **wrong).identity()
