"""The ablations' table: trained, sampled and judged once, and gone on with where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from safetensors.torch import load_file

from instantbooth.errors import ParameterError
from instantbooth.evaluation.ablations import ABLATIONS, FULL
from instantbooth.miniature.recipe import RECORD
from instantbooth.training.adapters import AdapterTrainingConfig
from jobs.evaluation.ablations import Ablations, ablations, beside, entrants_of, train_missing, verdicts
from jobs.evaluation.sweep import folder_digest

ROWS = ("before-text-encoder", "image-encoder-tuned", "unet-tuned", "one-image")
FAST = {"num_inference_steps": 1, "guidance_scale": 1.0}


def small(folder: Path) -> Ablations:
    return Ablations(
        output=str(folder / "eval"),
        trained=folder / "trained",
        rows=ROWS,
        pictures=8,
        training=AdapterTrainingConfig(steps=2, batch_size=2, warmup_steps=0),
        split="validation",
        identities=1,
        gallery=4,
        references=2,
        prompts_per_kind=1,
        cpus=1,
        **FAST,
    )


@pytest.fixture
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    """A process without Ray, whose threads do not survive the fork that several training processes come from."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def changed(name: str, options: Ablations) -> set[str]:
    """Which files' tensors a row's models have otherwise than the shipped ones."""
    found = set()
    [entrant] = [each for each in entrants_of(options) if each.label == name]
    shipped, own = options.parts.models, entrant.parts.models
    for kind in ("base", "image_encoder"):
        folder = Path(getattr(own, kind))
        for path in folder.rglob("*.safetensors"):
            mine, theirs = load_file(path), load_file(Path(getattr(shipped, kind)) / path.relative_to(folder))
            if any(not mine[key].half().equal(theirs[key].half()) for key in mine):
                found.add(f"{kind}/{path.parent.name}" if kind == "base" else kind)
    return found


def test_a_table_is_trained_and_made_once_and_goes_on_where_it_stopped(
    ray_session: None, tmp_path: Path, elsewhere: ProcessPoolExecutor
) -> None:
    options = small(tmp_path)
    options.check_rows()
    elsewhere.submit(train_missing, options).result()
    records = sorted(options.trained.rglob(RECORD))
    assert len(records) == 4, "one test image needs no training of its own"
    assert changed(FULL, options) == changed("before-text-encoder", options) == set()
    assert changed("image-encoder-tuned", options) == {"image_encoder"}
    assert changed("unet-tuned", options) == {"base/unet"}

    weights = {record.parent: folder_digest(record.parent / "weights") for record in records}
    assert len(set(weights.values())) == 4
    times = [record.stat().st_mtime_ns for record in records]
    records[1].unlink()
    (records[1].parent / "weights" / "config.json").unlink()
    elsewhere.submit(train_missing, options).result()
    # Uncached: the files may have been written anew.
    assert {folder: folder_digest.__wrapped__(folder / "weights") for folder in weights} == weights
    assert [record.stat().st_mtime_ns == time for record, time in zip(records, times, strict=True)] == [1, 0, 1, 1]

    ablations(options)
    rows = json.loads((tmp_path / "eval" / "ablations.json").read_text())["rows"]
    assert list(rows) == [FULL, *ROWS]
    assert rows[FULL]["verdict"] == {}
    assert rows[FULL]["more_than_full"]["alignment"] == {"mean": 0, "low": 0, "high": 0}
    for name in ROWS:
        row, full = rows[name], rows[FULL]
        assert row["training"]["steps"] == 2
        for column in ("alignment", "reconstruction", "prompt_accuracy", "face_similarity", "identification"):
            change = row["more_than_full"][column]["mean"]
            assert change == pytest.approx(row[column]["mean"] - full[column]["mean"])
        assert row["verdict"] == verdicts(ABLATIONS[name], row["more_than_full"])
    assert len({row["digest"] for row in rows.values()}) == 4

    cells = sorted((tmp_path / "eval" / "cells").rglob("cell.json"))
    assert len(cells) == 5
    before = {path: path.stat().st_mtime_ns for path in cells}
    cells[3].unlink()
    ablations(options)
    assert [path for path in cells if path.stat().st_mtime_ns != before[path]] == [cells[3]]


def test_the_papers_own_figures_would_be_ticked_in_every_row() -> None:
    full = ABLATIONS[FULL]
    for ablation in ABLATIONS.values():
        changes = {
            column: getattr(ablation, column) - getattr(full, column) for column in ("alignment", "reconstruction")
        }
        seen = {column: dict.fromkeys(("mean", "low", "high"), change) for column, change in changes.items()}
        found = verdicts(ablation, seen)
        row = {"reported": {column: getattr(ablation, column) for column in found}, "verdict": found}
        assert all(beside(row, column) == f"{row['reported'][column]:.4f} ✓" for column in found)
        against = {column: {name: -value for name, value in each.items()} for column, each in seen.items()}
        opposite = verdicts(ablation, against)
        assert all(("here" in opposite[column]) == (change != 0) for column, change in changes.items())


def test_a_rows_training_is_found_by_all_that_it_depends_on(tmp_path: Path) -> None:
    options = small(tmp_path)
    unet, full = ABLATIONS["unet-tuned"], ABLATIONS[FULL]
    others = [
        replace(options, training=replace(options.training, seed=1)),
        replace(options, pictures=9),
        replace(options, tuned_rate=0.2),
    ]
    assert len({each.where(unet).folder for each in (options, *others)}) == 4
    assert others[2].where(full) == options.where(full), "the full method tunes nothing besides"
    assert replace(options, output="elsewhere", identities=3).where(unet) == options.where(unet)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": ("unet",)}, "row 'unet' is unknown"),
        ({"weights": Path("elsewhere")}, "--weights does nothing"),
        ({"ip_adapter": Path("elsewhere")}, "--ip-adapter does nothing"),
        ({"pictures": 0}, "pictures must be at least 1"),
        ({"tuned_rate": 0.0}, "tuned_rate must be above 0"),
        ({"training": AdapterTrainingConfig(encoder_learning_rate=1e-3)}, "make them equal"),
        ({"training": AdapterTrainingConfig(batch_size=3)}, "processes must divide batch_size"),
        ({"identities": 0}, "identities must be at least 1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ParameterError, match=words):
        ablations(replace(small(tmp_path), **changes))
    assert not (tmp_path / "trained").exists()
