"""The bulk job while workers and drivers are killed and storage fails: `make test-chaos`.

CHAOS_ITEMS, CHAOS_WORKER_KILLS and CHAOS_DRIVER_KILLS make it shorter or longer.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from instantbooth.images import decode_image
from instantbooth.storage import ObjectStore, open_store
from pipelines.places import FAILED
from pipelines.plan import IMAGES
from tests.chaos.check import Output, differences, faults_of
from tests.chaos.inputs import model_options, photo, write_model
from tests.chaos.proxy import FAULTS, FaultProxy

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parent.parent.parent
ITEMS = int(os.environ.get("CHAOS_ITEMS", "2000"))
WORKER_KILLS = int(os.environ.get("CHAOS_WORKER_KILLS", "20"))
DRIVER_KILLS = int(os.environ.get("CHAOS_DRIVER_KILLS", "3"))
SUBJECTS = 40
FAULT_RATE = 0.05
PICTURE = (32, 32)
"""The tiny model's pictures, in pixels."""
WORKERS = ("ray::FlatMap", "ray::MapWorker")
"""How processes are called that fetch references, encode concepts or generate pictures."""
UNUSABLE = {17: ("broken", "image"), 59: ("missing", "missing_object")}
"""Row number modulo 100 → the photo it is given, and the code it fails with."""
ATTEMPT_S = 1800


@dataclass(kw_only=True)
class Arena:
    """A cluster whose storage goes through a proxy, and a manifest to work on."""

    proxy: FaultProxy
    bucket: str
    model: Path
    raylet: int
    """Its process id."""
    address: str
    ids: list[str]
    logs: Path
    starts: Counter[str] = field(default_factory=Counter)
    """Output → how often a job was started for it."""
    killed: list[str] = field(default_factory=list)
    """What was killed."""

    def start(self, output: str) -> subprocess.Popen[bytes]:
        """The job, as a user types it."""
        command = [
            *(sys.executable, "-m", "jobs.personalize", "--manifest", f"s3://{self.bucket}/manifest.jsonl"),
            *("--output", f"s3://{self.bucket}/{output}", "--exact", "--row-budget", "8", "--no-track"),
            *(*model_options(self.model), "--log", self.logs / f"{output}.jsonl"),
        ]
        environment = os.environ | {"RAY_ADDRESS": self.address, "AWS_ENDPOINT_URL": self.proxy.url}
        self.starts[output] += 1
        with self._log(output).open("wb") as log:
            return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=log)

    def output(self, name: str) -> Output:
        """What the job left, read past the proxy."""
        return Output.read(open_store(f"s3://{self.bucket}/{name}"))

    def log(self, output: str) -> str:
        """The end of what the last job for this output said."""
        return self._log(output).read_text()[-3000:]

    def _log(self, output: str) -> Path:
        return self.logs / f"{output}-{self.starts[output]}.log"

    def kill_a_worker(self, rng: random.Random) -> bool:
        """SIGKILL to one of the processes that work on rows; False where there is none."""
        busy = [pid for pid in _children(self.raylet) if _title(pid).startswith(WORKERS)]
        if not busy:
            return False
        chosen = rng.choice(busy)
        self.killed.append(_title(chosen))
        os.kill(chosen, signal.SIGKILL)
        return True


@pytest.fixture(scope="module")
def arena(s3_server: str, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    folder = tmp_path_factory.mktemp("chaos")
    write_model(folder / "model")
    ids = write_manifest(open_store(f"s3://{bucket}"), bucket)
    with FaultProxy(upstream=s3_server) as proxy, cluster(proxy.url) as (address, raylet):
        yield Arena(
            proxy=proxy, bucket=bucket, model=folder / "model", raylet=raylet, address=address, ids=ids, logs=folder
        )


@contextmanager
def cluster(endpoint: str) -> Iterator[tuple[str, int]]:
    """A Ray that outlives its drivers, whose workers find storage at `endpoint`; its address and its raylet's pid."""
    from ray.cluster_utils import Cluster

    before = os.environ["AWS_ENDPOINT_URL"]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "object_store_memory": 500_000_000})
    os.environ["AWS_ENDPOINT_URL"] = before
    try:
        yield nodes.address, nodes.head_node.all_processes["raylet"][0].process.pid
    finally:
        nodes.shutdown()


