"""What `kubectl apply -k` sends fits KubeRay's schemas, and the jobs' command lines, pins and machines agree."""

from __future__ import annotations

import copy
import gzip
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import ray
import tyro
import yaml
from jsonschema import Draft4Validator
from ray.serve.schema import ServeDeploySchema
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

from instantbooth.presets import preset
from jobs.bulk import BulkConfig
from jobs.promote import PromoteConfig
from jobs.train import PRESETS
from pipelines.ingest import IngestConfig
from pipelines.model import ModelConfig
from serve.config import ServeConfig

ROOT = Path(__file__).parent.parent.parent
INFRA = ROOT / "infra"
SCHEMAS = os.environ.get("KUBERAY_SCHEMAS")
JOBS = ("ingest", "train", "personalize")
PARSERS = {
    "jobs.ingest": partial(tyro.cli, IngestConfig),
    "jobs.train": partial(tyro.extras.overridable_config_cli, PRESETS),
    "jobs.personalize": partial(tyro.cli, BulkConfig),
}
Manifest = dict[str, Any]


def written(path: str) -> Manifest:
    """A file below infra/, as it is written."""
    return yaml.safe_load((INFRA / path).read_text())


@cache
def sent(folder: str) -> Manifest:
    """The one object that `kubectl apply -k` makes of a folder."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which puts the manifests together, is not installed")
    made = subprocess.run(["kubectl", "kustomize", INFRA / folder], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (found,) = yaml.safe_load_all(made.stdout)
    return found


def cluster() -> Manifest:
    return written("kuberay/cluster/cluster.yaml")["spec"]


def pods() -> Iterator[tuple[str, Manifest, Manifest]]:
    """Group, pod and its one container."""
    groups = {group["groupName"]: group for group in cluster()["workerGroupSpecs"]}
    for name, group in {"head": cluster()["headGroupSpec"], **groups}.items():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        yield name, pod, container


def command(job: str) -> Any:
    """A job's options, as its own command line reads them."""
    python, flag, module, *arguments = shlex.split(written(f"kuberay/{job}/job.yaml")["spec"]["entrypoint"])
    assert (python, flag) == ("python", "-m")
    return PARSERS[module](args=arguments)


def gpus_at_start(job: str) -> int:
    (group,) = (
        each
        for each in sent(f"kuberay/{job}")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        if each["groupName"] == "gpu"
    )
    (container,) = group["template"]["spec"]["containers"]
    return group["minReplicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])


def faults(thing: Manifest) -> list[str]:
    """What the API server of a cluster with KubeRay would refuse in it."""
    if not SCHEMAS:
        pytest.skip("there are no KubeRay schemas; name their folder by KUBERAY_SCHEMAS")
    validator = Draft4Validator(schema(thing["kind"]))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(thing)]


@cache
def schema(kind: str) -> Manifest:
    with gzip.open(Path(SCHEMAS or "", f"{kind.lower()}s.yaml.gz")) as file:
        definition = yaml.load(file, Loader=yaml.CSafeLoader)
    (found,) = (each["schema"] for each in definition["spec"]["versions"] if each["name"] == "v1")
    return closed(found["openAPIV3Schema"])


