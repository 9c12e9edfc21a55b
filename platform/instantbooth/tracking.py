"""MLflow: a training's run, its curves, the registered model, and where a weights URI points.

Everything is keyed by step and goes through MlflowClient with an explicit tracking URI: no global state, so a driver
and its workers can write to one run, and a step that is replayed after a failure replaces itself in the curve.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from instantbooth.errors import WeightsError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "instantbooth"
MODEL = "instantbooth"
CANDIDATE = "candidate"
"""Alias of the newest version of the registered model."""
WEIGHTS = "weights"
"""Artifact path of the servable weights folder inside a run."""
RUN_NAME = "instantbooth.run_name"

MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/]+))")


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """One run. Picklable: a worker logs to the run its driver opened."""

    tracking_uri: str
    """Such as sqlite:///mlflow.db or http://mlflow:5000."""
    run_id: str

    def log_parameters(self, values: Mapping[str, object]) -> None:
        """Logs parameters; a value that was logged before must be the same."""
        client = _client(self.tracking_uri)
        for name, value in values.items():
            client.log_param(self.run_id, name, value)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Logs the metrics of one step in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        _client(self.tracking_uri).log_batch(self.run_id, metrics=metrics)

    def latest(self) -> dict[str, float]:
        """The last value of every metric."""
        return dict(_client(self.tracking_uri).get_run(self.run_id).data.metrics)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric in the order of steps; of a step logged twice the later value."""
        history = _client(self.tracking_uri).get_metric_history(self.run_id, metric)
        return sorted({each.step: each.value for each in sorted(history, key=lambda each: each.timestamp)}.items())

    def register(self, folder: Path) -> str:
        """Logs a weights folder, registers it as a new version and moves the alias "candidate" to it.

        Returns the version's URI, such as models:/instantbooth/3.
        """
        from mlflow.exceptions import MlflowException

        client = _client(self.tracking_uri)
        client.log_artifacts(self.run_id, str(folder), WEIGHTS)
        try:
            client.create_registered_model(MODEL)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{client.get_run(self.run_id).info.artifact_uri}/{WEIGHTS}"
        version = client.create_model_version(MODEL, source, self.run_id).version
        client.set_registered_model_alias(MODEL, CANDIDATE, version)
        return f"models:/{MODEL}/{version}"


@contextmanager
def tracked_run(tracking_uri: str, name: str, *, artifacts: str | None = None) -> Iterator[TrackedRun]:
    """The unfinished run of that name, or a new one; FINISHED at the end, KILLED by Ctrl-C, FAILED by an error.

    `artifacts` is the URI below which a new experiment keeps its artifacts; None leaves it to the tracking server.
    """
    client = _client(tracking_uri)
    found = client.get_experiment_by_name(EXPERIMENT)
    experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT, artifact_location=artifacts)
    run = _unfinished_run(client, experiment, name) or client.create_run(
        experiment, run_name=name, tags={RUN_NAME: name}
    )
    client.update_run(run.info.run_id, status="RUNNING")
    status = "FAILED"
    try:
        yield TrackedRun(tracking_uri=tracking_uri, run_id=run.info.run_id)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        client.set_terminated(run.info.run_id, status)


def resolve_weights(uri: str, tracking_uri: str, folder: Path) -> Path:
    """The local folder of weights at a plain path, or of models:/name/version and models:/name@alias.

    Registered weights are downloaded below `folder`. Raises WeightsError for a name, version or alias that does not
    exist, and for a path that is no folder.
    """
    if not uri.startswith("models:/"):
        path = Path(uri)
        if not path.is_dir():
            raise WeightsError(f"{uri} is no folder; name a weights folder, or models:/{MODEL}@{CANDIDATE}")
        return path
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    parts = MODEL_URI.fullmatch(uri)
    if not parts:
        raise WeightsError(f"{uri} names no version; write models:/{MODEL}/1 or models:/{MODEL}@{CANDIDATE}")
    client = _client(tracking_uri)
    try:
        version = parts["version"] or client.get_model_version_by_alias(parts["name"], parts["alias"]).version
        source = client.get_model_version_download_uri(parts["name"], str(version))
        return Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=tracking_uri))
    except MlflowException as error:
        raise WeightsError(
            f"{uri} cannot be had from {tracking_uri}: {error.message}; train and register it"
        ) from error


def _client(tracking_uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    # A new SQLite store narrates each of its fifty schema migrations.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri, registry_uri=tracking_uri)


def _unfinished_run(client: MlflowClient, experiment: str, name: str) -> Run | None:
    query = f"tags.`{RUN_NAME}` = '{name}' and attributes.status != 'FINISHED'"
    return next(iter(client.search_runs([experiment], query, max_results=1)), None)
