"""A long manifest, and what it costs the driver. MANY_ROWS makes it shorter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.outcome import REPORT, SUCCESS, PersonalizeReport
from pipelines.plan import IMAGES
from tests.chaos.inputs import model_options, photo, write_model
from tests.measured import MEASURED, Taken

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parent.parent.parent
ROWS = int(os.environ.get("MANY_ROWS", "100000"))
FEW = 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_model(folder / "model")
    (folder / "photo.png").write_bytes(photo(0))
    return folder


def write_manifest(folder: Path, rows: int) -> Path:
    """So many rows with one picture each."""
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
    return manifest


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the job."""

    megabytes: float
    """The driver's, at most."""
    seconds: float
    report: PersonalizeReport


def run(manifest: Path) -> Run:
    """Runs the job into a folder beside the manifest."""
    output = manifest.with_suffix("")
    command = [
        *(sys.executable, "-c", MEASURED, "--manifest", manifest, "--output", output, "--no-track"),
        *(*model_options(manifest.parent / "model"), "--row-budget", 32, "--rows-per-batch", 32, "--diffusion.min", 2),
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/platform{os.pathsep}{ROOT}"}
    started = time.monotonic()
    ended = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    seconds = time.monotonic() - started
    report = PersonalizeReport(**json.loads((output / REPORT).read_text()))
    megabytes = Taken.of(ended.stderr).megabytes
    print(f"\n{report.rows:,} rows, {report.made:,} pictures made: {megabytes:.0f} MB at most, {seconds:.0f} s")
    return Run(megabytes=megabytes, seconds=seconds, report=report)


def counts(report: PersonalizeReport) -> tuple[int, int, int]:
    return report.rows, report.images, report.failed


def newest_file(folder: Path) -> float:
    return max(Path(parent, name).stat().st_mtime for parent, _, names in os.walk(folder) for name in names)


def test_the_drivers_memory_hardly_grows_with_the_rows(folder: Path) -> None:
    few = run(write_manifest(folder, FEW))
    manifest = write_manifest(folder, ROWS)
    many = run(manifest)
    assert counts(many.report) == (ROWS, ROWS, 0)
    assert many.report.made == ROWS
    assert many.megabytes < 1000
    assert many.megabytes - few.megabytes < 200
    again = run(manifest)
    assert again.report == many.report
    assert again.seconds < 30
    assert again.megabytes < 1000
    output = manifest.with_suffix("")
    made = newest_file(output / IMAGES)
    (output / SUCCESS).unlink()
    resumed = run(manifest)
    assert counts(resumed.report) == (ROWS, ROWS, 0)
    assert resumed.report.made == 0
    assert newest_file(output / IMAGES) == made
    assert resumed.megabytes < 1000
