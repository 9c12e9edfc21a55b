"""Step-level batching against request-level batching and against one request at a time, under the same arrivals."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from instantbooth import Personalizer
from instantbooth.engine import Engine, EngineConfig
from instantbooth.engine.concepts import KeysValuesCache
from instantbooth.engine.knee import knee, measure_steps
from instantbooth.errors import ParameterError
from instantbooth.machine import machine
from jobs import cli
from jobs.benchmarks.arrivals import Submit, at_once, poisson, replay
from jobs.benchmarks.delays import delays
from jobs.benchmarks.engine_peak import ONE_REQUEST, against_one_request, share_of_peak
from jobs.benchmarks.engine_plot import plot
from jobs.benchmarks.fixed_batches import FixedBatches
from jobs.benchmarks.full_size import write_full_size
from jobs.benchmarks.workload import Workload
from jobs.goals import Goal, at_least, at_most, conclude

STEP_LEVEL = "step-level"
REQUEST_LEVEL = "request-level"
SHRINKING = "request-level, shrinking"
LOADS = (0.5, 1.0, 2.0)
"""Arrivals as a share of what serial makes."""
CALIBRATION = 12
"""Requests by which serial's capacity is measured."""
STATIC_BATCHES = 3
"""Sizes tried, those that make most rows a second on the curve."""
PATIENCE_S = 60
"""For the curve."""


@dataclass(frozen=True, kw_only=True)
class EngineBenchmark:
    """Requests with different subjects, references, steps and guidance, drawn from a seed."""

    full_size: bool = False
    """Stable Diffusion 1.5's shapes at 512 pixels with random weights, instead of the miniature."""
    requests: int = 36
    """Arrivals at each load; more make p95 surer and the run longer."""
    min_steps: int = 5
    max_steps: int = 20
    """Each request's steps are drawn evenly from this range."""
    max_rows: int = 32
    """Largest number of U-Net rows in a step that is measured."""
    repeats: int = 3
    """Runs of identical requests, in turn, after one to warm up; the curve measures each step three times as often."""
    trials: int = 20
    """Joins and cancels measured."""
    seed: int = 0
    output: Path = Path("out/benchmark-engine")
    """Folder for engine.json and engine.png."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self) -> None:
        for name in ("requests", "max_rows", "repeats", "trials", "min_steps"):
            if getattr(self, name) < 2:
                raise ParameterError(f"{name} must be at least 2, is {getattr(self, name)}; raise it")
        if self.max_steps < self.min_steps:
            raise ParameterError(f"max_steps is {self.max_steps}, below min_steps ({self.min_steps}); raise it")


def engine(options: cli.Flat[EngineBenchmark]) -> None:
    """Prints throughput, latencies, delays and the curve as JSON; writes it and a plot into the output folder.

    Exit status 1 where a goal is missed.
    """
    cli.make_folder(options.output)
    with _personalizer(options) as booth:
        result = _measure(booth, options)
    text = json.dumps(result, indent=2)
    (options.output / "engine.json").write_text(text + "\n")
    plot(json.loads(text), options.output / "engine.png")
    conclude(result, goals_of(result))


def goals_of(result: Mapping[str, Any]) -> dict[str, Goal]:
    """Those at Stable Diffusion 1.5's size are for a GPU, where one is measured."""
    goals = {
        "p95 over request-level's at serial's capacity": at_most(
            result["arrivals"]["p95_over_request_level"][1.0][REQUEST_LEVEL], 0.5
        ),
        "throughput over the best static batch's": at_least(
            result["identical_requests"]["step_level_over_best_static_batch"], 0.95
        ),
    }
    if "one_request" in result:
        goals["knee over one eager request"] = at_least(result["one_request"]["knee_over_one_eager"], 3.0)
        goals["knee over one compiled request"] = at_least(result["one_request"]["knee_over_one_compiled"], 1.5)
    return goals


def _measure(booth: Personalizer, options: EngineBenchmark) -> dict[str, Any]:
    workload = Workload(booth, options.seed)
    measured = {"repeats": 3 * options.repeats, "patience_s": PATIENCE_S, "least_rows": ONE_REQUEST}
    seconds = measure_steps(booth, max_rows=options.max_rows, **measured)
    row_budget = knee(seconds)
    full_size = {}
    if options.full_size:
        full_size["one_request"] = against_one_request(booth, seconds, row_budget, repeats=options.repeats)
        full_size["peak"] = share_of_peak(booth, seconds, row_budget, machine(options.device))
    return {
        "model": "Stable Diffusion 1.5 shapes at 512" if options.full_size else "miniature",
        "machine": machine(options.device),
        "steps": _curve(seconds, row_budget),
        **full_size,
        "identical_requests": _identical(booth, workload, seconds, options),
        "delays": delays(booth, workload.long(), row_budget=row_budget, trials=options.trials),
        "arrivals": _arrivals(booth, workload, row_budget, options),
        "settings": {name: str(value) for name, value in vars(options).items()},
    }


