"""The training feed against a plain PyTorch DataLoader that does the same work on the same shards."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import ray
import torch
from torch.utils.data import DataLoader, Dataset

from instantbooth.presets import preset
from instantbooth.training.adapters import ExamplePreparer
from jobs import cli
from jobs.benchmarks.timing import machine
from jobs.cluster import ray_cluster
from pipelines.feed import Examples, Shards, TrainingFeed, rows_per_task


@dataclass(frozen=True, kw_only=True)
class FeedBenchmark:
    """How fast examples arrive where nothing is done with them."""

    data: str
    """URI of an ingestion's output folder."""
    batch_size: int = 16
    """Examples of a batch."""
    batches: int = 120
    """Batches of a run; the first ten count as its start."""
    processes: int = 2
    """Of the DataLoader, and logical CPUs that the feed may use."""
    repeats: int = 3
    """Runs of each, in turn."""


class Positions(Dataset[dict[str, torch.Tensor]]):
    """The feed's own examples by position, for a DataLoader."""

    def __init__(self, feed: TrainingFeed, count: int) -> None:
        self.feed = feed
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        examples = Examples(feed=self.feed, start=0, stop=0, steps_per_task=0, share=(0, 1))
        return {name: torch.as_tensor(value) for name, value in examples.at(self.feed.order(), position).items()}


def feed(options: cli.Flat[FeedBenchmark]) -> None:
    """Prints samples/s of both, their ratio, and the time to the first batch as JSON."""
    model = preset("miniature")
    preparer = ExamplePreparer.for_model(model.base, model.image_encoder)
    ours = TrainingFeed(
        shards=Shards.of(options.data),
        prepare=preparer,
        seed=0,
        batch_size=options.batch_size,
        rows_per_task=rows_per_task(preparer.image_size, preparer.encoder_size),
    )
    positions = Positions(ours, options.batches * options.batch_size)
    runs: dict[str, list[tuple[float, float]]] = {"feed": [], "dataloader": []}
    with ray_cluster():
        ray.data.DataContext.get_current().execution_options.resource_limits = ray.data.ExecutionResources(
            cpu=options.processes
        )
        for _ in range(options.repeats):
            runs["feed"].append(_timed(ours.batches(0, options.batches), options))
            loader = DataLoader(positions, batch_size=options.batch_size, num_workers=options.processes)
            runs["dataloader"].append(_timed(iter(loader), options))
    rates = {name: statistics.median(rate for _, rate in each) for name, each in runs.items()}
    result = {
        "machine": machine("cpu"),
        "samples_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "feed_over_dataloader": round(rates["feed"] / rates["dataloader"], 3),
        "seconds_to_first_batch": {
            name: round(statistics.median(first for first, _ in each), 2) for name, each in runs.items()
        },
    }
    print(json.dumps(result, indent=2))


def _timed(batches: Iterator[object], options: FeedBenchmark) -> tuple[float, float]:
    """Seconds to the first batch, and samples/s once it is running."""
    started = time.perf_counter()
    next(batches)
    first = time.perf_counter() - started
    for _ in islice(batches, 9):
        pass
    running = time.perf_counter()
    count = sum(1 for _ in batches)
    return first, count * options.batch_size / (time.perf_counter() - running)
