"""A training's run in MLflow, where MLflow comes and goes."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from instantbooth.errors import ParameterError
from instantbooth.storage import FileStore
from instantbooth.training.checkpoints import log_bytes
from jobs import tracked, train
from jobs.tracked import Tracking
from pipelines.feed import Shards
from pipelines.model import ModelConfig
from pipelines.trainer import LOG, TrainConfig


@pytest.fixture
def tracking(tmp_path: Path) -> Tracking:
    """Of a training of one step."""
    lines = [{"step": 1, "metrics": {"step": 1.0, "loss": 0.5}, "machine": "1 × here", "samples": []}]
    FileStore(tmp_path / "run").put(f"{LOG}1-1.jsonl", log_bytes(lines))
    config = TrainConfig(
        data="curated",
        output=f"{tmp_path}/run",
        model=ModelConfig(tracking_uri=f"sqlite:///{tmp_path}/mlflow/mlflow.db"),
        artifacts=(tmp_path / "artifacts").as_uri(),
    )
    return Tracking(config, Shards(uris=(), rows=(), digests=("abc",)))


def run_of(tracking: Tracking) -> Run:
    """The one run of the tracking server."""
    client = MlflowClient(tracking.config.model.tracking_uri)
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return run


def test_what_mlflow_missed_is_made_up_for_when_it_is_back(tracking: Tracking, tmp_path: Path) -> None:
    in_the_way = tmp_path / "mlflow"
    in_the_way.touch()
    tracking.begin()
    assert tracking.register(1, {}, "file:///weights") == ("", "file:///weights")
    in_the_way.unlink()
    tracking.end("FINISHED")
    run = run_of(tracking)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["loss"] == 0.5
    assert run.data.params["adapters.batch_size"] == "32"
    assert run.data.params["dataset_digest"] == tracking.shards.digest
    assert run.data.tags["code"]
    assert run.data.tags["checkpoints"] == f"file://{tmp_path}/run/checkpoints"


def test_a_database_that_does_not_answer_is_waited_for_a_bounded_time(
    tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No file can be opened here, and MLflow tries for a minute and a half.
    in_the_way = tmp_path / "mlflow" / "mlflow.db"
    in_the_way.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(tracked, "OPENING_S", 0.5)
        began = time.perf_counter()
        tracking.begin()
        tracking.register(1, {}, "file:///weights")
        assert time.perf_counter() - began < 5
    in_the_way.rmdir()
    monkeypatch.setattr(tracked, "OPENING_S", 120)
    tracking.end("KILLED")
    assert run_of(tracking).info.status == "KILLED"


def test_a_submitted_job_keeps_no_registry_in_its_own_folder(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    train.check_tracking(tracking.config)
    with pytest.raises(ParameterError, match=r"sqlite:///mlflow\.db, in a folder that goes with this submitted job"):
        train.run(replace(tracking.config, model=ModelConfig(tracking_uri="sqlite:///mlflow.db")))