def _curve(seconds: Mapping[int, float], row_budget: int) -> dict[str, object]:
    """Step time against rows, and what batching gains: up to the knee, and beyond it, where it only adds waiting."""
    rates = {rows: rows / each for rows, each in seconds.items()}
    return {
        "milliseconds": {rows: round(1000 * each, 1) for rows, each in seconds.items()},
        "rows_per_second": {rows: round(rate, 1) for rows, rate in rates.items()},
        "knee_rows": row_budget,
        "knee_over_one_guided_request": round(rates[row_budget] / rates[ONE_REQUEST], 3),
        "best_over_knee": round(max(rates.values()) / rates[row_budget], 3),
    }


def _identical(
    booth: Personalizer, workload: Workload, seconds: Mapping[int, float], options: EngineBenchmark
) -> dict[str, object]:
    """The engine against the best of several static batches, on requests that are all the same."""
    promising = sorted(seconds, key=lambda rows: rows / seconds[rows])[-STATIC_BATCHES:]
    sizes = {max(1, rows // 2) for rows in promising}
    static = {f"static batch of {size}": size for size in sorted(sizes)}
    requests = workload.identical(2 * max(sizes), (options.min_steps + options.max_steps) // 2)
    rates: dict[str, list[float]] = {}
    with _servers(booth, knee(seconds), {name: {"batch_size": size} for name, size in static.items()}) as servers:
        for _ in track(range(options.repeats + 1), "identical requests", console=Console(stderr=True)):
            for name, submit in servers.items():
                rates.setdefault(name, []).append(at_once(submit, requests))
    medians = {name: statistics.median(each[1:]) for name, each in rates.items()}
    best = max(static, key=medians.__getitem__)
    return {
        "requests_in_best_static_batch": static[best],
        "images_per_second": {name: round(rate, 3) for name, rate in medians.items()},
        "step_level_over_best_static_batch": round(medians[STEP_LEVEL] / medians[best], 3),
    }


def _arrivals(booth: Personalizer, workload: Workload, row_budget: int, options: EngineBenchmark) -> dict[str, object]:
    """The same requests at the same times to every server, one server after the other."""
    requests = workload.mixed(options.requests, options.min_steps, options.max_steps)
    times = np.array(poisson(options.requests, workload.rng))
    batch = max(1, row_budget // 2)
    fixed = {
        "serial": {"batch_size": 1},
        REQUEST_LEVEL: {"batch_size": batch},
        SHRINKING: {"batch_size": batch, "shrinking": True},
    }
    loads: dict[float, dict[str, dict[str, float]]] = {}
    with _servers(booth, row_budget, fixed) as servers:
        for submit in servers.values():
            at_once(submit, requests[:batch])
        capacity = at_once(servers["serial"], requests[:CALIBRATION])
        turns = list(product(LOADS, servers.items()))
        for load, (name, submit) in track(turns, "arrivals", console=Console(stderr=True)):
            loads.setdefault(load, {})[name] = replay(submit, requests, list(times / (load * capacity))).summary()
    return {
        "serial_images_per_second": round(capacity, 3),
        "requests_in_a_batch": batch,
        "loads": loads,
        "p95_over_request_level": {
            load: {name: round(each["p95_s"] / by_server[name]["p95_s"], 3) for name in (REQUEST_LEVEL, SHRINKING)}
            for load, by_server in loads.items()
            for each in [by_server[STEP_LEVEL]]
        },
    }


@contextmanager
def _servers(
    booth: Personalizer, row_budget: int, fixed: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Submit]]:
    """The engine, and fixed batches of these settings by name."""
    concepts = KeysValuesCache(booth, EngineConfig.concept_cache_bytes)
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(booth, EngineConfig(row_budget=row_budget)))
        submits: dict[str, Submit] = {
            name: stack.enter_context(FixedBatches(booth, concepts, **settings)).submit
            for name, settings in fixed.items()
        }
        yield submits | {STEP_LEVEL: lambda request: engine.submit(request).future}


@contextmanager
def _personalizer(options: EngineBenchmark) -> Iterator[Personalizer]:
    if not options.full_size:
        yield Personalizer.from_pretrained("miniature", device=options.device)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_full_size(Path(folder))
        yield Personalizer.untrained(folder, device=options.device, dtype=torch.bfloat16)
