"""What every entry point shares: options from a configuration's fields, and errors as one clear line."""

from __future__ import annotations

import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from instantbooth.errors import InstantBoothError, ParameterError, StoppedError

PLAIN_EVERY_S = 60.0
"""Between two lines that stand for a progress bar."""

Config = TypeVar("Config")
Flat = Annotated[Config, tyro.conf.arg(name="")]
"""A command's configuration, whose fields are its options: `def adapter(options: cli.Flat[AdapterBenchmark])`."""


def main(run: Callable[[Config], object], config: type[Config], description: str | None) -> None:
    """Runs a job with the configuration given on the command line; errors end it as `ending` says."""
    with ending():
        run(tyro.cli(config, description=description))


def commands(runs: Mapping[str, Callable[..., object]], description: str | None) -> None:
    """Runs the command named first on the command line, a function of one Flat configuration."""
    with ending():
        tyro.extras.subcommand_cli_from_dict(dict(runs), description=description)


def command_line(command: str, options: Any) -> str:
    """The command that is given these options: those that differ from their defaults."""
    return shlex.join(["python", "-m", *command.split(), *_given(options, type(options)())])


def _given(options: Any, defaults: Any, prefix: str = "") -> Iterator[str]:
    for each in fields(options):
        value, default = getattr(options, each.name), getattr(defaults, each.name)
        if value == default:
            continue
        if is_dataclass(value):
            yield from _given(value, default, prefix if "Flat" in str(each.type) else f"{prefix}{each.name}.")
        else:
            yield f"--{prefix}{each.name}".replace("_", "-")
            yield from map(str, value if isinstance(value, tuple) else [value])


@contextmanager
def ending() -> Iterator[None]:
    """Exit status 2 and one line for a user's error, 130 for Ctrl-C, 143 for SIGTERM that was heeded.

    Anything else is a defect with its traceback.
    """
    try:
        yield
    except StoppedError as error:
        Console(stderr=True, soft_wrap=True).print(str(error), markup=False, highlight=False)
        sys.exit(143)
    except InstantBoothError as error:
        # Ray raises a task's error as a subclass whose text is the remote traceback; its cause is the error itself.
        cause = getattr(error, "cause", error)
        Console(stderr=True, soft_wrap=True).print("error:", str(cause), style="red", markup=False, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def make_folder(output: Path) -> None:
    """Makes a job's folder of results, before there are any. ParameterError where nothing can be written there."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise ParameterError(
            f"output {str(output)!r} is no folder to write in ({error.strerror}); name another"
        ) from error


@contextmanager
def following(title: str, total: int, look: Callable[[], tuple[int, str]], *, done: int = 0) -> Iterator[None]:
    """A progress bar for work done elsewhere: `look` tells how much is done, and a word on it, once a second.

    Without a terminal a line a minute says the same. `done` is what an earlier run did: the time that is left is not
    reckoned by it.
    """
    finished = threading.Event()

    def update(progress: Progress, bar: TaskID) -> None:
        # Who is asked may be gone with the work. How that ended is not for its bar to say.
        with suppress(Exception):
            now, word = look()
            pace = _pace(now - done, total - now, progress.tasks[bar].elapsed or 0.0)
            progress.update(bar, completed=now, word=word, pace=pace)

    def follow(progress: Progress, bar: TaskID) -> None:
        due = time.monotonic()
        while not finished.wait(1.0):
            update(progress, bar)
            if not progress.console.is_terminal and time.monotonic() >= due:
                due += PLAIN_EVERY_S
                progress.console.print(_plain(progress.tasks[bar]), soft_wrap=True, markup=False, highlight=False)

    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[pace]}  {task.fields[word]}")) as progress:
        bar = progress.add_task(title, total=total, completed=done, word="", pace="")
        follower = threading.Thread(target=follow, args=(progress, bar), daemon=True)
        follower.start()
        try:
            yield
        finally:
            finished.set()
            follower.join()
            update(progress, bar)


def _pace(done: int, left: int, elapsed: float) -> str:
    """How fast it goes since its start, in words; nothing before anything is done.

    rich's own rate is that of the last seconds, and steps that take minutes come in bursts.
    """
    if done <= 0 or elapsed <= 0:
        return ""
    return f"{done / elapsed:.3g} a second, {timedelta(seconds=round(left * elapsed / done))} left"


def _plain(task: Task) -> str:
    """A bar in words."""
    words = [f"{task.description}: {task.completed:g} of {task.total:g}", task.fields["word"], task.fields["pace"]]
    return ", ".join(filter(None, words))
