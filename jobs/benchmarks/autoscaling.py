"""Load that rises and falls, and what the endpoint makes of it: replicas, queued work and latency over time."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import requests
from prometheus_client.parser import text_string_to_metric_families

from instantbooth.errors import ParameterError
from instantbooth.machine import machine
from jobs import cli
from jobs.benchmarks.serve import PROMPT, endpoint, new_concept
from jobs.goals import at_least, conclude

LOAD = (0.1, 0.5)
"""Between these shares of the time the load rises to its peak and falls again."""
LOOK_S = 0.5
MAX_WAITING = 1000
"""Requests that may wait for their answers."""
SUBJECTS = 4
"""Concepts that the callers ask for in turn."""


@dataclass(frozen=True, kw_only=True)
class AutoscalingBenchmark:
    """Callers who come at a given rate, whoever still waits. The miniature, on one thread a replica."""

    seconds: float = 180.0
    """How long it is watched; the load is on for two fifths of that, and there is none after."""
    peak: float = 9.0
    """Pictures asked for in a second at the height of the load."""
    num_inference_steps: int = 10
    guidance_scale: float = 7.5
    max_replicas: int = 2
    """Diffusion replicas; there is always one."""
    rows_per_replica: float = 200.0
    """Queued U-Net rows for each replica; a guided picture has two a step."""
    output: Path = Path("out/autoscaling")
    """Folder for autoscaling.png and autoscaling.json."""
    port: int = 8124
    """Of the endpoint, on 127.0.0.1."""

    def __post_init__(self) -> None:
        if min(self.seconds, self.peak, self.rows_per_replica) <= 0 or self.max_replicas < 2:
            raise ParameterError(
                f"seconds, peak and rows_per_replica must be above 0 and max_replicas at least 2, are {self.seconds}, "
                f"{self.peak}, {self.rows_per_replica} and {self.max_replicas}; correct them"
            )
        if next(self.arrivals(), None) is None:
            raise ParameterError(
                f"no picture is asked for in seconds={self.seconds} with a peak of {self.peak}; raise one of them"
            )

    def rate(self, second: float) -> float:
        """Pictures asked for in a second, at that second: a triangle."""
        begin, end = (share * self.seconds for share in LOAD)
        return max(0.0, self.peak * (1 - abs(2 * (second - begin) / (end - begin) - 1)))

    def arrivals(self) -> Iterator[float]:
        """Seconds at which a picture is asked for, evenly within the rate."""
        due, second, grain = 0.5, 0.0, 0.01
        while second < LOAD[1] * self.seconds:
            due -= self.rate(second) * grain
            second += grain
            if due <= 0:
                due += 1
                yield second


@dataclass(frozen=True, kw_only=True)
class Look:
    """The endpoint at a moment."""

    second: float
    replicas: int
    """Warm diffusion replicas."""
    queued_rows: float
    """U-Net rows still to compute."""
    rows: dict[str, float]
    """U-Net rows computed since its start, by replica."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a caller got."""

    second: float
    """When it asked."""
    waited: float
    """Seconds."""
    status: int


def autoscaling(options: cli.Flat[AutoscalingBenchmark]) -> None:
    """Writes a plot and its numbers, and prints a summary as JSON; exit status 1 where a replica computed nothing."""
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    cli.make_folder(options.output)
    policy = AutoscalingPolicy(
        policy_function="serve.scaling:QueuedWorkPolicy", policy_kwargs={"rows_per_replica": options.rows_per_replica}
    )
    scaling = AutoscalingConfig(
        min_replicas=1,
        max_replicas=options.max_replicas,
        metrics_interval_s=1,
        look_back_period_s=5,
        upscale_delay_s=3,
        downscale_delay_s=15,
        policy=policy,
    )
    waiting = {"max_pending_images": MAX_WAITING, "max_requests": MAX_WAITING, "deadline_s": 600.0, "row_budget": 8}
    with endpoint(options.port, scaling, **waiting) as url:
        looks, answers = _driven(options, url)
    summary = {"machine": machine("cpu"), **_summary(options, looks, answers)}
    numbers = {"looks": [asdict(look) for look in looks], "answers": [asdict(answer) for answer in answers]}
    (options.output / "autoscaling.json").write_text(json.dumps(summary | numbers, indent=2))
    _plot(options, looks, answers, options.output / "autoscaling.png")
    busy = sum(rows > 0 for rows in _rows(looks))
    conclude(
        summary | {"plot": str(options.output / "autoscaling.png")},
        {"replicas that took part": at_least(busy, options.max_replicas)},
    )


