"""MLflow: a training's run, its curves, the registered model, and where a weights URI points.

Everything is keyed by step and goes through MlflowClient with an explicit tracking URI: no global state, so a driver
and its workers can write to one run, and a step that is replayed after a failure replaces itself in the curve.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from instantbooth.errors import InstantBoothError, TrackingError, WeightsError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "instantbooth"
MODEL = "instantbooth"
CANDIDATE = "candidate"
"""Alias of the newest version of the registered model."""
CHAMPION = "champion"
"""Alias of the version that passed its examination last."""
BASE = "instantbooth.base"
IMAGE_ENCODER = "instantbooth.image_encoder"
"""Tags of a version: the model that its weights belong to."""
WEIGHTS = "weights"
"""Artifact path of the servable weights folder inside a run."""
OUTPUT = "instantbooth.output"
"""Tag by which the run of an output folder is found again."""
STEP = "instantbooth.step"
ABSENT = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}
"""MLflow's codes for a version or an alias that it does not have."""
MAX_METRICS, MAX_PARAMETERS = 1000, 100
"""MLflow takes so many in one request."""
DELIVERY_S = 5.0
"""Between deliveries: MLflow's client takes four times as long for ten steps one by one, and holds up the training."""
MAX_PAUSE_S = 30.0
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""Of MLflow's client, where the environment does not say otherwise. Seconds; a long upload may need more."""

log = logging.getLogger(__name__)

SQLITE = "sqlite:///"
MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/]+))")


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """One run. Picklable: a worker logs to the run its driver opened."""

    tracking_uri: str
    """Such as sqlite:///mlflow.db or http://mlflow:5000."""
    run_id: str

    def log_parameters(self, values: Mapping[str, object]) -> None:
        """Logs parameters. One that a restart has changed keeps its first value; the new one becomes a tag."""
        from mlflow.entities import Param

        client = _client(self.tracking_uri)
        known = client.get_run(self.run_id).data.params
        new = [Param(name, str(value)) for name, value in values.items() if name not in known]
        for start in range(0, len(new), MAX_PARAMETERS):
            client.log_batch(self.run_id, params=new[start : start + MAX_PARAMETERS])
        changed = {name: value for name, value in values.items() if known.get(name, str(value)) != str(value)}
        self.tag({f"restarted_with.{name}": value for name, value in changed.items()})

    def deliver(self, steps: Mapping[int, Mapping[str, float]]) -> int:
        """Logs the metrics of those steps that the run lacks, by its metric "step"; returns how many these were."""
        known = {step for step, _ in self.curve("step")}
        missing = {step: values for step, values in steps.items() if step not in known}
        self.log_steps(missing)
        return len(missing)

    def log_steps(self, steps: Mapping[int, Mapping[str, float]]) -> None:
        """Logs the metrics of many steps in few requests."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # "step" comes last: `deliver` takes a step that has it for delivered whole.
        metrics = [
            Metric(name, value, now, step)
            for step, values in steps.items()
            for name, value in sorted(values.items(), key=lambda item: item[0] == "step")
        ]
        for start in range(0, len(metrics), MAX_METRICS):
            with reporting(self.tracking_uri):
                _client(self.tracking_uri).log_batch(self.run_id, metrics=metrics[start : start + MAX_METRICS])

    def keep(self, files: Mapping[str, bytes]) -> None:
        """Keeps files as artifacts of the run, by their keys."""
        with reporting(self.tracking_uri), tempfile.TemporaryDirectory() as scratch:
            for key, data in files.items():
                folder, _, name = key.rpartition("/")
                path = Path(scratch) / name
                path.write_bytes(data)
                _client(self.tracking_uri).log_artifact(self.run_id, str(path), folder or None)

    def kept(self, folder: str) -> set[str]:
        """Keys of the artifacts in a folder."""
        return {each.path for each in _client(self.tracking_uri).list_artifacts(self.run_id, folder)}

    def tag(self, values: Mapping[str, object]) -> None:
        """Sets tags; an older value is replaced."""
        client = _client(self.tracking_uri)
        for name, value in values.items():
            client.set_tag(self.run_id, name, value)

    def end(self, status: str) -> None:
        """FINISHED, KILLED or FAILED. TrackingError where MLflow cannot be had."""
        with reporting(self.tracking_uri):
            _client(self.tracking_uri).set_terminated(self.run_id, status)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric in the order of steps; of a step logged twice the later value."""
        history = _client(self.tracking_uri).get_metric_history(self.run_id, metric)
        return sorted({each.step: each.value for each in sorted(history, key=lambda each: each.timestamp)}.items())

    def register(self, folder: Path, *, step: int, base: str, image_encoder: str | None = None) -> str:
        """Logs a weights folder, registers it as a new version and moves the alias "candidate" to it.

        `base` and `image_encoder` name the model that the weights belong to, for whoever loads them by URI.
        Returns the version's URI, such as models:/instantbooth/3. Weights of a step that are registered already are
        not registered again.
        """
        client = _client(self.tracking_uri)
        done = client.search_model_versions(f"run_id = '{self.run_id}'")
        known = next((version.version for version in done if version.tags.get(STEP) == str(step)), None)
        number = int(known or self._new_version(folder, step, base, image_encoder))
        # A registration that was cut short has left a version without its alias.
        candidate = Registry(self.tracking_uri).find(CANDIDATE)
        if candidate is None or int(candidate.number) < number:
            client.set_registered_model_alias(MODEL, CANDIDATE, str(number))
        return f"models:/{MODEL}/{number}"

    def _new_version(self, folder: Path, step: int, base: str, image_encoder: str | None) -> str:
        from mlflow.exceptions import MlflowException

        client = _client(self.tracking_uri)
        client.log_artifacts(self.run_id, str(folder), f"{WEIGHTS}/{step}")
        try:
            client.create_registered_model(MODEL)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = {STEP: str(step), BASE: base, IMAGE_ENCODER: image_encoder or ""}
        source = f"{client.get_run(self.run_id).info.artifact_uri}/{WEIGHTS}/{step}"
        return str(client.create_model_version(MODEL, source, self.run_id, tags=tags).version)


