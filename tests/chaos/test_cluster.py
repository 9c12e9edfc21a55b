"""The bulk job on a cluster of several nodes that grows while it runs, and loses a node."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from instantbooth.ledger import RECORDS, Record
from instantbooth.storage import FileStore
from tests.chaos.check import Output, faults_of
from tests.tiny import portrait, tiny_booth, tiny_model

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parent.parent.parent
ROWS = 400
PROMPTS = ("photo", "drawing", "picture", "watercolor")
WORKERS = 4
PATIENCE_S = 900


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster whose head takes no actors: diffusion runs on workers alone."""
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "num_gpus": 0, "object_store_memory": 300_000_000, "include_dashboard": True},
    )
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def write_job(folder: Path) -> list[str]:
    """The job's options; every row asks for the same four prompts, in as many steps as make the job last."""
    tiny_booth(tiny_model(folder / "model")).save_weights(folder / "model" / "weights")
    image, mask = portrait(0)
    image.putalpha(mask)
    image.save(folder / "photo.png")
    rows = [
        {
            "id": f"row-{number:04d}",
            "images": [str(folder / "photo.png")],
            "class_noun": "person",
            "prompts": [f"a {kind} of a {{subject}}" for kind in PROMPTS],
            "num_inference_steps": 8,
        }
        for number in range(ROWS)
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "manifest": folder / "manifest.jsonl",
        "output": folder / "out",
        "model.base": folder / "model" / "base",
        "model.image-encoder": folder / "model" / "clip",
        "model.weights": folder / "model" / "weights",
        "row-budget": 8,
        "rows-per-batch": 4,
        "diffusion.max": WORKERS,
    }
    return [*(f"--{name}={value}" for name, value in options.items()), "--no-track"]


def test_a_job_grows_with_its_cluster_and_survives_the_loss_of_a_node(nodes: Any, tmp_path: Path) -> None:
    from jobs.demo import submit

    worker = {"num_cpus": 1, "object_store_memory": 200_000_000}
    workers = [nodes.add_node(**worker)]
    client = JobSubmissionClient(ray.get_runtime_context().gcs_address)
    started = time.monotonic()
    job = submit(client, ["-m", "jobs.personalize", *write_job(tmp_path)], patience_s=60)
    store = FileStore(tmp_path / "out")
    wait_for(client, job, store, ROWS * len(PROMPTS) // 10)
    print(f"\nafter {time.monotonic() - started:.0f} s: {makers(store)}")
    workers += [nodes.add_node(**worker) for _ in range(WORKERS - 1)]
    wait_for(client, job, store, ROWS * len(PROMPTS) // 2)
    print(f"after {time.monotonic() - started:.0f} s: {makers(store)}")
    lost = workers.pop(1)
    nodes.remove_node(lost, allow_graceful=False)
    wait_for(client, job, store, None)
    print(f"after {time.monotonic() - started:.0f} s: {makers(store)}")
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)[-3000:]
    ids = [f"row-{number:04d}" for number in range(ROWS)]
    assert not list(faults_of(Output.read(store), ids, ROWS * len(PROMPTS), {}))
    assert len(makers(store)) >= 3, "the job did not spread over the nodes that came"


def makers(store: FileStore) -> Counter[str]:
    """Node → pictures it has made."""
    keys = [key for key in store.list(f"{RECORDS}/") if key.endswith(".json")]
    return Counter(Record.from_bytes(store.get(key)).details["node"][:8] for key in keys)


def wait_for(client: JobSubmissionClient, job: str, store: FileStore, records: int | None) -> None:
    """Until so many records are there, or the job has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if client.get_job_status(job).is_terminal():
            assert records is None, f"the job has ended too early: {client.get_job_logs(job)[-3000:]}"
            return
        if records is not None and sum(1 for _ in store.list(f"{RECORDS}/")) >= records:
            return
        time.sleep(1)
    raise AssertionError(f"nothing more after {PATIENCE_S} s: {client.get_job_logs(job)[-3000:]}")