def write_manifest(store: ObjectStore, bucket: str) -> list[str]:
    """Rows of one picture each, a few of them with a photo that is missing or broken; their ids."""
    for number in range(SUBJECTS):
        store.put(f"in/{number}.png", photo(number))
    store.put("in/broken.png", b"\x89PNG\r\n\x1a\nand then nothing")
    rows = []
    for number in range(ITEMS):
        reference, _ = UNUSABLE.get(number % 100, (number % SUBJECTS, ""))
        rows.append(
            {
                "id": f"row-{number:05d}",
                "images": [f"s3://{bucket}/in/{reference}.png"],
                "class_noun": "person",
                "prompts": [f"a photo of a {{subject}} number {number % 7}"],
                "num_inference_steps": 2,
                "seed": number,
            }
        )
    store.put("manifest.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return [str(row["id"]) for row in rows]


@pytest.fixture(scope="module")
def calm(arena: Arena) -> Output:
    """The output of an undisturbed run."""
    started = time.monotonic()
    assert arena.start("calm").wait(ATTEMPT_S) == 0, arena.log("calm")
    seconds = time.monotonic() - started
    print(f"\nundisturbed: {ITEMS} items in {seconds:.0f} s, storage calls {dict(arena.proxy.calls)}")
    return arena.output("calm")


def test_an_undisturbed_run_keeps_its_promises(arena: Arena, calm: Output) -> None:
    assert not list(faults_of(calm, arena.ids, ITEMS, arena.proxy.applied))
    unusable = {each: UNUSABLE[n % 100][1] for n, each in enumerate(arena.ids) if n % 100 in UNUSABLE}
    assert {str(row["id"]): row["code"] for row in calm.lines(FAILED)} == unusable
    pictures = [data for key, data in calm.objects.items() if key.startswith(f"{IMAGES}/")]
    assert len(pictures) == ITEMS - len(unusable)
    assert all(decode_image(data).size == PICTURE for data in pictures)


def test_nothing_is_lost_or_doubled_whatever_is_killed(arena: Arena, calm: Output) -> None:
    arena.proxy.rate = FAULT_RATE
    started = time.monotonic()
    drivers = endure(arena, "storm")
    print(f"\n{ITEMS} items in {time.monotonic() - started:.0f} s, {drivers} drivers and {len(arena.killed)} workers")
    print(f"killed: {sorted(set(arena.killed))}\nstorage faults: {dict(arena.proxy.faults)}, of {arena.proxy.calls}")
    arena.proxy.rate = 0.0
    storm = arena.output("storm")
    assert not list(faults_of(storm, arena.ids, ITEMS, arena.proxy.applied))
    assert not list(differences(calm, storm))
    assert len(arena.killed) >= WORKER_KILLS
    assert drivers >= DRIVER_KILLS
    assert set(arena.proxy.faults) == set(FAULTS)


def test_a_finished_job_is_found_finished(arena: Arena, calm: Output) -> None:
    writes, started = arena.proxy.calls["PUT"], time.monotonic()
    assert arena.start("calm").wait(ATTEMPT_S) == 0, arena.log("calm")
    seconds = time.monotonic() - started
    print(f"\nrun again: {seconds:.1f} s")
    assert arena.proxy.calls["PUT"] == writes
    assert seconds < 30


def endure(arena: Arena, output: str) -> int:
    """Runs the job until it ends well, killing workers and drivers as it goes on; how many drivers were killed."""
    rng = random.Random(1)
    turns = ["driver"] * DRIVER_KILLS + ["worker"] * WORKER_KILLS
    rng.shuffle(turns)
    # Each comes once so many records are there.
    due = [(ITEMS * (number + 1) // (len(turns) + 2), turn) for number, turn in enumerate(turns)]
    job, drivers = arena.start(output), 0
    deadline = time.monotonic() + ATTEMPT_S
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if (status := job.poll()) == 0:
            return drivers
        if status is not None:
            # The store failed for longer than the job's patience: it says so, and is run again.
            assert "run the same command again" in arena.log(output), arena.log(output)
            job = arena.start(output)
        if due and arena.proxy.records(output) >= due[0][0]:
            if due[0][1] == "driver":
                job.kill()
                job.wait()
                drivers += 1
                job = arena.start(output)
                due.pop(0)
            elif arena.kill_a_worker(rng):
                due.pop(0)
    job.kill()
    raise AssertionError(f"not done after {ATTEMPT_S} s: {arena.proxy.records(output)} records\n{arena.log(output)}")


def _children(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found.append(int(folder.name))
    return found


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]
    except OSError:
        return ""
