"""The endpoint's promises, over HTTP on the tiny model."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
from PIL import Image
from ray import serve

from instantbooth import Personalizer
from instantbooth.images import read_png_metadata
from serve.page import POLICY
from tests.serve.conftest import Client, Server, png, portrait

PROMPT = "a photo of a {subject} at the beach"
LONG = {"num_inference_steps": 200, "n": 10}
"""Some seconds of work."""


def body(concept: str, **changes: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "concept": concept, "num_inference_steps": 3, "seed": 5} | changes


def generated(client: Client, concept: str, **changes: Any) -> requests.Response:
    return client("POST", "/v1/images/generations", json=body(concept, **changes))


def events_of(answer: requests.Response) -> list[dict[str, Any]]:
    """The data of a stream's events, each checked against its name."""
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = re.fullmatch(r"event: (.+)\ndata: (.+)", block).groups()
        found.append(json.loads(data))
        assert name == found[-1].get("type", "error")
    return found


def pixels(b64_json: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))), int)


def metric(server: Server, name: str) -> float:
    """The sum of a metric over its replicas; `name` may go on with the first labels."""
    lines = requests.get(f"{server.url}/metrics", timeout=10).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and line[len(name)] in "{, ")


def wait_until(condition: Any, seconds: float = 10) -> float:
    """Seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not happen"
        time.sleep(0.02)
    return time.monotonic() - started


def test_a_picture_is_the_librarys_own(server: Server, booth: Personalizer) -> None:
    concept = booth.encode([Image.open(io.BytesIO(png(1)))])
    wanted = booth.generate(PROMPT, concept, num_images_per_prompt=2, num_inference_steps=3, seed=5)
    answer = generated(server.ada, server.ada.new_concept(1), n=2).json()
    assert [each["seed"] for each in answer["data"]] == [5, 6]
    assert answer["concept"]["digest"] == concept.digest
    assert answer["parameters"]["num_inference_steps"] == 3
    for picture, each in zip(wanted, answer["data"], strict=True):
        assert abs(pixels(each["b64_json"]) - np.asarray(picture, int)).max() <= 1


def test_the_openai_client_works_unchanged(server: Server, concept: str) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.ada.key, max_retries=0)
    assert [model.id for model in client.models.list()] == ["instantbooth"]
    extra = {"concept": concept, "num_inference_steps": 4, "seed": 1}
    answer = client.images.generate(
        model="instantbooth",
        prompt=PROMPT,
        n=None,
        size="32x32",
        quality="auto",
        background="auto",
        moderation="auto",
        response_format="url",
        output_format="webp",
        extra_body=extra,
    )
    assert answer.data is not None
    picture = requests.get(str(answer.data[0].url), timeout=10)
    assert picture.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(picture.content)).size == (32, 32)
    stream = client.images.generate(
        model="instantbooth", prompt=PROMPT, stream=True, partial_images=1, extra_body=extra
    )
    names = [event.type for event in stream]
    assert names.count("image_generation.completed") == 1
    assert names[-1] == "image_generation.completed"
    edited = client.images.edit(
        model="instantbooth", image=[("a.png", png(1)), ("b.png", png(2))], prompt=PROMPT, extra_body={"seed": 3}
    )
    assert edited.data is not None
    assert edited.data[0].b64_json
    with pytest.raises(openai.NotFoundError, match="concept"):
        client.images.generate(prompt=PROMPT, extra_body={"concept": "concept_000000000000000000000000"})
    with pytest.raises(openai.UnprocessableEntityError, match="exactly once"):
        client.images.generate(prompt="a beach", extra_body=extra)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()


def test_a_stream_shows_every_step_previews_and_the_same_pictures(server: Server, concept: str) -> None:
    wanted = {"n": 2, "num_inference_steps": 40}
    whole = generated(server.ada, concept, **wanted).json()
    events = events_of(generated(server.ada, concept, **wanted, stream=True, partial_images=1))
    partial = [event for event in events if event["type"].endswith("partial_image")]
    assert sorted((event["image_index"], event["step"]) for event in partial) == [(0, 20), (1, 20)]
    assert all(pixels(event["b64_json"]).std() > 0 for event in partial)
    for index in range(2):
        own = [event for event in events if event["image_index"] == index]
        steps = [event["step"] for event in own if event["type"].endswith("progress")]
        assert steps == list(range(1, 41))
        completed = next(event for event in own if event["type"].endswith("completed"))
        assert abs(pixels(completed["b64_json"]) - pixels(whole["data"][index]["b64_json"])).max() <= 1
        assert completed["parameters"] == whole["parameters"]


def test_a_concept_lives_until_it_is_deleted_everywhere(server: Server) -> None:
    first, second = (server.bob.new_concept(n, name=f"subject {n}", consent="form 7") for n in (1, 2))
    page = server.bob("GET", "/v1/concepts?limit=1").json()
    assert [each["id"] for each in page["data"]] == [second]
    assert page["has_more"]
    rest = server.bob("GET", f"/v1/concepts?after={page['last_id']}").json()
    assert [each["id"] for each in rest["data"]] == [first]
    assert server.bob("GET", f"/v1/concepts/{first}").json()["consent"] == "form 7"
    assert generated(server.bob, first).json()["concept_cache"] == "miss"
    assert generated(server.bob, first).json()["concept_cache"] == "hit"
    held = metric(server, "instantbooth_concept_cache_bytes")
    assert server.bob("DELETE", f"/v1/concepts/{first}").json()["deleted"] is True
    assert generated(server.bob, first).status_code == 404
    assert server.bob("DELETE", f"/v1/concepts/{first}").status_code == 404
    assert metric(server, "instantbooth_concept_cache_bytes") < held
    assert not [path for path in server.store.rglob("*") if first in path.name]


def test_a_concept_ends_by_itself(server: Server) -> None:
    held = metric(server, "instantbooth_concept_cache_bytes")
    concept = server.ada.new_concept(4, ttl_s="3")
    assert generated(server.ada, concept).status_code == 200
    assert metric(server, "instantbooth_concept_cache_bytes") > held

    def kept() -> list[Path]:
        return [path for path in server.store.rglob("*") if concept in path.name]

    assert len(kept()) == 3, "a record, tensors, and the mark of when they end"
    wait_until(lambda: server.ada("GET", f"/v1/concepts/{concept}").status_code == 404)
    assert generated(server.ada, concept).status_code == 404
    wait_until(lambda: metric(server, "instantbooth_concept_cache_bytes") <= held)
    wait_until(lambda: not kept())


def test_every_route_knows_who_is_calling(server: Server, concept: str) -> None:
    job = server.ada("POST", "/v1/images/jobs", json=body(concept)).json()["id"]
    shared = [("GET", "/v1/models", {}), ("GET", "/v1/models/instantbooth", {})]
    lists = [("GET", "/v1/concepts", {}), ("GET", "/v1/images/jobs", {})]
    files = {"files": [("image", png(1))]}
    makes = [("POST", "/v1/concepts", files), ("POST", "/v1/images/edits", files | {"data": {"prompt": PROMPT}})]
    owned = [
        ("GET", f"/v1/concepts/{concept}", {}),
        ("POST", "/v1/images/generations", {"json": body(concept)}),
        ("POST", "/v1/images/jobs", {"json": body(concept)}),
        ("GET", f"/v1/images/jobs/{job}", {}),
        ("GET", f"/v1/images/jobs/{job}/events", {}),
        ("POST", f"/v1/images/jobs/{job}/cancel", {}),
        ("DELETE", f"/v1/concepts/{concept}", {}),
    ]
    tested = {(method, path) for method, path, _ in (*shared, *lists, *makes, *owned)}
    for path, methods in requests.get(f"{server.url}/openapi.json", timeout=10).json()["paths"].items():
        known = path.format(model_id="instantbooth", concept_id=concept, job_id=job, tenant="", name="")
        for method in methods:
            open_to_all = path.startswith(("/healthz", "/readyz", "/metrics", "/v1/images/files"))
            assert open_to_all or (method.upper(), known) in tested, path
    for method, path, arguments in (*shared, *lists, *makes, *owned):
        for stranger in (server.stranger(), server.stranger("ib-wrong")):
            answer = stranger(method, path, **arguments)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["type"] == "authentication_error"
    for method, path, arguments in owned:
        answer = server.bob(method, path, **arguments)
        assert answer.status_code == 404, path
    for _, path, _ in lists:
        assert not {concept, job} & {each["id"] for each in server.bob("GET", path).json()["data"]}


@pytest.mark.parametrize(
    ("status", "method", "path", "arguments"),
    [
        (400, "POST", "/v1/images/generations", {"data": b"{", "headers": {"Content-Type": "application/json"}}),
        (400, "POST", "/v1/images/generations", {"json": [1]}),
        (400, "POST", "/v1/images/generations", {"json": {}, "headers": {"Idempotency-Key": "x" * 300}}),
        (400, "POST", "/v1/concepts", {"files": [("image", png(1))], "headers": {"Idempotency-Key": "k"}}),
        (400, "POST", "/v1/concepts", {"data": b"x", "headers": {"Content-Type": "multipart/form-data"}}),
        (404, "GET", "/v1/nothing", {}),
        (404, "GET", "/v1/concepts/..%2F..%2Fetc", {}),
        (404, "GET", "/v1/models/gpt", {}),
        (405, "PUT", "/v1/concepts", {}),
        (413, "POST", "/v1/concepts", {"data": b"x" * 2_100_000}),
        (413, "POST", "/v1/images/generations", {"json": {"prompt": "x" * 70_000}}),
        (413, "POST", "/v1/images/jobs", {"json": {"prompt": "x" * 70_000}}),
        (413, "POST", "/v1/concepts", {"files": [("image", b"x" * 1_100_000)]}),
        (415, "POST", "/v1/images/generations", {"data": b"{}", "headers": {"Content-Type": "text/plain"}}),
        (415, "POST", "/v1/concepts", {"json": {}}),
        (422, "POST", "/v1/concepts", {"files": [("image", b"no picture")]}),
        (422, "POST", "/v1/concepts", {"files": [("photo", png(1))]}),
        (422, "POST", "/v1/concepts", {"files": [("image", png(1))] * 17}),
        (422, "POST", "/v1/concepts", {"files": [("image", png(1))], "data": {"class_noun": "teapot"}}),
        (422, "POST", "/v1/concepts", {"files": [("image", png(1))], "data": {"ttl_s": "99999999"}}),
        (422, "POST", "/v1/concepts", {"files": [("mask", png(1))], "data": {"image_url": "https://a.example/b.png"}}),
        (422, "GET", "/v1/concepts?limit=1000", {}),
    ],
)
def test_every_error_has_its_status_and_one_shape(
    server: Server, status: int, method: str, path: str, arguments: dict[str, Any]
) -> None:
    answer = server.ada(method, path, **arguments)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert answer.headers["X-Request-ID"]


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("prompt", "a beach"),
        ("n", 11),
        ("size", "33x32"),
        ("size", "huge"),
        ("num_inference_steps", 201),
        ("guidance_scale", -1),
        ("adapter_scale", 3),
        ("sampler", "magic"),
        ("output_format", "gif"),
        ("seed", -1),
        ("deadline_s", 0),
        ("negative_prompt", "a {subject}"),
        ("stpes", 3),
    ],
)
def test_a_wrong_parameter_is_named(server: Server, concept: str, param: str, value: object) -> None:
    answer = generated(server.ada, concept, **{param: value})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == param


def test_one_key_one_generation(server: Server, concept: str) -> None:
    before = metric(server, "instantbooth_requests_ended_total")
    wanted = body(concept, response_format="url", seed=None, num_inference_steps=8)

    def call(_: int) -> requests.Response:
        return server.ada("POST", "/v1/images/generations", json=wanted, headers={"Idempotency-Key": "same"})

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(call, range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert metric(server, "instantbooth_requests_ended_total") == before + 1
    changed = wanted | {"seed": 2}
    answer = server.ada("POST", "/v1/images/generations", json=changed, headers={"Idempotency-Key": "same"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_mismatch")
    others = server.bob("POST", "/v1/images/generations", json=wanted, headers={"Idempotency-Key": "same"})
    assert others.status_code == 404


def test_a_job_is_followed_and_fetched(server: Server, concept: str) -> None:
    accepted = server.ada("POST", "/v1/images/jobs", json=body(concept, n=2))
    assert accepted.status_code == 202
    job = accepted.json()["id"]
    events = events_of(server.ada("GET", f"/v1/images/jobs/{job}/events"))
    completed = {event["image_index"]: event["b64_json"] for event in events if "completed" in event["type"]}
    found = server.ada("GET", f"/v1/images/jobs/{job}").json()
    assert found["status"] == "succeeded"
    assert [each["b64_json"] for each in found["result"]["data"]] == [completed[0], completed[1]]
    assert job in [each["id"] for each in server.ada("GET", "/v1/images/jobs").json()["data"]]
    assert server.ada("POST", f"/v1/images/jobs/{job}/cancel").status_code == 409


def test_a_cancelled_job_frees_its_rows(server: Server, concept: str) -> None:
    job = server.ada("POST", "/v1/images/jobs", json=body(concept, **LONG)).json()["id"]
    wait_until(lambda: server.ada("GET", f"/v1/images/jobs/{job}").json()["step"] > 0)
    assert server.ada("POST", f"/v1/images/jobs/{job}/cancel").json()["status"] == "cancelled"
    wait_until(lambda: metric(server, "instantbooth_queued_work_rows") == 0)
    assert server.ada("GET", f"/v1/images/jobs/{job}").json()["status"] == "cancelled"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(server: Server, concept: str, stream: bool) -> None:
    cancelled = metric(server, 'instantbooth_requests_ended_total{how="cancelled"')
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    headers = {"Authorization": f"Bearer {server.ada.key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/images/generations", json.dumps(body(concept, stream=stream, **LONG)), headers)
    wait_until(lambda: metric(server, "instantbooth_queued_work_rows") > 0)
    connection.close()
    wait_until(lambda: metric(server, "instantbooth_queued_work_rows") == 0, seconds=2)
    assert metric(server, 'instantbooth_requests_ended_total{how="cancelled"') == cancelled + LONG["n"]


def test_the_page_is_there_without_a_key(server: Server) -> None:
    page = requests.get(f"{server.url}/", timeout=10)
    assert page.headers["Content-Security-Policy"] == POLICY
    for script in re.findall(r'(?:src|href)="(web/[^"]+)"', page.text):
        assert requests.get(f"{server.url}/{script}", timeout=10).status_code == 200


def test_too_many_are_refused_at_once(server: Server, concept: str) -> None:
    another = server.bob.new_concept()
    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(generated, server.ada, concept, **LONG, deadline_s=1.5) for _ in range(2)]
        wait_until(lambda: metric(server, "instantbooth_queued_work_rows") > 0)
        time.sleep(0.2)
        refused = generated(server.bob, another)
        assert not any(each.done() for each in held), "refused while they wait, not afterwards"
        ended = [each.result() for each in held]
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert [each.status_code for each in ended] == [504, 504]
    assert {each.json()["error"]["code"] for each in ended} == {"deadline_exceeded"}
    assert generated(server.ada, concept).status_code == 200


def test_what_a_photo_says_of_its_place_stays_out(server: Server) -> None:
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    buffer = io.BytesIO()
    portrait(9)[0].save(buffer, "JPEG", exif=exif)
    assert b"taken at home" in buffer.getvalue()
    answer = server.ada(
        "POST", "/v1/images/edits", files=[("image[]", buffer.getvalue())], data={"prompt": PROMPT, "seed": "1"}
    )
    picture = base64.b64decode(answer.json()["data"][0]["b64_json"])
    assert b"taken at home" not in picture
    assert read_png_metadata(picture)["seed"] == "1"
    concept = server.ada("POST", "/v1/concepts", files=[("image", buffer.getvalue())]).json()["id"]
    kept = [path.read_bytes() for path in server.store.rglob("*") if concept in path.name]
    assert len(kept) == 3
    assert not any(b"taken at home" in data for data in kept)


def test_a_url_is_good_for_its_picture_alone(server: Server, concept: str) -> None:
    url = generated(server.ada, concept, n=2, response_format="url").json()["data"][0]["url"]
    assert requests.get(url, timeout=10).headers["content-type"] == "image/png"
    for wrong in (
        url.replace("-0.png", "-1.png"),
        url.replace("/ada/", "/bob/"),
        re.sub(r"expires=\d", "expires=9", url),
        url.partition("?")[0],
    ):
        assert requests.get(wrong, timeout=10).status_code == 401


def test_what_is_under_way_is_finished_when_the_endpoint_is_taken_down(server: Server, concept: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(generated, server.ada, concept, **LONG | {"n": 2})
        wait_until(lambda: metric(server, "instantbooth_queued_work_rows") > 0)
        serve.delete("default")
        answer = call.result()
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == 2
    assert requests.get(f"{server.url}/healthz", timeout=10).status_code == 404
