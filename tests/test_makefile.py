"""What the Makefile starts, with a stranger's environment around it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("target", "program", "address"), [("demo", "python", "none"), ("serve", "serve", "local")])
def test_demo_and_serve_start_a_ray_of_their_own(target: str, program: str, address: str, tmp_path: Path) -> None:
    echo = tmp_path / program
    echo.write_text("#!/bin/sh\necho ${RAY_ADDRESS-none}\n")
    echo.chmod(0o755)
    # -o: the environment is taken for installed.
    command = ["make", "--no-print-directory", "-o", ".venv/installed", target, f"BIN={tmp_path}"]
    environment = os.environ | {"RAY_ADDRESS": "ray://elsewhere:10001"}
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == address
