"""A training whose machine is taken away with notice: it saves, and goes on from there on another one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from instantbooth.storage import FileStore
from instantbooth.training.checkpoints import log_lines
from pipelines.trainer import ASK_EVERY, LOG
from tests.chaos.inputs import model_options, write_model
from tests.curated import write_curated

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parent.parent.parent
MACHINE = {"num_cpus": 3, "object_store_memory": 200_000_000}
ROWS = 30
NEVER = 1_000_000
NOTICE_S = 60


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster whose head trains nothing."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 300_000_000})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def training(cluster: Any, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that saves only where it is told to, or ends."""
    write_curated(FileStore(tmp_path / "curated"), ROWS)
    options = [
        *model_options(write_model(tmp_path / "model")),
        f"--data={tmp_path / 'curated'}",
        f"--output={tmp_path / 'run'}",
        f"--model.tracking-uri={tracking_uri(tmp_path)}",
        f"--adapters.steps={NEVER}",
        "--adapters.batch-size=4",
        "--workers=2",
        f"--checkpoint-every={NEVER}",
        "--validation.every=0",
    ]
    environment = os.environ | {
        "RAY_ADDRESS": cluster.address,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)]),
    }
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "jobs.train", "miniature", *options]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    yield process
    process.kill()
    process.wait()


def tracking_uri(folder: Path) -> str:
    """MLflow's."""
    return f"sqlite:///{folder}/mlflow.db"


def steps_told(folder: Path) -> float:
    """How far MLflow knows the training to be."""
    client = MlflowClient(tracking_uri(folder))
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return max((run.data.metrics.get("step", 0.0) for run in runs), default=0.0)


def wait_until(condition: Callable[[], bool], training: subprocess.Popen[bytes], log: Path) -> None:
    """Fails where the training ends before, or with its log after four minutes."""
    deadline = time.monotonic() + 240
    while not condition():
        assert training.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)


def test_a_machine_that_is_taken_away_with_notice_costs_few_steps(
    cluster: Any, training: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    first = cluster.add_node(**MACHINE)
    log, run = tmp_path / "log", FileStore(tmp_path / "run")
    wait_until(lambda: steps_told(tmp_path) > 2 * ASK_EVERY, training, log)
    assert not any(run.list("checkpoints/"))

    drain = ["drain-node", "--address", cluster.address, "--node-id", first.node_id]
    drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    drain += ["--deadline-remaining-seconds", str(NOTICE_S)]
    subprocess.run([Path(sys.executable).with_name("ray"), *drain], check=True)
    wait_until(lambda: any(key.endswith("manifest.json") for key in run.list("checkpoints/")), training, log)

    cluster.add_node(**MACHINE)
    cluster.remove_node(first, allow_graceful=False)
    reached = steps_told(tmp_path)
    wait_until(lambda: steps_told(tmp_path) > reached + 4 * ASK_EVERY, training, log)
    training.send_signal(signal.SIGTERM)
    assert training.wait(120) == 143, log.read_text()[-3000:]

    lines = log_lines(run, LOG)
    assert sorted(lines) == list(range(1, len(lines) + 1))
    samples = [sample for step in sorted(lines) for sample in lines[step]["samples"]]
    epochs = [samples[start : start + ROWS] for start in range(0, len(samples) - ROWS, ROWS)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
