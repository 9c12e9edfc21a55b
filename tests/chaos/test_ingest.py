"""An ingestion that is killed three times, each time further on, against one that is left in peace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from instantbooth.miniature.samples import write_pairs
from instantbooth.storage import FileStore
from pipelines.ingest import MANIFEST, REPORT

pytestmark = pytest.mark.chaos

PAIRS = 90
KILLED_AT = {"staged/": 2, "units/": 6, "train/": 1}
"""Where objects appear, and after how many of them the job is killed."""


def start(folder: Path, output: FileStore) -> subprocess.Popen[bytes]:
    """The job, its log beside its output."""
    command = ["-m", "jobs.ingest", f"--source={folder}/pairs", f"--output={output.root}", "--rows-per-shard=8"]
    with open(f"{output.root}.log", "ab") as log:
        return subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, start_new_session=True)


def kill_at(job: subprocess.Popen[bytes], output: FileStore, prefix: str, count: int) -> None:
    """Kills the job without warning once it has written so much."""
    while job.poll() is None and len(list(output.list(prefix))) < count:
        time.sleep(0.01)
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL, Path(f"{output.root}.log").read_text()[-4000:]


def data_set(output: FileStore) -> dict[str, bytes]:
    """The manifest and every file that it lists."""
    keys = [entry["key"] for entry in json.loads(output.get(MANIFEST))["files"]]
    return {key: output.get(key) for key in (MANIFEST, *keys)}


def test_an_ingestion_killed_anywhere_and_repeated_gives_the_same_bytes(tmp_path: Path) -> None:
    list(write_pairs(FileStore(tmp_path), "pairs", PAIRS))
    peace, chaos = FileStore(tmp_path / "peace"), FileStore(tmp_path / "chaos")
    assert start(tmp_path, peace).wait() == 0
    for prefix, count in KILLED_AT.items():
        kill_at(start(tmp_path, chaos), chaos, prefix, count)
        assert not chaos.exists(MANIFEST)
    assert start(tmp_path, chaos).wait() == 0
    assert len(data_set(peace)) > PAIRS // 8
    assert data_set(chaos) == data_set(peace)
    reports = [json.loads(output.get(REPORT)) for output in (peace, chaos)]
    assert [report["kept"] for report in reports] == [PAIRS] * 2
    assert reports[0]["processed"] == reports[0]["read"] > PAIRS
    assert reports[1]["processed"] == 0, "all was staged when the job was killed last"
