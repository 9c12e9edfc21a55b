"""The real endpoint with the miniature, as `serve run` starts it: under attack, failures and overload.

SERVING_SCALE below 1 shortens what lasts minutes, for a look; what is promised is promised at 1.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import requests
import yaml

from tests.serve import test_endpoint
from tests.serve.conftest import Client, Server, free_port, png
from tests.serve.test_endpoint import body, generated, metric, pixels, wait_until

pytestmark = pytest.mark.serving

ROOT = Path(__file__).parent.parent.parent
SCALE = float(os.environ.get("SERVING_SCALE", "1"))
CHAOS_S = 180 * SCALE
KILL_EVERY_S = 20
OVERLOAD_S = 120 * SCALE
PENDING = 16
"""Pictures that may wait: a few seconds' work, which is how soon the endpoint recovers."""
STEPS = 8
STAGES = ("generate", "job", "encode", "ingress")
PATIENT = {"type": "number", "minimum": 60, "maximum": 600}
"""Deadlines, as a schema, that nothing misses: sooner ones end in 504, as they should."""


@dataclass
class Tally:
    """What became of many calls."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: dict[int, list[float]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, status: int, seconds: float) -> None:
        with self.lock:
            self.statuses[status] += 1
            self.seconds.setdefault(status, []).append(seconds)


@contextmanager
def running(folder: Path, autoscaling: dict[str, Any]) -> Iterator[Server]:
    """infra/serve.yaml on this machine: loopback, two tenants, no GPU; `autoscaling` of the diffusion stage."""
    from serve.keys import new_key

    port, ada, bob = free_port(), new_key(), new_key()
    config = yaml.safe_load((ROOT / "infra" / "serve.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    application = config["applications"][0]
    application["args"] |= {"store": str(folder / "store"), "keys": {"ada": [ada[1]], "bob": [bob[1]]}}
    application["args"] |= {"max_pending_images": PENDING, "sweep_s": 1, "max_body_bytes": 5_000_000}
    application["args"] |= {"precision": "fp32"}
    for deployment in application["deployments"]:
        deployment["ray_actor_options"] = {"num_cpus": 0.1}
        if "autoscaling_config" in deployment:
            own = autoscaling if deployment["name"] == "DiffusionEngine" else {}
            deployment["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 1} | own
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
    }
    command = [Path(sys.executable).parent / "serve", "run", "-a", "local", folder / "serve.yaml"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: process.poll() is not None or _ready(url), 120)
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            clients = {"ada": Client(url=url, key=ada[0]), "bob": Client(url=url, key=bob[0])}
            yield Server(url=url, store=folder / "store", **clients)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(90)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("real"), {}) as server:
        yield server


@pytest.fixture
def concept(real: Server) -> str:
    return real.ada.new_concept(seed=1)


def _ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/readyz", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def replicas(server: Server) -> dict[str, int]:
    """Stage → process id of a replica."""
    page = requests.get(f"{server.url}/metrics", timeout=10).text
    found = re.findall(r'instantbooth_stage_seconds_count{replica="[^"]*-(\d+)",stage="(\w+)"}', page)
    return {stage: int(pid) for pid, stage in found}


def resident_bytes(pids: dict[str, int]) -> int:
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids.values()]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "promise",
    [
        test_endpoint.test_the_openai_client_works_unchanged,
        test_endpoint.test_every_route_knows_who_is_calling,
        test_endpoint.test_a_stream_shows_every_step_previews_and_the_same_pictures,
        test_endpoint.test_a_job_is_followed_and_fetched,
        test_endpoint.test_a_url_is_good_for_its_picture_alone,
    ],
)
def test_promises_hold_with_the_miniature(real: Server, promise: Callable[[Server, str], None]) -> None:
    promise(real, real.ada.new_concept(seed=1))


def test_a_request_is_traced_through_both_stages_and_its_photo_is_not(real: Server) -> None:
    trace = f"trace-{random.randrange(10**9)}"
    files, fields = [("image", ("secret-name.png", png(3)))], {"prompt": test_endpoint.PROMPT}
    answer = real.ada("POST", "/v1/images/edits", files=files, data=fields, headers={"X-Request-ID": trace})
    assert answer.headers["X-Request-ID"] == trace

    def log() -> str:
        return (real.store.parent / "log").read_text()

    def stages() -> set[str]:
        return set(re.findall(rf"instantbooth:(\w+) pid=.*{trace}", log()))

    wait_until(lambda: {"Api", "ConceptEncoder", "DiffusionEngine"} <= stages())
    assert "secret-name" not in log()
    assert test_endpoint.PROMPT not in log()


def test_no_request_made_up_from_the_schema_breaks_the_server(real: Server, concept: str) -> None:
    schema = real.store.parent / "openapi.json"
    schema.write_text(json.dumps(_with_concept(real.ada("GET", "/openapi.json").json(), concept)))
    command = [Path(sys.executable).parent / "schemathesis", "run", schema, "-u", real.url, "--request-timeout", "60"]
    checks = ["-c", "not_a_server_error", "-H", f"Authorization: Bearer {real.ada.key}"]
    budget = ["--max-examples", str(max(5, int(50 * SCALE))), "--phases", "examples,coverage,fuzzing", "-w", "2"]
    result = subprocess.run([*command, *checks, *budget], capture_output=True, text=True, cwd=real.store.parent)
    print(result.stdout[-1500:])
    assert result.returncode == 0, result.stdout[-6000:]


def _with_concept(schema: dict[str, Any], concept: str) -> dict[str, Any]:
    """The schema where bodies name a concept that exists, and ask for little, in time that suffices."""
    for path in ("/v1/images/generations", "/v1/images/jobs"):
        properties = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
        properties["concept"] = {"const": concept}
        properties["prompt"] = {"enum": ["{subject}", "a {subject} at the beach", "none", "{subject} {subject}"]}
        properties["num_inference_steps"] |= {"maximum": 3}
        properties["n"] |= {"maximum": 2}
        properties["deadline_s"] = PATIENT
    edits = schema["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]
    edits["schema"]["properties"]["deadline_s"] = PATIENT
    return schema


def test_a_hundred_calls_with_one_key_are_one_generation(real: Server, concept: str) -> None:
    wait_until(lambda: not _unfinished(real.ada), 60)
    before = metric(real, "instantbooth_requests_ended_total")
    with ThreadPoolExecutor(100) as pool:
        calls = [pool.submit(_patiently, real.ada, body(concept, num_inference_steps=STEPS), "one") for _ in range(100)]
        answers = [call.result() for call in calls]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert metric(real, "instantbooth_requests_ended_total") == before + 1


def test_clients_that_leave_at_any_moment_leave_nothing_behind(real: Server, concept: str) -> None:
    address = real.url.removeprefix("http://")
    headers = {"Authorization": f"Bearer {real.ada.key}", "Content-Type": "application/json"}
    chance = random.Random(0)
    for number in range(20):
        connection = http.client.HTTPConnection(address)
        wanted = body(concept, stream=number % 2 == 0, partial_images=2, num_inference_steps=100, n=3)
        connection.request("POST", "/v1/images/generations", json.dumps(wanted), headers)
        time.sleep(chance.random())
        connection.close()
    seconds = wait_until(lambda: metric(real, "instantbooth_queued_work_rows") == 0, 3)
    print(f"the last rows were free after {seconds:.2f} s")
    assert generated(real.ada, concept).status_code == 200


def test_killed_replicas_cost_no_job_and_no_wrong_picture(real: Server, concept: str) -> None:
    seeds = range(6)
    wanted = [
        pixels(_b64(_patiently(real.ada, body(concept, seed=n, num_inference_steps=STEPS), f"w{n}").json()))
        for n in seeds
    ]
    kills = int(CHAOS_S // KILL_EVERY_S)
    ends, killed, checked, jobs = time.monotonic() + CHAOS_S, Counter[str](), Counter[str](), dict[str, int]()

    def right(answer: dict[str, Any], seed: int) -> bool:
        return bool(abs(pixels(_b64(answer)) - wanted[seed]).max() <= 1)

    def call(worker: int) -> None:
        number = 0
        while time.monotonic() < ends:
            seed, number = random.choice(seeds), number + 1
            answer = _patiently(real.ada, body(concept, seed=seed, num_inference_steps=STEPS), f"c{worker}-{number}")
            assert right(answer.json(), seed)
            checked["calls"] += 1

    def submit() -> None:
        while time.monotonic() < ends:
            seed = random.choice(seeds)
            try:
                answer = real.ada("POST", "/v1/images/jobs", json=body(concept, seed=seed, num_inference_steps=STEPS))
            except requests.RequestException:
                continue
            if answer.status_code == 202:
                jobs[answer.json()["id"]] = seed
            else:
                assert answer.json()["error"]["message"]
            time.sleep(1)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(call, worker) for worker in range(3)] + [pool.submit(submit)]
        for number in range(kills):
            time.sleep(KILL_EVERY_S / 2)
            stage = STAGES[number % len(STAGES)]
            os.kill(_eventually(lambda stage=stage: replicas(real).get(stage)), signal.SIGKILL)
            killed[stage] += 1
            time.sleep(KILL_EVERY_S / 2)
        for each in running:
            each.result()
    for job, seed in jobs.items():
        found = _eventually(lambda job=job: _finished(real.ada, job), 120)
        assert found["status"] == "succeeded", found
        assert right(found["result"], seed)
    print(f"killed {dict(killed)}; {checked['calls']} calls and {len(jobs)} jobs, every picture right")
    assert killed.total() == kills > 0
    assert set(killed) == set(STAGES[:kills])
    assert checked["calls"]
    assert jobs


def test_overload_costs_no_throughput_and_ends_with_the_load(real: Server, concept: str) -> None:
    wanted = body(concept, num_inference_steps=STEPS)
    capacity = _capacity(real, wanted)
    pids, tally, memory = replicas(real), Tally(), []
    assert set(pids) == set(STAGES)
    rate = 5 * capacity
    started = time.monotonic()
    with ThreadPoolExecutor(PENDING + 64) as pool:
        sent = 0
        while (now := time.monotonic() - started) < OVERLOAD_S:
            if now > sent / rate:
                pool.submit(_timed, real.ada, wanted | {"seed": sent}, tally)
                sent += 1
                if sent % max(1, int(rate * OVERLOAD_S / 4)) == 0:
                    memory.append(resident_bytes(pids))
            else:
                time.sleep(sent / rate - now)
        finished = tally.statuses[200]
        ended = time.monotonic()
    wait_until(lambda: generated(real.ada, concept).status_code == 200, 10)
    wait_until(lambda: metric(real, "instantbooth_queued_work_rows") == 0, 10)
    recovery = time.monotonic() - ended
    goodput, refusals = finished / OVERLOAD_S, sorted(tally.seconds.get(429, []))
    assert len(refusals) > sent / 2, "most of what is offered five times over must be refused"
    print(
        f"capacity {capacity:.2f}/s, offered {sent / OVERLOAD_S:.1f}/s, goodput {goodput:.2f}/s "
        f"({goodput / capacity:.0%}); {len(refusals)} refused in {median(refusals) * 1000:.0f} ms (median), "
        f"{refusals[int(0.99 * len(refusals))] * 1000:.0f} ms (99 %), {refusals[-1] * 1000:.0f} ms (most); "
        f"memory {[round(each / 1e6) for each in memory]} MB; recovered after {recovery:.1f} s; {tally.statuses}"
    )
    assert set(tally.statuses) <= {200, 429}
    assert goodput >= 0.9 * capacity
    assert refusals[-1] < 0.2
    assert len(memory) > 1
    assert memory[-1] <= 1.05 * memory[0]
    assert recovery <= 10


def test_replicas_follow_the_work(tmp_path: Path) -> None:
    policy = {"policy_function": "serve.scaling:QueuedWorkPolicy", "policy_kwargs": {"rows_per_replica": 200}}
    delays = {"upscale_delay_s": 2, "downscale_delay_s": 10, "look_back_period_s": 6, "metrics_interval_s": 1}
    with running(tmp_path, {"max_replicas": 2, "policy": policy, **delays}) as server:
        concept = server.ada.new_concept()
        # One request, but of 4000 rows: counting requests would see no reason to grow.
        wanted = body(concept, n=10, num_inference_steps=200, guidance_scale=7)
        job = server.ada("POST", "/v1/images/jobs", json=wanted).json()["id"]
        grown = wait_until(lambda: _diffusion_replicas(server) == 2, 120)
        wait_until(lambda: _finished(server.ada, job), 600)
        assert _finished(server.ada, job)["status"] == "succeeded"
        shrunk = wait_until(lambda: _diffusion_replicas(server) == 1, 90)
    print(f"a second replica was warm after {grown:.0f} s, and gone {shrunk:.0f} s after the work")


def _diffusion_replicas(server: Server) -> int:
    page = requests.get(f"{server.url}/metrics", timeout=10).text
    return len(re.findall(r"^instantbooth_row_budget{", page, re.MULTILINE))


def _capacity(server: Server, wanted: dict[str, Any]) -> float:
    """Pictures a second of callers who wait, as many as the endpoint takes."""
    tally, ends = Tally(), time.monotonic() + max(10.0, 30 * SCALE)

    def call(worker: int) -> None:
        while time.monotonic() < ends:
            _timed(server.ada, wanted | {"seed": worker}, tally)

    started = time.monotonic()
    with ThreadPoolExecutor(PENDING) as pool:
        list(pool.map(call, range(PENDING)))
    return tally.statuses[200] / (time.monotonic() - started)


def _timed(client: Client, wanted: dict[str, Any], tally: Tally) -> None:
    started = time.monotonic()
    try:
        status = client("POST", "/v1/images/generations", json=wanted).status_code
    except requests.RequestException:
        status = 0
    tally.add(status, time.monotonic() - started)


def _patiently(client: Client, wanted: dict[str, Any], key: str) -> requests.Response:
    """What a careful client does: the same call with the same key, until there is an answer."""
    while True:
        try:
            answer = client("POST", "/v1/images/generations", json=wanted, headers={"Idempotency-Key": key})
            if answer.status_code == 200:
                return answer
            assert answer.status_code in (429, 500, 503, 504), answer.text
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        except requests.RequestException:
            pass
        time.sleep(0.3)


def _unfinished(client: Client) -> list[str]:
    """Jobs of former tests: what they make would be counted with this one's."""
    jobs = client("GET", "/v1/images/jobs?limit=100").json()["data"]
    return [job["id"] for job in jobs if job["status"] in ("queued", "running")]


def _b64(answer: dict[str, Any]) -> str:
    return str(answer["data"][0]["b64_json"])


def _finished(client: Client, job: str) -> dict[str, Any] | None:
    answer = client("GET", f"/v1/images/jobs/{job}")
    assert answer.status_code == 200 or answer.json()["error"]["message"]
    assert answer.status_code != 404, f"job {job} was accepted and is lost"
    found = answer.json() if answer.status_code == 200 else {"status": "unknown"}
    return found if found["status"] in ("succeeded", "failed", "cancelled") else None


def _eventually(question: Callable[[], Any], seconds: float = 30) -> Any:
    """The first answer that is one, though the server may not answer at once."""
    ends = time.monotonic() + seconds
    while True:
        try:
            if (answer := question()) is not None:
                return answer
        except requests.RequestException:
            pass
        assert time.monotonic() < ends, "there was no answer"
        time.sleep(0.3)
