"""Ctrl-C in the demo, at the stages that have processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
MARK = "INSTANTBOOTH_INTERRUPTED"


def descendants(mark: str) -> dict[int, str]:
    """Process id → command line of all that carry this mark in their environment, wherever Ray has put them."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.5)
    return False


@pytest.mark.parametrize(
    ("stage", "shown_by"),
    [
        ("training", lambda output: any(output.glob("training/*/checkpoints/*"))),
        ("personalizing", lambda output: any(output.glob("store/*/results/images/*/*.png"))),
    ],
)
def test_ctrl_c_ends_every_process_it_started(tmp_path: Path, stage: str, shown_by: Callable[[Path], bool]) -> None:
    output, mark = tmp_path / "demo", tmp_path.name
    steps = 20_000 if stage == "training" else 2
    command = [sys.executable, "-m", "jobs.demo", "--output", output, "--training.steps", steps]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}", MARK: mark}
    with (tmp_path / "log").open("wb") as log:
        demo = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # A shell's background jobs ignore Ctrl-C, and so does what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            assert wait_for(lambda: demo.poll() is not None or shown_by(output), 480)
            assert demo.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert len(descendants(mark)) > 5
            # As a terminal does it: the whole foreground group hears it.
            os.killpg(demo.pid, signal.SIGINT)
            assert demo.wait(60) == 130, (tmp_path / "log").read_text()[-3000:]
        finally:
            demo.kill()
    assert wait_for(lambda: not descendants(mark), 10), descendants(mark)
    assert "Traceback" not in (tmp_path / "log").read_text()
