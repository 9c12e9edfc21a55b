"""A long manifest, and what it costs the driver. MANY_ROWS makes it shorter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import portrait, tiny_booth, tiny_model

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parent.parent.parent
ROWS = int(os.environ.get("MANY_ROWS", "100000"))
FEW = 500

MEASURED = """
import atexit, pathlib, runpy, sys
def tell():
    peak = pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    print("peak kB:", peak, file=sys.stderr)
atexit.register(tell)
runpy.run_module("jobs.personalize", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    tiny_booth(tiny_model(folder / "model")).save_weights(folder / "model" / "weights")
    image, mask = portrait(0)
    image.putalpha(mask)
    image.save(folder / "photo.png")
    return folder


def run(folder: Path, rows: int) -> tuple[float, float]:
    """Peak memory of the driver in MB, and seconds, of a job of so many rows with one picture each."""
    manifest = folder / f"{rows}.jsonl"
    with manifest.open("w") as file:
        for number in range(rows):
            row = {
                "id": f"subject-{number:06d}",
                "images": [str(folder / "photo.png")],
                "class_noun": "person",
                "prompts": ["a photo of a {subject} at the beach"],
                "num_inference_steps": 1,
                "guidance_scale": 1.0,
                "metadata": {"order": number, "note": "carried through to the results, unread " * 20},
            }
            file.write(json.dumps(row) + "\n")
    command = [
        *(sys.executable, "-c", MEASURED, "--manifest", manifest, "--output", folder / str(rows), "--no-track"),
        *("--model.base", folder / "model" / "base", "--model.image-encoder", folder / "model" / "clip"),
        *("--model.weights", folder / "model" / "weights", "--row-budget", 32, "--rows-per-batch", 32),
        *("--diffusion.min", 2),
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/platform{os.pathsep}{ROOT}"}
    started = time.monotonic()
    ended = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    seconds = time.monotonic() - started
    megabytes = int(ended.stderr.rpartition("peak kB:")[2]) / 1000
    print(f"\n{rows:,} rows: the driver had {megabytes:.0f} MB at most, {seconds:.0f} s")
    return megabytes, seconds


def test_the_drivers_memory_hardly_grows_with_the_rows(folder: Path) -> None:
    few, _ = run(folder, FEW)
    many, _ = run(folder, ROWS)
    report = json.loads((folder / str(ROWS) / "report.json").read_text())
    assert (report["rows"], report["images"], report["failed"]) == (ROWS, ROWS, 0)
    assert many < 1000
    assert many - few < 200
    megabytes, seconds = run(folder, ROWS)
    assert json.loads((folder / str(ROWS) / "report.json").read_text()) == report
    assert seconds < 30
    assert megabytes < 1000
