"""The endpoint's parts by themselves: keys, limits, scaling, routing, urls, records."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from ray.serve import Application
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve.exceptions import BackPressureError
from starlette.responses import Response
from starlette.testclient import TestClient

from instantbooth.errors import (
    DeadlineError,
    EngineError,
    ImageError,
    OverloadedError,
    PictureError,
    PromptError,
    StorageError,
)
from instantbooth.storage import FileStore
from serve.app import CALLS_BESIDE, build
from serve.config import ServeConfig
from serve.errors import ApiError, of_exception
from serve.keys import Keyring, check_local, new_key
from serve.limits import Gate
from serve.model import load, load_encoder
from serve.pictures import PictureStore
from serve.proxy import OneShape, middlewares
from serve.records import Expiring, Records, new_id
from serve.scaling import ConceptRouter, QueuedWorkPolicy
from serve.schemas import MAX_IMAGES
from tests.serve.works import a_work


def test_a_key_names_its_tenant_and_no_other_text_does() -> None:
    (ada, ada_hash), (old, old_hash), (bob, bob_hash) = new_key(), new_key(), new_key()
    keys = Keyring({"ada": [ada_hash, old_hash], "bob": [bob_hash]})
    assert [keys.tenant(f"Bearer {key}") for key in (ada, old, bob)] == ["ada", "ada", "bob"]
    for wrong in (None, "", "Bearer", f"Basic {ada}", f"Bearer {ada}x", f"Bearer {ada_hash}", ada):
        with pytest.raises(ApiError) as refused:
            keys.tenant(wrong)
        assert refused.value.status == 401


def test_without_keys_only_this_machine_is_served() -> None:
    check_local("127.0.0.1", "localhost:8000", None)
    check_local("::1", "[::1]:8000", "http://localhost:8000")
    for client, host, origin in (
        ("10.0.0.7", "localhost:8000", None),
        ("127.0.0.1", "rebound.example:8000", None),
        ("127.0.0.1", "localhost:8000", "https://elsewhere.example"),
        ("127.0.0.1", "localhost:8000", "null"),
        (None, "localhost", None),
    ):
        with pytest.raises(ApiError, match="no API keys"):
            check_local(client, host, origin)


def test_a_configuration_with_a_slip_is_refused() -> None:
    for slip in (
        {"keys": {"Ada": []}},
        {"keys": {"ada": ["secret"]}},
        {"stroe": "x"},
        {"url_secret": "short"},
        {"max_concept_ttl_s": 3600},
        {"max_requests": MAX_IMAGES - 1},
        *({name: 0} for name in ("row_budget", "max_row_budget", "max_body_bytes")),
        *({name: 0} for name in ("max_image_bytes", "max_image_pixels")),
    ):
        with pytest.raises(ValidationError):
            ServeConfig(**slip)


def test_a_full_gate_says_when_to_come_back() -> None:
    gate = Gate(4, "pictures")
    with gate.enter(10), pytest.raises(ApiError) as refused, gate.enter():
        pass
    assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
    assert gate.taken == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ImageError("image 1 is damaged"), 422),
        (PromptError("prompt 'x' names no subject"), 422),
        (OverloadedError("full"), 429),
        (BackPressureError(3, 2), 429),
        (DeadlineError("late"), 504),
        (PictureError("not finite"), 500),
        (EngineError("the engine broke down: secret"), 503),
        (TimeoutError(), 504),
        (torch.OutOfMemoryError("CUDA out of memory on secret"), 503),
        (StorageError("cannot read s3://secret/place"), 503),
        (KeyError("/root/secret"), 500),
    ],
)
def test_an_error_shows_a_client_its_status_and_nothing_of_the_inside(error: Exception, status: int) -> None:
    known = of_exception(error)
    assert known.status == status
    assert "secret" not in known.message
    assert pickle.loads(pickle.dumps(known)).body == known.body


def test_replicas_follow_the_work_and_not_the_number_of_requests() -> None:
    policy = QueuedWorkPolicy(rows_per_replica=100)

    def wanted(*work: float, jobs: float = 0) -> int:
        told = {"queued_work": dict(enumerate(work)), "queued_jobs": dict.fromkeys(range(len(work)), jobs)}
        return policy(SimpleNamespace(aggregated_metrics=told if work else None))[0]

    assert [wanted(), wanted(0, 0), wanted(60, 40), wanted(60, 41), wanted(1000)] == [1, 1, 1, 2, 10]
    assert [wanted(0, 0, jobs=100), wanted(60, 40, jobs=101)] == [1, 3]


def a_router(replicas: int) -> tuple[ConceptRouter, list[Any]]:
    """A router, and that many replicas by their ids."""
    deployment = DeploymentID("DiffusionEngine")
    router = ConceptRouter(deployment, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    return router, [SimpleNamespace(replica_id=ReplicaID(f"r{n}", deployment)) for n in range(replicas)]


def ranks(router: ConceptRouter, concept: str | None, among: list[Any]) -> list[list[Any]]:
    """Where the router would send a call with this concept, in order."""
    return asyncio.run(router.choose_replicas(among, SimpleNamespace(args=[a_work(concept_id=concept)])))


def test_a_concept_keeps_its_replica_while_others_come_and_go() -> None:
    router, replicas = a_router(5)

    def preferred(concept: str | None, among: list[Any]) -> Any:
        return ranks(router, concept, among)

    concepts = [f"concept_{n}" for n in range(40)]
    before = {concept: preferred(concept, replicas)[0][0] for concept in concepts}
    assert len({id(replica) for replica in before.values()}) == 5
    gone = replicas[2]
    after = {concept: preferred(concept, [each for each in replicas if each is not gone])[0][0] for concept in concepts}
    assert all(after[concept] is before[concept] for concept in concepts if before[concept] is not gone)
    assert preferred(None, replicas) == [replicas]


def test_a_concept_that_everybody_asks_for_takes_every_replica() -> None:
    router, replicas = a_router(4)
    sent = Counter()
    for _ in range(100):
        chosen = ranks(router, "concept_1", replicas)[0][0].replica_id
        router.on_send_request(chosen)
        sent[chosen] += 1
    assert len(sent) == 4
    assert max(sent.values()) <= 1 + 1.25 * 101 / 4 + 1
    for replica in sent:
        for _ in range(sent[replica]):
            router.decrement_queue_len_cache(replica)
    assert ranks(router, "concept_1", replicas)[0][0].replica_id == next(iter(sent))


CLUSTER = yaml.safe_load((Path(__file__).parents[2] / "infra/serve.yaml").read_text())["applications"][0]


def test_on_a_cluster_too_a_full_replica_refuses_at_once() -> None:
    diffusion = next(each for each in CLUSTER["deployments"] if each["name"] == "DiffusionEngine")
    assert diffusion["max_ongoing_requests"] == CLUSTER["args"]["max_requests"] + CALLS_BESIDE


def test_a_cluster_bounds_its_queues_and_ends_its_replicas_as_one_machine_does() -> None:
    ingress = build(ServeConfig())._bound_deployment
    stages = [each._bound_deployment for each in ingress.init_args if isinstance(each, Application)]
    own = {each.name: each._deployment_config for each in (ingress, *stages)}
    assert own["JobRunner"].graceful_shutdown_timeout_s == 0, "two replicas would run the same jobs"
    names = ("num_replicas", "max_queued_requests", "graceful_shutdown_timeout_s", "health_check_period_s")
    for deployment in CLUSTER["deployments"]:
        for name in names:
            known = getattr(own[deployment["name"]], name)
            assert deployment.get(name, known) == known, (deployment["name"], name)


def test_a_signed_path_ends_and_cannot_be_made_up(tmp_path: Path) -> None:
    pictures = PictureStore(FileStore(tmp_path), "secret")
    name = f"{new_id('file')}-0.png"
    pictures.put("ada", name, b"picture")
    expires = int(time.time()) + 60
    signature = pictures.path("ada", name, expires).partition("signature=")[2]
    pictures.check("ada", name, expires, signature)
    assert pictures.get("ada", name) == b"picture"
    for tenant, other, until in (("bob", name, expires), ("ada", "file-1.png", expires), ("ada", name, expires + 1)):
        with pytest.raises(ApiError, match="signature"):
            pictures.check(tenant, other, until, signature)
    past = int(time.time()) - 1
    with pytest.raises(ApiError, match="expired"):
        pictures.check("ada", name, past, pictures.path("ada", name, past).partition("signature=")[2])
    with pytest.raises(ApiError, match="signature"):
        PictureStore(FileStore(tmp_path), "another secret").check("ada", name, expires, signature)
    pictures.delete_older({"file": 3600, "job": 0})
    assert pictures.get("ada", name)
    pictures.delete_older({"file": 0, "job": 3600})
    with pytest.raises(ApiError, match="no picture"):
        pictures.get("ada", name)


def test_records_are_pages_of_their_tenant(tmp_path: Path) -> None:
    records = Records(FileStore(tmp_path), "thing", Expiring)
    later = int(time.time()) + 60
    things = [Expiring(id=f"thing_{n:024x}", expires_at=later) for n in range(5)]
    for thing in (*things, Expiring(id=f"thing_{9:024x}", expires_at=1)):
        records.put("ada", thing)
    assert records.page("ada", 2, None) == ([things[4], things[3]], True)
    assert records.page("ada", 3, things[3].id) == ([things[2], things[1], things[0]], False)
    assert records.page("bob", 3, None) == ([], False)
    for wrong in (f"thing_{9:024x}", "../ada/thing", "", things[0].id.upper()):
        with pytest.raises(ApiError, match="no thing"):
            records.get("ada", wrong)


@pytest.mark.parametrize(
    ("answer", "status", "code", "retry_after"),
    [
        (Response("timed out", 408), 408, "timeout", None),
        (Response("full", 429, {"Retry-After": "7"}), 429, "overloaded", "7"),
        (Response("no replica", 503), 503, "unavailable", "2"),
        (Response("Traceback: secret", 500), 500, "proxy", None),
        (None, 503, "replica_lost", "2"),
    ],
)
def test_what_rays_proxy_says_by_itself_has_the_shape_of_all_errors(
    answer: Response | None, status: int, code: str, retry_after: str | None
) -> None:
    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if answer is not None:
            await answer(scope, receive, send)

    (middleware,) = middlewares()
    found = TestClient(middleware.cls(proxy)).get("/")
    assert (found.status_code, found.json()["error"]["code"]) == (status, code)
    assert found.headers.get("Retry-After") == retry_after
    assert "secret" not in found.text


def test_rays_proxy_leaves_what_is_well_as_it_is() -> None:
    for answer in (
        Response("a page", media_type="text/html"),
        Response('{"error": 1}', 404, media_type="application/json"),
    ):
        found = TestClient(OneShape(answer)).get("/")
        assert (found.status_code, found.content) == (answer.status_code, answer.body)


def test_both_stages_compute_in_the_precision_they_are_told() -> None:
    config = ServeConfig(precision="bf16")
    booth, encoder = load(config), load_encoder(config)
    assert booth.base.unet.dtype == booth.base.vae.dtype == encoder.image_encoder.tower.dtype == torch.bfloat16
    exact = load(ServeConfig())
    assert booth.encoder_digest == encoder.digest == exact.encoder_digest, "a concept is good in any precision"
    assert booth.weights_digest == exact.weights_digest