class Delivery:
    """Logs beside the training: `log` never waits. What a server that is down misses is tried again while it lasts.

    It opens the run of the output itself, so that it needs no server to begin with.
    """

    def __init__(self, tracking_uri: str, output: str, *, artifacts: str | None = None) -> None:
        self._open = (tracking_uri, output, artifacts)
        self._waiting: dict[int, dict[str, float]] = {}
        self._files: dict[str, bytes] = {}
        self._news = threading.Condition()
        self._closing = False
        self._status = ""
        self.trouble = ""
        """What the last delivery failed with; empty after one that did not."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes the metrics of a step."""
        with self._news:
            self._waiting[step] = {**self._waiting.get(step, {}), **values}
            self._news.notify()

    def keep(self, key: str, data: bytes) -> None:
        """Takes a file to keep as an artifact."""
        with self._news:
            self._files[key] = data
            self._news.notify()

    def close(self, patience_s: float = 10.0, *, status: str = "") -> int:
        """Delivers what is left, for so long; returns the steps that were not delivered.

        With a status, FINISHED, KILLED or FAILED, it then ends the run, if it has opened one.
        """
        with self._news:
            self._closing, self._status = True, status
            self._news.notify()
        self._thread.join(patience_s)
        return len(self._waiting)

    def _run(self) -> None:
        tracking_uri, output, artifacts = self._open
        run: TrackedRun | None = None
        pause_s = 0.0
        while any(news := self._next(pause_s)):
            batch, files = news
            try:
                run = run or open_run(tracking_uri, output, artifacts=artifacts)
                run.log_steps(batch)
                run.keep(files)
            except TrackingError as error:
                log.warning("%s", error)
                self.trouble = str(error)
                pause_s = min(2 * pause_s or 1.0, MAX_PAUSE_S)
                if self._closing:
                    return
                continue
            pause_s, self.trouble = DELIVERY_S, ""
            with self._news:
                for step, values in batch.items():
                    if self._waiting.get(step) == values:
                        del self._waiting[step]
                for key in files:
                    del self._files[key]
        if run is not None and self._status:
            try:
                run.end(self._status)
            except TrackingError as error:
                log.warning("%s", error)

    def _next(self, pause_s: float) -> tuple[dict[int, dict[str, float]], dict[str, bytes]]:
        """The metrics and files that wait, once there are some; nothing at the end."""
        with self._news:
            self._news.wait_for(lambda: self._closing, timeout=pause_s)
            self._news.wait_for(lambda: self._waiting or self._files or self._closing)
            return dict(self._waiting), dict(self._files)


def open_run(tracking_uri: str, output: str, *, artifacts: str | None = None) -> TrackedRun:
    """The run of that output folder (a URI), or a new one, set running. TrackingError where MLflow cannot be had.

    `artifacts` is the URI below which a new experiment keeps its artifacts; None leaves it to the tracking server.
    """
    # A query cannot quote an apostrophe.
    output = (output.rstrip("/") or "/").replace("'", "%27")
    with reporting(tracking_uri):
        client = _client(tracking_uri)
        found = client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        run = _run_of(client, experiment, output) or client.create_run(
            experiment, run_name=output.rpartition("/")[2], tags={OUTPUT: output}
        )
        client.update_run(run.info.run_id, status="RUNNING")
        return TrackedRun(tracking_uri=tracking_uri, run_id=run.info.run_id)