def closed(node: Any) -> Any:
    """The schema without room for fields that it does not know."""
    if isinstance(node, list):
        return [closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    own = {name: closed(each) for name, each in node.items()}
    if isinstance(own.get("properties"), dict) and not own.get("x-kubernetes-preserve-unknown-fields"):
        own.setdefault("additionalProperties", False)
    return own


@pytest.mark.parametrize("path", ["cluster/cluster", *(f"{job}/job" for job in JOBS)])
def test_files_fit_kuberays_schemas(path: str) -> None:
    assert not faults(written(f"kuberay/{path}.yaml"))


@pytest.mark.parametrize("folder", ["kuberay/cluster", *(f"kuberay/{job}" for job in JOBS), "."])
def test_what_is_sent_fits_kuberays_schemas(folder: str) -> None:
    assert not faults(sent(folder))


def test_the_schemas_refuse_slips() -> None:
    def slipped(*path: str | int, **changes: object) -> list[str]:
        thing = copy.deepcopy(written("kuberay/cluster/cluster.yaml"))
        place: Any = thing
        for part in path:
            place = place[part]
        place |= changes
        return faults(thing)

    gpu = ("spec", "workerGroupSpecs", 1)
    assert "'rayversion' was unexpected" in slipped("spec", rayversion="2")[0]
    assert "2.6 is not of type 'string'" in slipped("spec", rayVersion=2.6)[0]
    assert "'tokens' is not one of" in slipped("spec", "authOptions", mode="tokens")[0]
    assert "'4' is not of type 'integer'" in slipped(*gpu, maxReplicas="4")[0]
    assert "4 is not of type 'string'" in slipped(*gpu, "rayStartParams", **{"num-cpus": 4})[0]
    assert "'toleration' was unexpected" in slipped(*gpu, "template", "spec", toleration=[])[0]


def test_every_job_and_the_endpoint_have_the_cluster_that_is_described_once() -> None:
    specs = [sent(f"kuberay/{job}")["spec"]["rayClusterSpec"] for job in JOBS]
    for spec in (*specs, sent(".")["spec"]["rayClusterConfig"]):
        described = cluster()
        for own, group in zip(spec["workerGroupSpecs"], described["workerGroupSpecs"], strict=True):
            group |= {name: own[name] for name in ("minReplicas", "maxReplicas")}
        assert spec == described


def test_the_endpoint_is_the_one_of_serve_yaml() -> None:
    settings = written("serve.yaml")
    (application,) = ServeDeploySchema.model_validate(settings).applications
    ServeConfig.model_validate(application.args)
    assert yaml.safe_load(sent(".")["spec"]["serveConfigV2"]) == settings


def test_pods_run_the_pinned_ray_in_this_versions_images() -> None:
    assert cluster()["rayVersion"] == ray.__version__
    assert f"ray=={ray.__version__}" in (INFRA / "constraints.txt").read_text().splitlines()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    dockerfile = (INFRA / "Dockerfile").read_text()
    for group, pod, container in pods():
        image = f"instantbooth:{version}-{'cuda' if group == 'gpu' else 'cpu'}"
        assert container["image"] == image
        assert f"-t {image} " in dockerfile
        user = pod["securityContext"]
        assert f"USER {user['runAsUser']}:{user['runAsGroup']}" in dockerfile


def test_spot_machines_are_for_workers_and_gpus_for_those_that_ask() -> None:
    for group, pod, container in pods():
        tolerated = {each["key"] for each in pod.get("tolerations", [])}
        assert ("cloud.google.com/gke-spot" in tolerated) == (group != "head")
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == ("nodeSelector" in pod) == (group == "gpu")


@pytest.mark.parametrize("job", JOBS)
def test_a_retried_job_goes_on_where_its_output_is(job: str) -> None:
    assert written(f"kuberay/{job}/job.yaml")["spec"]["backoffLimit"] > 0
    assert command(job).output.startswith("s3://")


def test_gpus_are_there_before_the_jobs_that_ask_for_them_at_once() -> None:
    training, pictures = command("train"), command("personalize")
    for job in (training, pictures):
        preset(job.model.base)
    assert gpus_at_start("train") == training.workers * training.gpus_per_worker
    assert gpus_at_start("personalize") >= sum(pool.min * pool.gpus for pool in (pictures.concept, pictures.diffusion))
    assert pictures.precision == "bf16", "fp32 leaves a GPU's tensor cores idle"
    assert pictures.cost_per_gpu_hour, "the report is to tell what it cost"


def test_pairs_are_ingested_for_the_base_that_is_trained_on_them() -> None:
    ingestion, training = command("ingest"), command("train")
    assert (ingestion.output, ingestion.base) == (training.data, training.model.base)


def test_a_training_whose_cluster_goes_is_asked_to_stop_and_has_time_to_save() -> None:
    entrypoint = written("kuberay/train/job.yaml")["spec"]["entrypoint"]
    for group, pod, container in pods():
        script = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        asked, waited = re.findall(r"'([^']+)'", script)
        assert re.match(asked, entrypoint)
        assert all(re.match(waited, title) for title in (entrypoint, f"ray::{RayTrainWorker.__name__}.execute"))
        if group == "head":
            (wait,) = (each["value"] for each in container["env"] if each["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
            assert 60 <= int(wait) < pod["terminationGracePeriodSeconds"]


def test_what_the_secret_says_of_mlflow_counts_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    configured = ModelConfig(), command("personalize").model, ServeConfig(), PromoteConfig()
    assert {each.tracking_uri for each in configured} == {"http://mlflow:5000"}
