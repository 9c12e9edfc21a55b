"""The dry run: every fault at once, an estimate that says what it assumes, and little memory."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from instantbooth.errors import ManifestError, ParameterError, StorageError
from jobs.dry_run import DryRunConfig, dry_run, estimate
from tests.measured import MEASURED, Taken

ROOT = Path(__file__).parents[2]
GOOD = {"id": "ada", "images": ["s3://in/ada.jpg"], "class_noun": "person", "prompts": ["a photo of a {subject}"]}


@dataclass(frozen=True)
class Ended:
    """A process that ran to its end."""

    status: int
    out: list[str]
    error: str


def run_job(*arguments: str, code: str | None = None) -> Ended:
    start = ["-m", "jobs.personalize"] if code is None else ["-c", code]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/platform{os.pathsep}{ROOT}"}
    result = subprocess.run(
        [sys.executable, *start, *arguments, "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return Ended(result.returncode, result.stdout.splitlines(), result.stderr)


def write_rows(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.as_uri()


def config(manifest: str, **options: Any) -> DryRunConfig:
    return DryRunConfig(manifest=manifest, output="s3://out/run", **options)


def test_every_bad_row_is_printed_and_the_status_says_so(tmp_path: Path) -> None:
    manifest = write_rows(
        tmp_path / "manifest.jsonl",
        GOOD | {"images": ["https://example.org/a.png"], "sed": 1},
        GOOD | {"id": "eve", "num_images_per_prompt": 2},
        GOOD | {"id": "eve"},
    )
    ended = run_job("--manifest", manifest, "--output", "s3://out/run", "--diffusion.max", "4")
    assert ended.status == 1, ended.error
    faults = [line.split(":")[:2] for line in ended.out if line.startswith("line ")]
    assert faults == [["line 1", " sed"], ["line 1", " images"], ["line 3", " id"]]
    assert "rows              1 good, 2 bad" in ended.out
    assert "images            2" in ended.out
    assert ended.out[-1] == "Options that only the run itself checks: --diffusion.max 4"


def test_a_good_manifest_ends_well_and_a_users_error_ends_as_in_every_job(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "manifest.jsonl", GOOD)
    assert run_job("--manifest", manifest, "--output", "s3://out/run").status == 0
    ended = run_job("--manifest", f"{manifest}.none", "--output", "s3://out/run")
    assert (ended.status, ended.out) == (2, [])
    assert "manifest.jsonl.none" in ended.error


def test_the_estimate_adds_up_and_states_its_assumptions(tmp_path: Path) -> None:
    (tmp_path / "sets.json").write_text('{"poses": ["a {subject} sleeping", "a {subject} running"]}')
    rows = [
        GOOD | {"num_inference_steps": 10},
        {name: value for name, value in GOOD.items() if name != "prompts"}
        | {"id": "eve", "images": ["a.png", "b.png"], "prompt_set": "poses", "num_images_per_prompt": 3},
        GOOD | {"id": "bob", "num_inference_steps": 70, "size": "512x768"},
    ]
    chosen = config(
        write_rows(tmp_path / "manifest.jsonl", *rows),
        prompt_sets=str(tmp_path / "sets.json"),
        num_inference_steps=20,
        seconds_per_step=18.0,
        cost_per_gpu_hour=2.5,
    )
    assert list(estimate(dry_run(chosen), chosen)) == [
        "rows              3 good, 0 bad",
        "identities        3",
        "reference images  4",
        "images            8",
        "denoising steps   200",
        "seconds           3,600 on one GPU (60 min); n GPUs take one n-th, at the same cost",
        "cost              2.50 at 2.5 per GPU hour",
        "This assumes:",
        "  18 s for a step of one picture, all in (--seconds-per-step)",
        "  20 steps where a row gives no number (--num-inference-steps): rows of the kind: 1",
        "  the same time at every size: rows that ask for one: 1",
        "  that every good row succeeds",
    ]
    unpriced = config(chosen.manifest, prompt_sets=chosen.prompt_sets)
    lines = list(estimate(dry_run(unpriced), unpriced))
    assert "cost              unknown without a price: pass --cost-per-gpu-hour" in lines
    assert any("measured with the miniature" in line for line in lines)


def test_what_cannot_be_read_or_reckoned_with_is_refused(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "manifest.jsonl", GOOD)
    with pytest.raises(StorageError, match="gs://out is not at a known place"):
        dry_run(DryRunConfig(manifest=manifest, output="gs://out"))
    with pytest.raises(ParameterError, match="is what the run would replace"):
        dry_run(DryRunConfig(manifest="s3://out/run/failed.jsonl", output="s3://out/run"))
    with pytest.raises(StorageError, match=r"none\.json"):
        dry_run(config(manifest, prompt_sets=str(tmp_path / "none.json")))
    with pytest.raises(ManifestError, match="prompt sets must be one JSON object"):
        dry_run(config(manifest, prompt_sets=__file__))
    for option in ({"seconds_per_step": 0.0}, {"cost_per_gpu_hour": -1.0}, {"num_inference_steps": 0}):
        with pytest.raises(ParameterError, match=next(iter(option))):
            config(manifest, **option)


def full_row(number: int) -> dict[str, Any]:
    """A row with every field: 1.2 kB of JSON."""
    name = f"subject-{number:06d}"
    return {
        "id": name,
        "images": [f"s3://bucket/references/{name}/{n}.jpg" for n in range(4)],
        "masks": [f"s3://bucket/references/{name}/{n}-mask.png" for n in range(4)],
        "class_noun": "person",
        "prompts": [f"a photo of a {{subject}} in a red coat at beach number {n}" for n in range(8)],
        "num_images_per_prompt": 2,
        "seed": number,
        "num_inference_steps": 30,
        "guidance_scale": 7.5,
        "adapter_scale": 0.4,
        "concept_scale": 0.5,
        "negative_prompt": "blurry",
        "sampler": "ddim",
        "size": "512x512",
        "metadata": {"order": number},
    }


def write_table(path: Path, count: int) -> None:
    """A CSV, or a Parquet file of a single row group, which is the hardest to stream."""
    texts = (dict, list) if path.suffix == ".csv" else dict
    rows = [{k: json.dumps(v) if isinstance(v, texts) else v for k, v in full_row(n).items()} for n in range(count)]
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=count)
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def measure(manifest: Path, count: int) -> tuple[float, float]:
    """Peak memory in MB and CPU seconds of a dry run of so many good rows."""
    ended = run_job("--manifest", str(manifest), "--output", "out", code=MEASURED)
    assert ended.status == 0, ended.error
    assert f"rows              {count:,} good, 0 bad" in ended.out
    taken = Taken.of(ended.error)
    assert not taken.heavy
    return taken.megabytes, taken.cpu_s


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_memory_holds_a_row_and_not_the_manifest(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    write_rows(path, *map(full_row, range(20_000)))
    assert path.stat().st_size > 20e6
    megabytes, _ = measure(path, 20_000)
    assert megabytes < 60


@linux
@pytest.mark.full
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_hundred_thousand_rows_take_less_than_a_minute_and_500_megabytes(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"manifest.{ending}"
    if ending == "jsonl":
        write_rows(path, *map(full_row, range(100_000)))
    else:
        write_table(path, 100_000)
    megabytes, seconds = measure(path, 100_000)
    print(f"{ending}: {megabytes:.0f} MB at most, {seconds:.1f} CPU seconds")
    assert megabytes < 500
    assert seconds < 60