@contextmanager
def reporting(tracking_uri: str) -> Iterator[None]:
    """Raises TrackingError for whatever goes wrong between here and the server."""
    try:
        yield
    except InstantBoothError:
        raise
    except Exception as error:
        # MLflow's own errors, those of its database layer and those of HTTP have no base in common.
        told = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" …")
        raise TrackingError(f"MLflow at {tracking_uri} cannot be had ({told}); start it, or name another") from error


@dataclass(frozen=True, kw_only=True)
class Version:
    """A registered version of the model."""

    number: str
    base: str
    """Preset or folder of the model that it was trained for; empty where that was not noted."""
    image_encoder: str
    """Its CLIP folder; empty for the base's own."""
    created_ms: int
    """When it was registered, since 1970."""
    name: str = MODEL

    @property
    def uri(self) -> str:
        """Such as models:/instantbooth/3."""
        return f"models:/{self.name}/{self.number}"


@dataclass(frozen=True)
class Registry:
    """The versions of one tracking server.

    Every method raises WeightsError for what is not there, TrackingError where the server could not be asked.
    """

    tracking_uri: str

    def version(self, which: str, name: str = MODEL) -> Version:
        """The version of a number or an alias."""
        from mlflow.exceptions import MlflowException

        numbered = which.isdigit()
        with reporting(self.tracking_uri):
            client = _client(self.tracking_uri)
            look_up = client.get_model_version if numbered else client.get_model_version_by_alias
            try:
                found = look_up(name, which)
            except MlflowException as error:
                if error.error_code not in ABSENT:
                    raise
                uri = f"models:/{name}/{which}" if numbered else f"models:/{name}@{which}"
                raise WeightsError(
                    f"{uri} cannot be had from {self.tracking_uri}: {error.message}; train and register it"
                ) from error
        return Version(
            number=str(found.version),
            base=found.tags.get(BASE, ""),
            image_encoder=found.tags.get(IMAGE_ENCODER, ""),
            created_ms=found.creation_timestamp,
            name=name,
        )

    def find(self, alias: str) -> Version | None:
        """The version of an alias; None where no version has it."""
        try:
            return self.version(alias)
        except WeightsError:
            return None

    def point(self, alias: str, version: Version) -> None:
        """Moves an alias."""
        with reporting(self.tracking_uri):
            _client(self.tracking_uri).set_registered_model_alias(version.name, alias, version.number)

    def note(self, version: Version, **tags: str) -> None:
        """Sets tags of a version."""
        with reporting(self.tracking_uri):
            for name, value in tags.items():
                _client(self.tracking_uri).set_model_version_tag(version.name, version.number, name, value)

    def download(self, version: Version, folder: Path) -> Path:
        """The version's weights as a folder below `folder`."""
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        try:
            source = _client(self.tracking_uri).get_model_version_download_uri(version.name, version.number)
            return Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=self.tracking_uri))
        except (MlflowException, OSError) as error:
            raise WeightsError(
                f"{version.uri} cannot be downloaded from {self.tracking_uri} ({error}); check its artifact store"
            ) from error


def absolute_tracking_uri(uri: str) -> str:
    """The same server from any working directory: that of a relative path to an SQLite file, as any other."""
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}" if uri.startswith(SQLITE) else uri


def pinned(uri: str, tracking_uri: str) -> str:
    """The version that an alias names now, as models:/name/version; what is no alias as it is. Raises WeightsError."""
    return resolve_version(uri, tracking_uri).uri if uri.startswith("models:/") else uri


def resolve_version(uri: str, tracking_uri: str) -> Version:
    """The version that models:/name/version or models:/name@alias names now. WeightsError where there is none."""
    parts = MODEL_URI.fullmatch(uri)
    if not parts:
        raise WeightsError(f"{uri} names no version; write models:/{MODEL}/1 or models:/{MODEL}@{CANDIDATE}")
    return Registry(tracking_uri).version(parts["version"] or parts["alias"], parts["name"])


def _client(tracking_uri: str) -> MlflowClient:
    # By default MLflow waits for a server that is down for minutes.
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # A new SQLite store narrates each of its fifty schema migrations.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri, registry_uri=tracking_uri)


def _run_of(client: MlflowClient, experiment: str, output: str) -> Run | None:
    query = f"tags.`{OUTPUT}` = '{output}'"
    return next(iter(client.search_runs([experiment], query, max_results=1)), None)
