"""A training's run in MLflow, as far as MLflow can be had."""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from instantbooth.errors import StorageError, TrackingError
from instantbooth.storage import open_store, patiently
from instantbooth.tracking import TrackedRun, open_run, reporting
from instantbooth.training.checkpoints import FOLDER, log_lines
from jobs.cluster import ROOT
from pipelines.feed import Shards
from pipelines.trainer import LOG, PICTURES, TrainConfig

OPENING_S = 30.0
"""So long a run is waited for. MLflow itself tries a database that is down for 100 s."""

log = logging.getLogger(__name__)


class Tracking:
    """Begins the run, registers its weights, ends it. Without MLflow all of that is a warning.

    A server that is down is waited for each time, and seconds only; what finds it first makes up for what did not.
    """

    def __init__(self, config: TrainConfig, shards: Shards) -> None:
        self.config = config
        self.shards = shards
        self._opening: Future[TrackedRun] | None = None

    def begin(self) -> None:
        """Opens the run, and notes options, data and code."""
        with self._attempt("training goes on, and what it missed is delivered when it is back"):
            self._opened()

    def register(self, step: int, files: Mapping[str, bytes], folder: str) -> tuple[str, str]:
        """The run's id and the URI of the version; empty, and the folder, where MLflow cannot be had."""
        missed = "the weights are not registered, and the same command registers them"
        with self._attempt(missed), tempfile.TemporaryDirectory() as scratch:
            run = self._opened()
            for name, data in files.items():
                (Path(scratch) / name).write_bytes(data)
            run.tag({"weights": folder})
            model = {"base": self.config.model.base, "image_encoder": self.config.model.image_encoder}
            return run.run_id, run.register(Path(scratch), step=step, **model)
        return "", folder

    def end(self, status: str) -> None:
        """Delivers what the training's own log has and the run has not, its machines too; FINISHED, KILLED, FAILED."""
        with self._attempt(f"what it missed is in {self.config.output}/{LOG}, and the same command delivers it"):
            run = self._opened()
            store = open_store(self.config.output)
            lines = log_lines(store, LOG)
            run.deliver({step: line["metrics"] for step, line in lines.items()})
            run.tag({"machine": ", ".join(sorted({line["machine"] for line in lines.values()}))})
            missing = set(store.list(f"{PICTURES}/")) - run.kept(PICTURES)
            run.keep({key: patiently(partial(store.get, key)) for key in missing})
            run.end(status)

    def _opened(self) -> TrackedRun:
        """The run, once MLflow has it. TrackingError after OPENING_S: the opening goes on, for the next to find."""
        if self._opening is None or (self._opening.done() and self._opening.exception()):
            self._opening = Future()
            threading.Thread(target=self._open, args=(self._opening,), daemon=True).start()
        try:
            return self._opening.result(OPENING_S)
        except TimeoutError as error:
            uri = self.config.model.tracking_uri
            raise TrackingError(
                f"MLflow at {uri} did not answer within {OPENING_S:g} s; start it, or name another"
            ) from error

    def _open(self, opening: Future[TrackedRun]) -> None:
        """Opens the run, and notes options, data, code, and where checkpoints are."""
        tracking_uri = self.config.model.tracking_uri
        try:
            with reporting(tracking_uri):
                run = open_run(tracking_uri, self.config.run, artifacts=self.config.artifacts)
                run.log_parameters(flat(asdict(self.config)) | {"dataset_digest": self.shards.digest})
                run.tag(_provenance() | {"checkpoints": f"{self.config.run}/{FOLDER}"})
            opening.set_result(run)
        except Exception as error:
            opening.set_exception(error)

    @contextmanager
    def _attempt(self, consequence: str) -> Iterator[None]:
        """A failure ends the attempt and is told, with what follows from it."""
        try:
            with reporting(self.config.model.tracking_uri):
                yield
        except (TrackingError, StorageError) as error:
            log.warning("%s; %s", error, consequence)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested options by dotted names."""
    found: dict[str, object] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _provenance() -> dict[str, object]:
    """Which code; on which machine, the log says."""
    return {
        "code": revision(),
        "torch": torch.__version__,
        "ray": ray.__version__,
    }


def revision() -> str:
    """The code that runs: its revision, or that there is none."""
    # An image has no repository: its build says what it holds.
    if built_from := os.environ.get("CODE_REVISION"):
        return built_from
    command = ["git", "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not under version control"
    return said.stdout.strip()
