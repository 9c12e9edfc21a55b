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
from instantbooth.storage import ObjectStore, open_store
from pipelines.places import FAILED
from pipelines.plan import IMAGES
from tests.chaos.check import Output, differences, faults_of
from tests.chaos.inputs import model_options, photo, write_model

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parent.parent.parent
ROWS = int(os.environ.get("CLUSTER_ROWS", "400"))
IDS = [f"row-{number:04d}" for number in range(ROWS)]
PROMPTS = ("photo", "drawing", "picture", "watercolor")
PICTURES = ROWS * len(PROMPTS)
CALM_IDS = IDS[:: max(1, ROWS // 40)]
"""Rows that an undisturbed run makes as well, by which pictures are compared."""
WORKERS = 4
WORKER = {"num_cpus": 3, "object_store_memory": 200_000_000}
"""A node on which all stages find room: they need a CPU each."""
PATIENCE_S = 900


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster whose head has no CPUs to give: it takes no task and no actor."""
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "num_gpus": 0, "object_store_memory": 300_000_000, "include_dashboard": True},
    )
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """On S3 where a server is at hand, else in a folder."""
    if os.environ.get("AWS_ENDPOINT_URL"):
        return f"s3://{request.getfixturevalue('bucket')}/cluster"
    return str(tmp_path / "out")


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    """The options that name a model."""
    return model_options(write_model(tmp_path / "model"))


def write_job(folder: Path, output: str, ids: list[str]) -> list[str]:
    """The job's options; every row asks for the same four prompts, in as many steps as make the job last."""
    (folder / "photo.png").write_bytes(photo(0))
    manifest = folder / f"{len(ids)}-rows.jsonl"
    rows = [
        {
            "id": each,
            "images": [str(folder / "photo.png")],
            "class_noun": "person",
            "prompts": [f"a {kind} of a {{subject}}" for kind in PROMPTS],
            "num_inference_steps": 8,
        }
        for each in ids
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "manifest": manifest,
        "output": output,
        "row-budget": 8,
        "rows-per-batch": 4,
        "diffusion.max": WORKERS,
    }
    named = [f"--{name}={value}" for name, value in options.items()]
    return ["-m", "jobs.personalize", *named, "--exact", "--no-track"]


def test_a_job_grows_with_its_cluster_and_survives_the_loss_of_a_node(
    nodes: Any, tmp_path: Path, output: str, model: list[str]
) -> None:
    from jobs.demo import submit

    workers = [nodes.add_node(**WORKER)]
    client = JobSubmissionClient(ray.get_runtime_context().gcs_address)
    started = time.monotonic()
    job = submit(client, [*write_job(tmp_path, output, IDS), *model], patience_s=60)
    store = open_store(output)

    def tell() -> None:
        print(f"after {time.monotonic() - started:.0f} s: {makers(store)}")

    wait_for(client, job, store, PICTURES // 10)
    tell()
    workers += [nodes.add_node(**WORKER) for _ in range(WORKERS - 1)]
    wait_for(client, job, store, PICTURES // 2)
    tell()
    lost = next((each for each in workers[1:] if each.node_id in makers(store)), None)
    assert lost is not None, "no node that came later has made a picture"
    nodes.remove_node(lost, allow_graceful=False)
    wait_for(client, job, store, None)
    tell()
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)[-3000:]
    disturbed = Output.read(store)
    assert not list(faults_of(disturbed, IDS, PICTURES, {}))
    assert set(makers(store)) <= {each.node_id for each in workers}
    assert len(makers(store)) >= 3, "the job did not spread over the nodes that came"

    calm = open_store(f"{output}-calm")
    job = submit(client, [*write_job(tmp_path, f"{output}-calm", CALM_IDS), *model], patience_s=60)
    wait_for(client, job, calm, None)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)[-3000:]
    folders = tuple(f"{IMAGES}/{each}/" for each in CALM_IDS)
    same_rows = {key: data for key, data in disturbed.objects.items() if key.startswith((*folders, FAILED))}
    assert not list(differences(Output.read(calm), Output(objects=same_rows)))


def makers(store: ObjectStore) -> Counter[str]:
    """Node → pictures it has made."""
    keys = [key for key in store.list(f"{RECORDS}/") if key.endswith(".json")]
    return Counter(Record.from_bytes(store.get(key)).details["node"] for key in keys)


def wait_for(client: JobSubmissionClient, job: str, store: ObjectStore, records: int | None) -> None:
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
