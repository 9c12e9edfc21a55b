"""The demo, end to end: every stage, the Ray job included, on a tiny model and untrained judges."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from instantbooth.errors import InstantBoothError
from instantbooth.evaluation.judges import AttributeJudge, IdentityJudge
from instantbooth.miniature.world import ATTRIBUTES
from instantbooth.tracking import resolve_weights
from instantbooth.training.adapters import AdapterTrainingConfig
from jobs.demo import DemoConfig, run
from pipelines.model import ModelConfig
from pipelines.personalize import load_manifest
from tests.tiny import tiny_booth, tiny_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"references": 0}, "references must be from 1 to 16, is 0"),
        ({"references": 17}, "references must be from 1 to 16, is 17"),
        ({"pairs": 3}, "pairs at least a batch"),
        ({"training": AdapterTrainingConfig(batch_size=15)}, "15"),
        ({"model": ModelConfig(weights="nowhere")}, "nowhere"),
        ({"judges": Path("nowhere")}, "nowhere"),
    ],
)
def test_what_cannot_end_well_does_not_begin(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InstantBoothError, match=message):
        DemoConfig(**options)


@pytest.mark.usefixtures("ray_session")
def test_the_demo_leaves_pictures_weights_and_figures(tmp_path: Path) -> None:
    tiny = tiny_model(tmp_path / "model")
    tiny_booth(tiny).save_weights(tmp_path / "weights")
    AttributeJudge(ATTRIBUTES).save(tmp_path / "judges/attributes")
    IdentityJudge().save(tmp_path / "judges/identity")
    output = tmp_path / "demo"
    config = DemoConfig(
        output=output,
        pairs=16,
        subjects=2,
        references=1,
        model=ModelConfig(base=str(tiny / "base"), image_encoder=str(tiny / "clip"), weights=str(tmp_path / "weights")),
        judges=tmp_path / "judges",
        training=AdapterTrainingConfig(steps=3, batch_size=4),
    )
    run(config)

    summary = json.loads((output / "summary.json").read_text())
    assert list(summary) == [
        "identities",
        "images",
        "failed",
        "train_steps",
        "mlflow_run_id",
        "weights",
        "identification_top1",
        "prompt_accuracy",
        "seconds",
    ]
    assert (summary["identities"], summary["images"], summary["failed"], summary["train_steps"]) == (2, 8, 0, 3)
    assert all(0 <= summary[figure] <= 1 for figure in ("identification_top1", "prompt_accuracy"))
    assert resolve_weights(summary["weights"], f"sqlite:///{output}/mlflow.db", tmp_path).is_dir()

    page = (output / "report.html").read_text()
    assert page.count("data:image/png") == 2 * (1 + 4)
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|<script", page)
    [curve] = re.findall(r'<polyline class="raw" points="([^"]+)"', page)
    assert len(curve.split()) == 3, "a point for every step"
    assert load_manifest(next(output.glob("store/*/orders/manifest.jsonl")).as_uri())[0].prompts[0] in page
    with Image.open(output / "contact_sheet.png") as sheet:
        assert sheet.width > sheet.height > 2 * 192
