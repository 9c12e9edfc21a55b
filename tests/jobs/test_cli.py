"""What a job says while it works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instantbooth.errors import ParameterError
from jobs import build_miniature, cli, demo, evaluate
from jobs.benchmarks import engine

ROOT = Path(__file__).parents[2]


def test_without_a_terminal_lines_tell_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "PLAIN_EVERY_S", 2.0)
    with cli.following("training", 1000, lambda: (102, "loss 0.1"), done=100):
        time.sleep(3.5)  # it looks at 1, 2 and 3 s, and tells at two of them
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training:")]
    pattern = r"training: 102 of 1000, loss 0\.1, (\S+) a second, 0:\d\d:\d\d left"
    rates = [float(told[1]) for line in lines if (told := re.fullmatch(pattern, line))]
    assert len(rates) == len(lines) == 2, "it looked more often than it told"
    assert rates[0] < 2.1, "two steps in the first second, whatever an earlier run did"
    assert 0 < rates[1] < rates[0], "no step since"


def test_an_address_without_a_ray_is_told_in_a_line() -> None:
    code = "from jobs import cli, cluster\nwith cli.ending(), cluster.ray_cluster(): pass"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/platform{os.pathsep}{ROOT}", "RAY_ADDRESS": "127.0.0.1:9"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "error: RAY_ADDRESS must name a Ray that runs, is '127.0.0.1:9' (" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_ctrl_c_while_modules_are_imported_leaves_no_traceback() -> None:
    code = "import jobs; raise {}"
    stopped, broken = (
        subprocess.run([sys.executable, "-c", code.format(error)], cwd=ROOT, capture_output=True, text=True)
        for error in ("KeyboardInterrupt", "RuntimeError")
    )
    assert (stopped.stderr, stopped.returncode != 0) == ("", True)
    assert "RuntimeError" in broken.stderr


def test_a_bar_that_learns_nothing_hides_no_ending() -> None:
    def look() -> tuple[int, str]:
        raise ConnectionError("whom it asks is gone")

    with pytest.raises(ValueError, match="the real reason"), cli.following("training", 10, look):
        raise ValueError("the real reason")


@pytest.mark.parametrize(
    ("run", "config"),
    [
        (demo.run, demo.DemoConfig),
        (build_miniature.run, build_miniature.BuildConfig),
        (evaluate.miniature, evaluate.MiniatureExamination),
        (engine.engine, engine.EngineBenchmark),
    ],
)
def test_an_output_that_is_no_folder_is_refused_before_the_work(
    run: Callable[[Any], object], config: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ParameterError, match="is no folder to write in"):
            run(config(output=output))
