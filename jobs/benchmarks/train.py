"""A training of the miniature in its loop against the bare step on batches that are already in memory."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from instantbooth import Personalizer
from instantbooth.errors import ParameterError
from instantbooth.model.base import device_of
from instantbooth.presets import preset
from instantbooth.storage import open_store
from instantbooth.training.adapters import AdapterTrainingConfig, ExamplePreparer
from instantbooth.training.checkpoints import log_lines
from instantbooth.training.session import ComputeConfig, TrainingSession
from jobs import cli
from jobs.benchmarks.full_size import write_full_size
from jobs.benchmarks.timing import machine
from jobs.benchmarks.training_step import compare_steps
from jobs.cluster import ray_cluster
from jobs.train import train as run_training
from pipelines.feed import Shards, TrainingFeed
from pipelines.model import ModelConfig
from pipelines.trainer import LOG, TrainConfig, shaped

FIRST = 10
"""Steps that do not count."""


@dataclass(frozen=True, kw_only=True)
class TrainBenchmark:
    """What feeding, logging and saving cost a training, on one worker; or the step at full size."""

    data: str | None = None
    """URI of an ingestion's output folder. Where it was precomputed, training on that is measured too."""
    full_size: bool = False
    """Instead: Stable Diffusion 1.5 at 512 pixels with random weights, step by step, beside diffusers' own."""
    steps: int = 60
    """Steps of each run; the first ten of a training do not count."""
    batch_size: int = 16
    """Examples of a step."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self) -> None:
        if not self.full_size and self.data is None:
            raise ParameterError("the benchmark needs data, which is None; name an ingestion's output, or full_size")
        if self.steps <= FIRST + 1 and not self.full_size:
            raise ParameterError(f"steps must be over {FIRST + 1}, the first {FIRST} do not count; is {self.steps}")


def train(options: cli.Flat[TrainBenchmark]) -> None:
    """Prints samples/s, ratios and memory as JSON."""
    result = _full_size(options) if options.full_size else _miniature(options)
    print(json.dumps({"machine": machine(options.device), **result}, indent=2))


def _miniature(options: TrainBenchmark) -> dict[str, Any]:
    """The bare step, the training, and the training on precomputed columns."""
    config = AdapterTrainingConfig(steps=options.steps, batch_size=options.batch_size)
    shards = Shards.of(str(options.data))
    with ray_cluster():
        rates = {"bare": _bare(options, shards, config)}
        rates["training"], memory = _whole(options, config, precomputed=False)
        peaks = {"training": memory}
        if shards.precomputed:
            rates["precomputed"], peaks["precomputed"] = _whole(options, config, precomputed=True)
    ratios = {"training_over_bare": rates["training"] / rates["bare"]}
    if shards.precomputed:
        ratios["precomputed_over_plain"] = rates["precomputed"] / rates["training"]
    return {
        "samples_per_second": {name: round(rate, 2) for name, rate in rates.items()},
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
    for step in range(options.steps):
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
                checkpoint_every=10,
                artifacts=Path(folder, "artifacts").as_uri(),
                adapters=config,
            )
        )
        lines = list(log_lines(open_store(f"{folder}/run"), LOG).values())
    times = [line["time"] for line in lines]
    rate = options.batch_size * (len(times) - FIRST - 1) / (times[-1] - times[FIRST])
    return rate, max(int(line["metrics"]["peak_memory_mb"]) for line in lines)