def _driven(options: AutoscalingBenchmark, url: str) -> tuple[list[Look], list[Answer]]:
    """Asks when it is time to, and looks at the endpoint meanwhile."""
    body = {
        "prompt": PROMPT,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
    }
    concepts = [new_concept(url) for _ in range(SUBJECTS)]
    started = time.monotonic()
    looks: list[Look] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            # A busy endpoint may not answer; whatever else goes wrong ends the benchmark.
            with suppress(requests.RequestException):
                looks.append(_look(url, started))

    def ask(second: float, seed: int) -> Answer:
        call = body | {"seed": seed, "concept": concepts[seed % SUBJECTS]}
        answer = requests.post(f"{url}/v1/images/generations", json=call, timeout=700)
        return Answer(second=second, waited=time.monotonic() - started - second, status=answer.status_code)

    with ThreadPoolExecutor(MAX_WAITING + 1) as callers:
        watching = callers.submit(watch)
        try:
            asked = []
            for seed, second in enumerate(options.arrivals()):
                time.sleep(max(0.0, started + second - time.monotonic()))
                asked.append(callers.submit(ask, second, seed))
            answers = [each.result() for each in asked]
            time.sleep(max(0.0, started + options.seconds - time.monotonic()))
        finally:
            over.set()
    watching.result()
    return looks, answers


def _look(url: str, started: float) -> Look:
    page = requests.get(f"{url}/metrics", timeout=30)
    page.raise_for_status()
    samples = {family.name: family.samples for family in text_string_to_metric_families(page.text)}
    return Look(
        second=time.monotonic() - started,
        replicas=len(samples.get("instantbooth_row_budget", [])),
        queued_rows=sum(sample.value for sample in samples.get("instantbooth_queued_work_rows", [])),
        rows={sample.labels["replica"]: sample.value for sample in samples.get("instantbooth_rows", [])},
    )


def _summary(options: AutoscalingBenchmark, looks: list[Look], answers: list[Answer]) -> dict[str, object]:
    most = max(look.replicas for look in looks)
    scaled = [look.second for look in looks if look.replicas > 1]
    waited = [answer.waited for answer in answers if answer.status == 200]
    return {
        "pictures": len(answers),
        "statuses": Counter(answer.status for answer in answers),
        "replicas": {"most": most, "at_the_end": looks[-1].replicas},
        "rows_by_replica": _rows(looks),
        "more_than_one_between_s": [round(second, 1) for second in (scaled[0], scaled[-1])] if scaled else None,
        "most_queued_rows": max(look.queued_rows for look in looks),
        "latency_s": {"median": round(statistics.median(waited), 2), "most": round(max(waited), 2)} if waited else None,
        "options": {name: value for name, value in asdict(options).items() if name not in ("output", "port")},
    }


def _rows(looks: list[Look]) -> list[float]:
    """U-Net rows that each replica computed while it was looked at, the busiest first."""
    replicas = {replica for look in looks for replica in look.rows}
    counted = {replica: [look.rows[replica] for look in looks if replica in look.rows] for replica in replicas}
    return sorted((each[-1] - each[0] for each in counted.values()), reverse=True)


def _plot(options: AutoscalingBenchmark, looks: list[Look], answers: list[Answer], path: Path) -> None:
    from matplotlib.figure import Figure

    seconds = [look.second for look in looks]
    figure = Figure(figsize=(9, 8), layout="constrained")
    load, replicas, queue, latency = figure.subplots(4, sharex=True)
    load.plot(seconds, [options.rate(second) for second in seconds], color="tab:grey")
    load.set_ylabel("pictures asked\nfor a second")
    replicas.step(seconds, [look.replicas for look in looks], where="post", color="tab:blue")
    replicas.set(ylabel="diffusion\nreplicas", ylim=(0, options.max_replicas + 0.5))
    replicas.set_yticks(range(options.max_replicas + 1))
    queue.fill_between(seconds, [look.queued_rows for look in looks], color="tab:orange", alpha=0.6)
    queue.axhline(options.rows_per_replica, color="black", linewidth=0.8, linestyle="--", label="one replica's share")
    queue.set_ylabel("queued rows\n(rows × steps left)")
    queue.legend(loc="upper right")
    for status in sorted({answer.status for answer in answers}):
        those = [answer for answer in answers if answer.status == status]
        label = "pictures" if status == 200 else f"answers {status}"
        latency.plot([each.second for each in those], [each.waited for each in those], ".", label=label)
    latency.set(ylabel="seconds waited,\nby when asked", xlabel="seconds", ylim=(0, None))
    latency.legend(loc="upper right")
    figure.suptitle("Diffusion replicas follow the queued denoising work")
    for axes in (load, replicas, queue, latency):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
