"""The ingress by itself: keys that repeat, places, refusals. Only the stages are scripted; jobs and store are real."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from ray.exceptions import RayActorError

from serve.api import Api, build_app
from serve.config import ServeConfig
from serve.jobs import JobRunner
from serve.keys import LOCAL
from serve.messages import Encoded, Event, Picture, Upload, Work
from serve.schemas import ImageParameters
from tests.serve.scripted import BEGUN, STEPS, Diffusion, Local, Script, denoised, endless
from tests.serve.test_fetch import photo_host

CONCEPT = Encoded(data=b"tensors", digest="", num_images=1)
GENERATIONS, EDITS, JOBS = (f"/v1/images/{name}" for name in ("generations", "edits", "jobs"))


class Encoder:
    """The first stage."""

    def __init__(self) -> None:
        self.uploads: list[Upload] = []

    async def encode(self, upload: Upload) -> Encoded:
        self.uploads.append(upload)
        return CONCEPT


class Endpoint:
    """An ingress with everything behind it, and a client of it."""

    def __init__(self, store: Path, *scripts: Script, **settings: Any) -> None:
        config = ServeConfig(store=str(store), **settings)
        self.encoder, self.diffusion = Encoder(), Diffusion(*scripts)
        stages = Local(self.encoder), Local(self.diffusion)
        self.jobs = JobRunner(config, *stages)
        self.api = Api(config, *stages, Local(self.jobs))
        transport = httpx.ASGITransport(build_app(self.api), raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        record = self.api.concepts.add(LOCAL, CONCEPT, class_noun="person", name=None, consent=None, ttl_s=60)
        self.body = {"prompt": "a {subject}", "concept": record.id}

    async def post(self, path: str, key: str | None = None, **changes: Any) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        return await self.client.post(path, json=self.body | changes, headers=headers)

    async def edit(self, photo: bytes, key: str | None = None, **fields: str) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        fields = {"prompt": "a {subject}"} | fields
        return await self.client.post(EDITS, files={"image": photo}, data=fields, headers=headers)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Runs a test against an endpoint with these scripts and settings."""

    def run(test: Callable[[Endpoint], Awaitable[None]], *scripts: Script, **settings: Any) -> None:
        async def within() -> None:
            async with asyncio.timeout(20):
                await test(Endpoint(tmp_path, *scripts, **settings))

        asyncio.run(within())

    return run


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def broken(work: Work) -> AsyncIterator[Event]:
    yield BEGUN
    raise KeyError("of the inside")


