"""The demo, end to end: every stage, the Ray job included, on a tiny model and untrained judges."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from instantbooth.evaluation.judges import AttributeJudge, IdentityJudge
from instantbooth.miniature.world import ATTRIBUTES
from instantbooth.tracking import resolve_weights
from instantbooth.training.adapters import AdapterTrainingConfig
from jobs.demo import DemoConfig, run
from pipelines.model import ModelConfig
from tests.tiny import tiny_booth, tiny_model


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
    with Image.open(output / "contact_sheet.png") as sheet:
        assert sheet.width > sheet.height > 2 * 192
