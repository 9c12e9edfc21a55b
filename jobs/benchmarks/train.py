"""A training of the miniature in its loop against the bare step on batches that are already in memory."""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from instantbooth import Personalizer
from instantbooth.presets import preset
from instantbooth.storage import open_store
from instantbooth.training.adapters import AdapterTrainingConfig, ExamplePreparer
from instantbooth.training.checkpoints import log_lines
from instantbooth.training.session import ComputeConfig, TrainingSession
from jobs import cli
from jobs.benchmarks.timing import machine
from jobs.cluster import ray_cluster
from jobs.train import train as run_training
from pipelines.feed import Shards, TrainingFeed
from pipelines.model import ModelConfig
from pipelines.trainer import LOG, TrainConfig, shaped


@dataclass(frozen=True, kw_only=True)
class TrainBenchmark:
    """What feeding, logging and saving cost a training, on one worker."""

    data: str
    """URI of an ingestion's output folder."""
    precomputed: bool = False
    """Train on the latents and embeddings that ingestion put into the shards."""
    steps: int = 60
    """Steps of each run; the first ten do not count."""
    batch_size: int = 16
    """Examples of a step."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def train(options: cli.Flat[TrainBenchmark]) -> None:
    """Prints samples/s of both and their ratio as JSON."""
    config = AdapterTrainingConfig(steps=options.steps, batch_size=options.batch_size)
    with ray_cluster():
        bare = _bare(options, config)
        whole = _whole(options, config)
    result = {
        "machine": machine(options.device),
        "precomputed": options.precomputed,
        "samples_per_second": {"bare": round(bare, 2), "training": round(whole, 2)},
        "training_over_bare": round(whole / bare, 3),
        "peak_memory_mb": _peak_memory_mb(options.device),
    }
    print(json.dumps(result, indent=2))


def _bare(options: TrainBenchmark, config: AdapterTrainingConfig) -> float:
    """Samples/s of the step alone, in this process."""
    model = preset("miniature")
    feed = TrainingFeed(
        shards=Shards.of(options.data),
        prepare=ExamplePreparer.for_model(model.base, model.image_encoder),
        seed=0,
        batch_size=options.batch_size,
        precomputed=options.precomputed,
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
    return options.batch_size / statistics.mean(seconds[10:])


def _whole(options: TrainBenchmark, config: AdapterTrainingConfig) -> float:
    """Samples/s of a training, by its own log, from the eleventh step on."""
    with tempfile.TemporaryDirectory() as folder:
        run_training(
            TrainConfig(
                data=options.data,
                output=f"{folder}/run",
                model=ModelConfig(tracking_uri=f"sqlite:///{folder}/mlflow.db"),
                workers=1,
                gpus_per_worker=int(options.device.startswith("cuda")),
                precomputed=options.precomputed,
                checkpoint_every=10,
                artifacts=Path(folder, "artifacts").as_uri(),
                adapters=config,
            )
        )
        times = [line["time"] for line in log_lines(open_store(f"{folder}/run"), LOG).values()]
    return options.batch_size * (len(times) - 11) / (times[-1] - times[10])


def _peak_memory_mb(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