def test_a_repeated_key_needs_neither_a_place_nor_the_concept(run: Callable[..., None]) -> None:
    async def test(endpoint: Endpoint) -> None:
        first = await endpoint.post(GENERATIONS, "k")
        assert first.status_code == 200
        holding = asyncio.ensure_future(endpoint.post(GENERATIONS))
        await until(lambda: endpoint.api.gate.taken == 1)
        await endpoint.client.delete(f"/v1/concepts/{endpoint.body['concept']}")
        assert (await endpoint.post(GENERATIONS)).status_code == 429
        again = await endpoint.post(GENERATIONS, "k")
        assert (again.status_code, again.content) == (200, first.content)
        assert (await endpoint.post(GENERATIONS, "k", stream=True)).status_code == 409, "it is another body"
        holding.cancel()

    run(test, denoised, endless, max_pending_images=1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_server_is_not_kept_for_the_key(run: Callable[..., None], stream: bool) -> None:
    async def test(endpoint: Endpoint) -> None:
        assert (await endpoint.post(GENERATIONS, "k")).status_code == 500
        assert (await endpoint.post(GENERATIONS, "k", stream=stream)).status_code == 200
        assert (await endpoint.post(GENERATIONS, "k", stream=stream, seed=1)).status_code == 409

    run(test, broken, denoised)


def test_a_stream_with_a_key_takes_places_until_its_client_leaves(run: Callable[..., None]) -> None:
    async def test(endpoint: Endpoint) -> None:
        stream = asyncio.ensure_future(endpoint.post(GENERATIONS, "k", stream=True, n=2))
        await until(lambda: bool(endpoint.diffusion.works))
        assert endpoint.api.gate.taken == 2
        refused = await endpoint.post(GENERATIONS, "another")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        stream.cancel()
        await until(lambda: endpoint.api.gate.taken == 0)

    run(test, endless, max_pending_images=2)


def test_a_tenant_has_so_many_calls_that_follow_jobs_and_no_more(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.api.FOLLOWERS", 2)

    async def test(endpoint: Endpoint) -> None:
        first = asyncio.ensure_future(endpoint.post(GENERATIONS, "k"))
        await until(lambda: bool(endpoint.diffusion.works))
        (job,) = (await endpoint.client.get(JOBS)).json()["data"]
        events = f"{JOBS}/{job['id']}/events"
        following = [
            asyncio.ensure_future(each) for each in (endpoint.post(GENERATIONS, "k"), endpoint.client.get(events))
        ]
        await until(lambda: endpoint.api.followers[LOCAL].taken == 2)
        for refused in (endpoint.post(GENERATIONS, "k"), endpoint.client.get(events)):
            answer = await refused
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert not endpoint.api.followers["bob"].taken
        for each in following:
            each.cancel()
        await until(lambda: endpoint.api.followers[LOCAL].taken == 0)
        assert not first.done()
        first.cancel()

    run(test, endless)


def test_the_events_of_a_job_go_on_where_the_replica_of_the_jobs_was_lost(run: Callable[..., None]) -> None:
    reopened = asyncio.Event()

    async def held(work: Work) -> AsyncIterator[Event]:
        async for event in denoised(work):
            if isinstance(event, Picture):
                await reopened.wait()
            yield event

    async def test(endpoint: Endpoint) -> None:
        events = endpoint.jobs.events
        opened = 0

        async def lost_once(*job: str) -> AsyncIterator[Event]:
            nonlocal opened
            opened += 1
            told = 0
            async for event in events(*job):
                yield event
                told += 1
                if opened == 1 and told == 3:
                    raise RayActorError
                if opened == 2:
                    reopened.set()

        endpoint.jobs.events = lost_once
        streamed = (await endpoint.post(GENERATIONS, "k", stream=True)).text
        assert opened == 2
        names = [line.rpartition(".")[2] for line in streamed.splitlines() if line.startswith("event:")]
        assert names == ["progress"] * STEPS + ["completed"]

    run(test, held)


def test_a_cancelled_call_says_how_it_is_made_again(run: Callable[..., None]) -> None:
    async def test(endpoint: Endpoint) -> None:
        call = asyncio.ensure_future(endpoint.post(GENERATIONS, "k"))
        await until(lambda: bool(endpoint.diffusion.works))
        (job,) = (await endpoint.client.get(JOBS)).json()["data"]
        await endpoint.client.post(f"{JOBS}/{job['id']}/cancel")
        for answer in (await call, await endpoint.post(GENERATIONS, "k")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "cancelled")
            assert "with a new Idempotency-Key" in answer.json()["error"]["message"]
        assert (await endpoint.post(GENERATIONS, "another")).status_code == 200

    run(test, endless, denoised)


def test_an_edit_with_a_key_is_made_once(run: Callable[..., None], tmp_path: Path) -> None:
    async def test(endpoint: Endpoint) -> None:
        first, again = await endpoint.edit(b"photo", "k"), await endpoint.edit(b"photo", "k")
        assert (first.status_code, first.content) == (200, again.content)
        assert first.json()["concept"]["id"] is None
        assert (len(endpoint.encoder.uploads), len(endpoint.diffusion.works)) == (1, 1)
        assert endpoint.diffusion.works[0].concept == CONCEPT.data
        for changed in (endpoint.edit(b"another", "k"), endpoint.edit(b"photo", "k", seed="1")):
            assert (await changed).json()["error"]["code"] == "idempotency_mismatch"
        assert not [*tmp_path.glob("jobs/*/*.safetensors")], "its concept is not kept"
        streamed = await endpoint.edit(b"photo", "streamed", stream="true")
        assert "event: image_edit.completed" in streamed.text

    run(test, denoised)


def test_a_photo_is_fetched_from_a_named_host_and_from_no_other(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(endpoint: Endpoint) -> None:
        for path in ("/v1/concepts", EDITS):
            fields = {"prompt": (None, "a {subject}")} if path == EDITS else {}
            refused = await endpoint.client.post(path, files=fields | {"image_url": (None, "https://127.0.0.1/a.png")})
            assert (refused.status_code, refused.json()["error"]["param"]) == (422, "image_url")
            assert not endpoint.encoder.uploads
            answer = await endpoint.client.post(path, files=fields | {"image_url": (None, url)})
            assert answer.is_success, answer.text
            assert endpoint.encoder.uploads.pop().images == (b"picture",)

    with photo_host(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\npicture", tmp_path, monkeypatch) as url:
        run(test, denoised, image_hosts=["localhost"])


def test_an_edit_is_refused_before_anything_is_encoded_and_has_its_own_deadline(run: Callable[..., None]) -> None:
    async def slowly(upload: Upload) -> Encoded:
        await asyncio.sleep(0.2)
        return CONCEPT

    async def test(endpoint: Endpoint) -> None:
        holding = asyncio.ensure_future(endpoint.post(GENERATIONS))
        await until(lambda: endpoint.api.gate.taken == 1)
        assert (await endpoint.edit(b"photo")).status_code == 429
        assert (await endpoint.edit(b"photo", "k")).status_code == 429
        assert not endpoint.encoder.uploads
        holding.cancel()
        await until(lambda: endpoint.api.gate.taken == 0)
        endpoint.encoder.encode = slowly
        late = await endpoint.edit(b"photo", deadline_s="0.05")
        assert (late.status_code, len(endpoint.diffusion.works)) == (504, 1)

    run(test, endless, max_pending_images=1)


@pytest.mark.parametrize(
    ("status", "wrong"),
    [
        (422, {"size": "33x32"}),
        (422, {"size": "800x32"}),
        (422, {"prompt": "a beach"}),
        (422, {"prompt": "{subject} {subject}"}),
        (422, {"prompt": "a {subject}", "negative_prompt": "no {subject}"}),
        (422, {"prompt": "very " * 75 + "old {subject}"}),
        (422, {"prompt": "a {subject}", "negative_prompt": "very " * 76}),
        (404, {"concept": "concept_000000000000000000000000"}),
    ],
)
def test_what_cannot_be_made_is_not_accepted_as_a_job(
    run: Callable[..., None], status: int, wrong: dict[str, Any]
) -> None:
    async def test(endpoint: Endpoint) -> None:
        for path, key in ((JOBS, None), (GENERATIONS, "k")):
            answer = await endpoint.post(path, key, **wrong)
            assert answer.status_code == status, answer.text
        assert (await endpoint.client.get(JOBS)).json()["data"] == []
        assert (await endpoint.post(JOBS)).status_code == 202

    run(test, denoised)


OPENAIS_OWN = {
    "model": None,
    "n": None,
    "size": "auto",
    "quality": "auto",
    "background": "auto",
    "moderation": "auto",
    "style": "vivid",
    "response_format": None,
    "output_format": "png",
    "output_compression": 100,
    "stream": False,
    "partial_images": 0,
    "user": None,
}


def test_openais_own_defaults_and_nulls_are_taken_and_what_cannot_be_had_is_not(run: Callable[..., None]) -> None:
    async def test(endpoint: Endpoint) -> None:
        first = await endpoint.post(GENERATIONS, "k", seed=1, output_compression=100)
        spelt = await endpoint.post(GENERATIONS, "k", seed=1, **OPENAIS_OWN)
        assert (first.status_code, spelt.content) == (200, first.content), "it is the same request"
        nulls = await endpoint.post(GENERATIONS, **dict.fromkeys(ImageParameters.model_fields.keys() - {"prompt"}))
        assert nulls.status_code == 200
        refused = {"quality": "hd", "background": "transparent", "moderation": "low", "style": "natural"}
        for param, value in (refused | {"prompt": None, "stpes": None}).items():
            answer = await endpoint.post(GENERATIONS, **{param: value})
            assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
        schema = (await endpoint.client.get("/openapi.json")).json()["paths"][GENERATIONS]["post"]["requestBody"]
        fields = schema["content"]["application/json"]["schema"]["properties"]
        assert [name for name, field in fields.items() if {"type": "null"} not in field.get("anyOf", [])] == [
            "prompt",
            "concept",
        ]

    run(test, denoised)


def test_a_client_that_sends_its_body_too_slowly_is_told_so(run: Callable[..., None]) -> None:
    async def drops(begin: bytes) -> AsyncIterator[bytes]:
        yield begin
        while True:
            yield b"a"
            await asyncio.sleep(0.05)

    async def test(endpoint: Endpoint) -> None:
        part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        form, text = (part, "multipart/form-data; boundary=x"), (b'{"prompt": "', "application/json")
        for path, (begin, kind) in {"/v1/concepts": form, EDITS: form, GENERATIONS: text, JOBS: text}.items():
            answer = await endpoint.client.post(path, content=drops(begin), headers={"Content-Type": kind})
            assert (answer.status_code, answer.json()["error"]["code"]) == (408, "upload_timeout")
        assert endpoint.api.uploads.taken == 0

    run(test, denoised, upload_s=0.2)


def test_a_long_json_body_is_refused_before_it_has_arrived(run: Callable[..., None]) -> None:
    sent = 0

    async def spaces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 10_000
            yield b" " * 10_000

    async def test(endpoint: Endpoint) -> None:
        limit = (await endpoint.client.get("/v1/models/instantbooth")).json()["limits"]["max_json_bytes"]
        answer = await endpoint.client.post(GENERATIONS, content=spaces(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        assert sent <= limit + 20_000

    run(test, denoised)


def test_an_endpoint_without_a_warm_replica_is_alive_and_not_ready(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.stages.READY_S", 0.05)

    async def cold() -> None:
        await asyncio.Event().wait()

    async def test(endpoint: Endpoint) -> None:
        assert (await endpoint.client.get("/readyz")).status_code == 200
        endpoint.diffusion.describe = cold
        answer = await endpoint.client.get("/readyz")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert answer.headers["Retry-After"]
        assert (await endpoint.client.get("/healthz")).status_code == 200

    run(test, denoised)


@pytest.mark.parametrize("stream", [False, True])
def test_a_defect_is_counted_and_logged_once(run: Callable[..., None], stream: bool) -> None:
    logged: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record)

    handler = Handler(logging.ERROR)

    async def test(endpoint: Endpoint) -> None:
        answer = await endpoint.post(GENERATIONS, stream=stream)
        assert '"code":"internal"' in answer.text
        assert "of the inside" not in answer.text
        assert endpoint.api.metrics.rejections.labels("internal")._value.get() == 1

    logging.getLogger("ray.serve").addHandler(handler)
    try:
        run(test, broken)
    finally:
        logging.getLogger("ray.serve").removeHandler(handler)
    assert [record.getMessage() for record in logged] == ["a request failed"]
    assert "KeyError" in logging.Formatter().formatException(logged[0].exc_info)


def test_a_url_outlives_its_replica_where_the_secret_is_configured(run: Callable[..., None], tmp_path: Path) -> None:
    async def test(endpoint: Endpoint) -> None:
        secrets: list[tuple[str | None, int]] = [("s" * 32, 200), ("t" * 32, 401), (None, 401)]
        url = (await endpoint.post(GENERATIONS, response_format="url")).json()["data"][0]["url"]
        for secret, status in secrets:
            another = Endpoint(tmp_path, denoised, url_secret=secret)
            assert (await another.client.get(url)).status_code == status

    run(test, denoised, url_secret="s" * 32)
