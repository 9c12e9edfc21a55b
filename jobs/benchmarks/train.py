"""A training of the miniature in its loop against the bare step on batches that are already in memory."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from instantbooth import Personalizer
from instantbooth.errors import ParameterError
from instantbooth.machine import machine
from instantbooth.model.base import device_of
from instantbooth.presets import preset
from instantbooth.storage import open_store
from instantbooth.training.adapters import AdapterTrainingConfig, ExamplePreparer
from instantbooth.training.checkpoints import log_lines
from instantbooth.training.session import ComputeConfig, TrainingSession
from jobs import cli
from jobs.benchmarks.full_size import write_full_size
from jobs.benchmarks.training_step import compare_steps
from jobs.cluster import ray_cluster
from jobs.goals import at_least, conclude
from jobs.train import train as run_training
from pipelines.feed import MAX_ROWS_PER_TASK, TASKS_AHEAD, Shards, TrainingFeed
from pipelines.model import ModelConfig
from pipelines.trainer import LOG, TrainConfig, shaped

FIRST = 20
"""Steps before those that count: then everything is warm, and the feed as far ahead as it comes."""
AHEAD = TASKS_AHEAD * MAX_ROWS_PER_TASK
"""Examples after those that count, as many as the feed is ahead: else the last would be trained on without it."""


@dataclass(frozen=True, kw_only=True)
class TrainBenchmark:
    """What feeding, logging and saving cost a training, on one worker; or the step at full size."""

    data: str | None = None
    """URI of an ingestion's output folder. Where it was precomputed, training on that is measured too."""
    full_size: bool = False
    """Instead: Stable Diffusion 1.5 at 512 pixels with random weights, step by step, beside diffusers' own."""
    steps: int = 160
    """Steps of each run that count. A training makes 20 before them, and after them those of 2048 examples."""
    batch_size: int = 16
    """Examples of a step."""
    repeats: int = 3
    """Runs of each, in turn. At full size there is one."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self) -> None:
        if not self.full_size and self.data is None:
            raise ParameterError("the benchmark needs data, which is None; name an ingestion's output, or full_size")
        if min(self.steps, self.batch_size, self.repeats) < 1:
            raise ParameterError(
                f"steps, batch_size and repeats must be at least 1, are {self.steps}, {self.batch_size} and "
                f"{self.repeats}; raise what is too low"
            )


def train(options: cli.Flat[TrainBenchmark]) -> None:
    """Prints samples/s, ratios and memory as JSON. Exit status 1 where the goal is missed, which is the miniature's."""
    about = {"machine": machine(options.device)}
    if options.full_size:
        conclude(about | _full_size(options), {})
    else:
        result = _miniature(options)
        conclude(about | result, {"training over bare": at_least(result["training_over_bare"], 0.95)})


def _miniature(options: TrainBenchmark) -> dict[str, Any]:
    """The bare step, the training, and the training on precomputed columns, in turn."""
    steps = FIRST + options.steps + math.ceil(AHEAD / options.batch_size)
    config = AdapterTrainingConfig(steps=steps, batch_size=options.batch_size)
    shards = Shards.of(str(options.data))
    trainings = {"training": False} | ({"precomputed": True} if shards.precomputed else {})
    rates: dict[str, list[float]] = {name: [] for name in ("bare", *trainings)}
    peaks = dict.fromkeys(trainings, 0)
    with ray_cluster():
        for _ in range(options.repeats):
            rates["bare"].append(_bare(options, shards, config))
            for name, precomputed in trainings.items():
                rate, memory = _whole(options, config, precomputed=precomputed)
                rates[name].append(rate)
                peaks[name] = max(peaks[name], memory)
    medians = {name: statistics.median(each) for name, each in rates.items()}
    ratios = {"training_over_bare": medians["training"] / medians["bare"]}
    if shards.precomputed:
        ratios["precomputed_over_plain"] = medians["precomputed"] / medians["training"]
    return {
        "samples_per_second": {name: round(rate, 2) for name, rate in medians.items()},
        "spread": {name: [round(min(each), 2), round(max(each), 2)] for name, each in rates.items()},
        **{name: round(ratio, 3) for name, ratio in ratios.items()},
        "worker_peak_memory_mb": peaks,
    }


def _full_size(options: TrainBenchmark) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_full_size(Path(folder))
        steps = compare_steps(
            Path(folder),
            Path(folder, "image_encoder"),
            batch_size=options.batch_size,
            steps=options.steps,
            device=device_of(options.device),
        )
    rates = {name: values["samples_per_second"] for name, values in steps.items()}
    return {
        "batch_size": options.batch_size,
        "steps": steps,
        "compiled_over_eager": round(rates["compiled"] / rates["eager"], 3),
        "eager_over_diffusers": round(rates["eager"] / rates["diffusers"], 3),
    }


def _bare(options: TrainBenchmark, shards: Shards, config: AdapterTrainingConfig) -> float:
    """Samples/s of the step alone, in this process."""
    model = preset("miniature")
    feed = TrainingFeed(
        shards=shards,
        prepare=ExamplePreparer.for_model(model.base, model.image_encoder),
        seed=0,
        batch_size=options.batch_size,
    )
    booth = Personalizer.from_pretrained("miniature", device=options.device)
    batches = [shaped(batch, booth) for batch in feed.batches(0, 8)]
    threads = torch.get_num_threads()
    # As a worker does.
    torch.set_num_threads(1)
    session = TrainingSession(booth=booth, config=config, compute=ComputeConfig())
    seconds = []
    for step in range(FIRST + options.steps):
        started = time.perf_counter()
        session.advance(batches[step % len(batches)])
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return options.batch_size / statistics.mean(seconds[FIRST:])


def _whole(options: TrainBenchmark, config: AdapterTrainingConfig, *, precomputed: bool) -> tuple[float, int]:
    """Samples/s of a training once it is running, and its worker's peak memory in MiB, by its own log."""
    with tempfile.TemporaryDirectory() as folder:
        run_training(
            TrainConfig(
                data=str(options.data),
                output=f"{folder}/run",
                model=ModelConfig(tracking_uri=f"sqlite:///{folder}/mlflow.db"),
                workers=1,
                gpus_per_worker=int(options.device.startswith("cuda")),
                precomputed=precomputed,
                artifacts=Path(folder, "artifacts").as_uri(),
                adapters=config,
            )
        )
        lines = list(log_lines(open_store(f"{folder}/run"), LOG).values())
    times = [line["time"] for line in lines]
    rate = options.batch_size * options.steps / (times[FIRST + options.steps - 1] - times[FIRST - 1])
    return rate, max(int(line["metrics"]["peak_memory_mb"]) for line in lines)
