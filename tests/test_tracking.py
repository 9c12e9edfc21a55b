"""What is logged beside a training: it never waits, and what a server that is down missed comes later."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from instantbooth import tracking
from instantbooth.errors import TrackingError
from instantbooth.tracking import Delivery, open_run

STEPS = {step: {"step": float(step), "loss": 1 / step} for step in range(1, 301)}


def test_metrics_arrive_in_one_run_whoever_opens_it(tmp_path: Path) -> None:
    tracking_uri, output = f"sqlite:///{tmp_path}/mlflow.db", "s3://bucket/run"
    delivery = Delivery(tracking_uri, output, artifacts=(tmp_path / "artifacts").as_uri())
    for step, values in STEPS.items():
        delivery.log(values, step)
    delivery.keep("pictures/000000100.png", b"PNG")
    assert delivery.close(60) == 0
    run = open_run(tracking_uri, output)
    assert run.kept("pictures") == {"pictures/000000100.png"}
    assert dict(run.curve("loss")) == {step: values["loss"] for step, values in STEPS.items()}
    assert run.deliver(STEPS | {301: {"step": 301.0, "loss": 0.5}}) == 1
    assert run.deliver(STEPS) == 0
    assert (
        open_run(tracking_uri, f"{output}/").run_id == run.run_id != open_run(tracking_uri, "s3://bucket/other").run_id
    )


def test_a_step_that_was_delivered_in_part_is_delivered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(f"sqlite:///{tmp_path}/mlflow.db", "s3://bucket/run")
    monkeypatch.setattr(tracking, "MAX_METRICS", 3)
    send, requests = MlflowClient.log_batch, []

    def send_once(client: MlflowClient, run_id: str, metrics: list[Metric]) -> None:
        requests.append(metrics)
        if len(requests) == 2:
            raise ConnectionError("the line was cut")
        send(client, run_id, metrics=metrics)

    monkeypatch.setattr(MlflowClient, "log_batch", send_once)
    steps = {step: STEPS[step] for step in range(1, 5)}
    with pytest.raises(TrackingError, match="the line was cut"):
        run.log_steps(steps)
    assert len(run.curve("loss")) == 2, "the cut must come within the second step, or it shows nothing"
    assert run.deliver(steps) == 3
    assert dict(run.curve("loss")) == {step: values["loss"] for step, values in steps.items()}


def test_a_server_that_is_down_costs_no_time_and_loses_nothing(tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"
    delivery = Delivery(closed, "s3://bucket/run")
    began = time.perf_counter()
    for step, values in STEPS.items():
        delivery.log(values, step)
    assert time.perf_counter() - began < 0.5
    assert delivery.close(5) == len(STEPS)
    began = time.perf_counter()
    with pytest.raises(TrackingError, match="cannot be had"):
        open_run(closed, "s3://bucket/run")
    assert time.perf_counter() - began < 5
    later = open_run(f"sqlite:///{tmp_path}/mlflow.db", "s3://bucket/run")
    assert later.deliver(STEPS) == len(STEPS)
