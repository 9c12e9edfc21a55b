"""A training that dies 36 times, each time elsewhere, against one that is left in peace: `make test-chaos-training`.

Whatever is killed, and when, and whatever became of its newest checkpoint, the same command goes on: every sample once
an epoch, the same weights to the last bit, one run in MLflow without a gap.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from mlflow import MlflowClient

from instantbooth.storage import FileStore
from instantbooth.tracking import OUTPUT, open_run
from instantbooth.training.checkpoints import FOLDER, Checkpoints, log_lines
from pipelines.trainer import LOG
from tests.chaos_training.faults import Point, met_in
from tests.curated import write_curated
from tests.tiny import tiny_booth, tiny_model

pytestmark = pytest.mark.chaos

STEPS, ROWS = 120, 30
PATIENCE_S = 900

WORKER_POINTS = [
    Point(rank=rank, place=place, when=when, count=count)
    for rank, place, when, count in [
        (0, "step", "before", 1),
        (1, "step", "before", 2),
        (0, "step", "after", 3),
        (1, "step", "after", 5),
        (0, "gradient", "after", 2),
        (1, "gradient", "after", 3),
        (0, "average", "before", 6),
        (1, "average", "after", 6),
        (0, "snapshot", "before", 1),
        (0, "snapshot", "after", 1),
        (0, "save", "before", 1),
        (0, "save", "after", 1),
        (0, "put", "before", 1),
        (0, "put", "halfway", 1),
        (0, "put", "after", 1),
        (0, "put", "halfway", 2),
        (0, "put", "after", 2),
        (0, "put", "halfway", 3),
        (0, "put", "after", 4),
        (0, "put", "halfway", 5),
        (0, "put", "after", 5),
        (0, "prune", "before", 1),
        (0, "prune", "after", 1),
        (0, "delete", "after", 1),
        (0, "delete", "after", 2),
        (1, "step", "after", 9),
    ]
] + [Point(rank=rank, place="step", when="after", count=2, signal="SIGTERM") for rank in (0, 1)]
DRIVER_POINTS = [
    Point(rank=0, place=place, when=when, count=count, target="driver", signal=name)
    for place, when, count, name in [
        ("step", "before", 1, "SIGKILL"),
        ("gradient", "after", 3, "SIGKILL"),
        ("save", "before", 1, "SIGKILL"),
        ("put", "halfway", 2, "SIGKILL"),
        ("save", "after", 1, "SIGKILL"),
        ("step", "before", 1, "SIGTERM"),
        ("gradient", "after", 6, "SIGTERM"),
        ("save", "before", 1, "SIGTERM"),
    ]
]

DAMAGED = {3: "state.pt", 6: "manifest.json"}
"""Restart of the driver → the file of the newest checkpoint in which a bit has flipped by then."""


def points() -> list[Point]:
    """Workers die in mixed order, and the driver between them."""
    workers = WORKER_POINTS.copy()
    random.Random(0).shuffle(workers)
    groups = batched_evenly(workers, len(DRIVER_POINTS))
    return [point for group, driver in zip(groups, DRIVER_POINTS, strict=True) for point in (*group, driver)]


def batched_evenly(values: list[Point], parts: int) -> list[list[Point]]:
    """So many runs of values, of nearly equal length."""
    return [values[len(values) * n // parts : len(values) * (n + 1) // parts] for n in range(parts)]


def run(folder: Path, name: str, *, chaos: bool) -> int:
    """The driver's exit status."""
    environment = os.environ | ({"CHAOS_FOLDER": str(folder)} if chaos else {})
    settings = json.dumps({"folder": str(folder), "name": name, "steps": STEPS})
    command = [sys.executable, "-m", "tests.chaos_training.driver", settings]
    log = folder / f"{name}.log"
    with log.open("a") as output:
        return subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=PATIENCE_S).returncode


def damage_newest(output: Path, name: str) -> int:
    """Flips a bit of a file of the newest checkpoint; its step."""
    step = Checkpoints(store=FileStore(output)).steps()[-1]
    path = output / FOLDER / f"{step:09d}" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return step


def outputs_of_runs(tracking_uri: str) -> list[str]:
    """Of each run in MLflow the output folder that it is known by, sorted."""
    client = MlflowClient(tracking_uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    return sorted(run.data.tags[OUTPUT] for run in client.search_runs(experiments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chaos")
    write_curated(FileStore(folder / "curated"), ROWS)
    tiny_booth(tiny_model(folder / "model")).save_weights(folder / "weights")
    (folder / "plan.json").write_text(json.dumps([asdict(point) for point in points()]))
    return folder


def test_a_training_that_dies_everywhere_ends_as_one_left_in_peace(folder: Path) -> None:
    assert len(points()) >= 30
    assert run(folder, "peace", chaos=False) == 0
    endings, damaged = [], []
    while not endings or endings[-1] != 0:
        if len(endings) in DAMAGED:
            damaged.append(damage_newest(folder / "chaos", DAMAGED[len(endings)]))
        assert len(endings) < 2 * len(points()), (folder / "chaos.log").read_text()[-4000:]
        endings.append(run(folder, "chaos", chaos=True))
        assert endings[-1] in (0, -signal.SIGKILL, 143), (folder / "chaos.log").read_text()[-4000:]
    assert met_in(folder) == len(points())
    kinds = Counter(endings)
    assert kinds[-signal.SIGKILL] == 5
    assert kinds[143] == 3
    told = (folder / "chaos.log").read_text()
    assert len(damaged) == len(DAMAGED)
    assert all(f"the checkpoint of step {step} is damaged; going back" in told for step in damaged)

    peace, chaos = (log_lines(FileStore(folder / name), LOG) for name in ("peace", "chaos"))
    assert list(peace) == sorted(chaos) == list(range(1, STEPS + 1))
    assert [line["samples"] for line in peace.values()] == [chaos[step]["samples"] for step in peace]
    assert [line["metrics"]["loss"] for line in peace.values()] == [chaos[step]["metrics"]["loss"] for step in peace]
    sequence = [sample for step in sorted(chaos) for sample in chaos[step]["samples"]]
    ids = {row[:15] for row in write_curated(FileStore(folder / "again"), ROWS)}
    for start in range(0, len(sequence), ROWS):
        assert sorted(sequence[start : start + ROWS]) == sorted(ids)

    weights = [(folder / name / "weights" / "weights.safetensors").read_bytes() for name in ("peace", "chaos")]
    assert weights[0] == weights[1]
    tracking_uri = f"sqlite:///{folder}/mlflow.db"
    outputs = {name: FileStore(folder / name).uri("x").removesuffix("/x") for name in ("peace", "chaos")}
    assert outputs_of_runs(tracking_uri) == sorted(outputs.values()), "one run each"
    run_of_chaos = open_run(tracking_uri, outputs["chaos"])
    assert [step for step, _ in run_of_chaos.curve("loss")] == list(range(1, STEPS + 1))
