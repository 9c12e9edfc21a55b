"""The demo, end to end: every stage, the Ray job included, on a tiny model and untrained judges."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro
from PIL import Image

from instantbooth.errors import InstantBoothError
from instantbooth.evaluation.judges import AttributeJudge, IdentityJudge
from instantbooth.miniature.world import ATTRIBUTES
from instantbooth.presets import miniature_folder, weights_folder
from instantbooth.storage import FileStore
from instantbooth.training.adapters import AdapterTrainingConfig
from jobs.demo import DemoConfig, run
from jobs.demo_page import Subject, write_contact_sheet
from pipelines.model import ModelConfig
from pipelines.personalize import load_manifest
from pipelines.plan import pieces
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


def test_a_demo_without_pictures_leaves_no_earlier_ones_contact_sheet(tmp_path: Path) -> None:
    sheet, picture = tmp_path / "contact_sheet.png", Image.new("RGB", (8, 8))
    subject = Subject(id="a", references=[picture], prompts=["a {subject}"], kinds=["style"], pictures=[picture])
    write_contact_sheet(sheet, [subject])
    assert sheet.exists()
    write_contact_sheet(sheet, [])
    assert not sheet.exists()


def test_the_demo_asks_for_no_tracking_server_but_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(DemoConfig, args=["--help"])
    options = capsys.readouterr().out
    assert "--model.weights" in options
    assert "tracking-uri" not in options


@pytest.mark.usefixtures("ray_session")
def test_the_demo_leaves_pictures_weights_and_figures(tmp_path: Path) -> None:
    tiny = tiny_model(tmp_path / "model")
    tiny_booth(tiny).save_weights(tmp_path / "weights")
    AttributeJudge(ATTRIBUTES).save(tmp_path / "judges/attributes")
    IdentityJudge().save(tmp_path / "judges/identity")
    output = tmp_path / "demo"
    model = ModelConfig(
        base=str(tiny / "base"),
        image_encoder=str(tiny / "clip"),
        segmenter=str(miniature_folder() / "segmenter"),
        weights=str(tmp_path / "weights"),
    )
    config = DemoConfig(
        output=output,
        pairs=16,
        subjects=2,
        references=1,
        model=model,
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
    tracking_uri = f"sqlite:///{output}/mlflow.db"
    assert Path(weights_folder(summary["weights"], tracking_uri)).is_dir()
    [manifest] = output.glob("store/*/orders/manifest.jsonl")
    rows = load_manifest(manifest.as_uri())
    trained = replace(model, weights=summary["weights"], tracking_uri=tracking_uri).identity()
    keys = {piece.key for row in rows for piece in pieces(row, trained)}
    assert keys == set(FileStore(manifest.parent.parent / "results").list("images/")), "by every part that was named"

    page = (output / "report.html").read_text()
    assert page.count("data:image/png") == 2 * (1 + 4)
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|<script", page)
    [curve] = re.findall(r'<polyline class="raw" points="([^"]+)"', page)
    assert len(curve.split()) == 3, "a point for every step"
    assert rows[0].prompts[0] in page
    with Image.open(output / "contact_sheet.png") as sheet:
        assert sheet.width > sheet.height > 2 * 192
