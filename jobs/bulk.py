"""Runs the bulk job and tells how it goes: a bar on a terminal, else lines of JSON; and counters in MLflow."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from instantbooth.errors import ParameterError
from instantbooth.storage import absolute_uri
from instantbooth.tracking import Delivery
from jobs.cluster import ray_cluster
from pipelines.outcome import PAGE, Outcome, PersonalizeReport
from pipelines.personalize import PersonalizeConfig, Tally, personalize

EVERY_S = 10.0
"""Seconds between two lines, and between two points of a curve in MLflow."""

CLOSING_S = 30.0
"""So long MLflow is waited for at the end, where it was told anything."""

Tell = Callable[[Tally, Outcome | None], None]


@dataclass(frozen=True, kw_only=True)
class BulkConfig(PersonalizeConfig):
    """What is generated, with what, where it goes, and who is told."""

    log: Path | None = None
    """File that events are appended to, a JSON object a line; without one and without a terminal they go to stderr."""
    track: bool = True
    """Whether counters go to MLflow, at model.tracking_uri."""


def run(config: BulkConfig) -> PersonalizeReport:
    """Personalizes on the cluster, which is started or joined where there is work, and prints the counts."""
    with _event_log(config.log) as write, _bar() as show:
        logged = _events(write)

        def tell(tally: Tally, outcome: Outcome | None) -> None:
            logged(tally, outcome)
            show(tally, outcome)
            if tracked is not None:
                tracked(tally, outcome)

        with _stop_told(write), _tracked(config) as tracked:
            report = personalize(config, tell, ray_cluster)
        write("finished", {name: value for name, value in asdict(report).items() if name != "gpus"})
    console = Console(soft_wrap=True)
    done = report.rows - report.failed
    console.print(f"{report.images} pictures for {done} of {report.rows} rows at {config.output}; see {PAGE}")
    if not report.exactly_once:
        console.print("NOT EXACTLY ONCE: the store has no conditional writes", style="bold red")
    return report


@contextmanager
def _stop_told(write: Callable[[str, dict[str, object]], None]) -> Iterator[None]:
    """The event of a run that ends otherwise than well."""
    try:
        yield
    except BaseException as error:
        # Of an error in a worker Ray makes one whose text is a traceback.
        cause = getattr(error, "cause", error)
        write("stopped", {"kind": type(cause).__name__, "error": str(cause)})
        raise


def _events(write: Callable[[str, dict[str, object]], None]) -> Tell:
    """Tells of the start, of every row that failed or stayed open, and every few seconds how far the run is."""
    due = time.monotonic()

    def tell(tally: Tally, outcome: Outcome | None) -> None:
        nonlocal due
        if outcome is None:
            write("started", {"rows": tally.rows, "images": tally.images})
        elif outcome.failed or outcome.open:
            write("row_failed" if outcome.failed else "row_open", asdict(outcome))
        if outcome is not None and (time.monotonic() >= due or tally.done == tally.rows):
            due = time.monotonic() + EVERY_S
            left = None if tally.seconds_left is None else round(tally.seconds_left)
            write("progress", {"rows": tally.rows, **_counters(tally), "seconds_left": left})

    return tell


def _counters(tally: Tally) -> dict[str, object]:
    return {
        "rows_done": tally.done,
        "rows_failed": tally.failed,
        "rows_open": tally.open,
        "images": tally.made,
        "images_per_second": round(tally.images_per_second, 3),
    }


@contextmanager
def _event_log(path: Path | None) -> Iterator[Callable[[str, dict[str, object]], None]]:
    """Writes an event with its time and values as one line of JSON."""
    file: IO[str] | None = None if path is None and sys.stderr.isatty() else sys.stderr
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except OSError as error:
            raise ParameterError(
                f"log must be a file that can be written, is {path} ({error}); name another"
            ) from error

    def write(event: str, values: dict[str, object]) -> None:
        if file is not None:
            line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **values}
            print(json.dumps(line), file=file, flush=True)

    try:
        yield write
    finally:
        if path is not None and file is not None:
            file.close()


@contextmanager
def _bar() -> Iterator[Tell]:
    """Rows done and failed, pictures a second, and the time that is left; on a terminal only."""
    columns = (TextColumn("personalizing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[word]}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None, word="starting")

        def tell(tally: Tally, outcome: Outcome | None) -> None:
            left = "" if tally.seconds_left is None else f", {timedelta(seconds=round(tally.seconds_left))} left"
            word = f"{tally.failed} failed, {tally.images_per_second:.2f} images/s{left}"
            progress.update(bar, total=tally.rows, completed=tally.done, word=word)

        yield tell


@contextmanager
def _tracked(config: BulkConfig) -> Iterator[Tell | None]:
    """Curves of the counters by rows done, in the run of the output; a tracking server that is down delays nothing."""
    if not config.track:
        yield None
        return
    delivery = Delivery(config.model.tracking_uri, absolute_uri(config.output))
    status = "FAILED"
    try:
        yield _curves(delivery)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        # Ray makes a SIGTERM a SystemExit.
        status = "KILLED"
        raise
    finally:
        if missed := delivery.close(CLOSING_S, status=status):
            why = delivery.trouble or f"MLflow at {config.model.tracking_uri} did not answer in time"
            Console(stderr=True, soft_wrap=True).print(f"{missed} points of the curves are lost: {why}")


def _curves(delivery: Delivery) -> Tell:
    due = time.monotonic()

    def tell(tally: Tally, outcome: Outcome | None) -> None:
        nonlocal due
        if time.monotonic() >= due or tally.done == tally.rows:
            due = time.monotonic() + EVERY_S
            delivery.log({name: float(str(value)) for name, value in _counters(tally).items()}, tally.done)

    return tell
