"""What HTTP and Ray Serve add to a request: the same picture from an engine in this process, and from the endpoint."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import requests
import torch
from PIL import Image

from instantbooth import Personalizer
from instantbooth.engine import Engine, EngineConfig
from instantbooth.machine import machine
from jobs import cli
from jobs.benchmarks.timing import measure
from jobs.cluster import ray_cluster
from jobs.goals import at_most, conclude

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingConfig

PROMPT = "a photo of a {subject} at the beach"
MOST_OVER_ENGINE = 1.1
SUBJECT = Image.new("RGBA", (64, 64))
SUBJECT.paste((200, 120, 80, 255), (8, 8, 56, 56))


@dataclass(frozen=True, kw_only=True)
class ServeBenchmark:
    """One caller, one picture after the other, with the miniature on one thread."""

    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    repeats: int = 15
    """Requests to each, in turn, after one to warm up."""
    port: int = 8123
    """Of the endpoint, on 127.0.0.1."""


def serve(options: cli.Flat[ServeBenchmark]) -> None:
    """Prints the medians, what the endpoint adds, and the ratio, as JSON; exit status 1 where it adds too much."""
    torch.set_num_threads(1)
    settings = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    booth = Personalizer.from_pretrained("miniature", device="cpu")
    concept = booth.encode([SUBJECT])
    with endpoint(options.port, row_budget=2) as url, Engine(booth, EngineConfig(row_budget=2)) as engine:
        session = requests.Session()
        body = {"prompt": PROMPT, "concept": new_concept(url), "seed": 7, **settings}
        [request] = booth.requests(PROMPT, concept, seed=7, **settings)

        def in_process() -> None:
            engine.submit(request).result()

        def through_http() -> None:
            session.post(f"{url}/v1/images/generations", json=body, timeout=60).raise_for_status()

        variants = {"engine": in_process, "endpoint": through_http}
        medians = measure(variants, options.repeats, torch.device("cpu"))
    added = medians["endpoint"] - medians["engine"]
    result: dict[str, Any] = {
        "machine": machine("cpu"),
        "request": settings,
        "endpoint_over_engine": round(medians["endpoint"] / medians["engine"], 3),
        "added_milliseconds": round(1000 * added, 1),
        "median_milliseconds": {name: round(1000 * value, 1) for name, value in medians.items()},
    }
    conclude(result, {"endpoint over engine": at_most(result["endpoint_over_engine"], MOST_OVER_ENGINE)})


@contextmanager
def endpoint(port: int, scaling: AutoscalingConfig | None = None, **settings: Any) -> Iterator[str]:
    """The endpoint on a Ray of its own, with one diffusion replica or as `scaling` says; its address."""
    from ray import serve as ray_serve

    from serve.app import ONE_REPLICA, application
    from serve.config import ServeConfig

    with tempfile.TemporaryDirectory() as folder, ray_cluster():
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        ray_serve.run(application(ServeConfig(store=folder, **settings), scaling or ONE_REPLICA))
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            ray_serve.shutdown()


def new_concept(url: str) -> str:
    """The id of a concept that was made of a plain picture, whose alpha channel is its mask."""
    photo = io.BytesIO()
    SUBJECT.save(photo, "PNG")
    made = requests.post(f"{url}/v1/concepts", files={"image": photo.getvalue()}, timeout=60)
    made.raise_for_status()
    return str(made.json()["id"])
