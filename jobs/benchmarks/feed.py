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

from instantbooth.errors import ParameterError
from instantbooth.presets import preset
from instantbooth.training.adapters import ExamplePreparer, unpacked
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
    batches: int = 600
    """Batches of a run; what the first task makes of them counts as its start."""
    processes: int = 2
    """Of the DataLoader, and logical CPUs that the feed may use."""
    repeats: int = 3
    """Runs of each, in turn."""

    def __post_init__(self) -> None:
        if self.batches < 100 or min(self.batch_size, self.processes, self.repeats) < 1:
            raise ParameterError(
                f"a benchmark needs batches ≥ 100 and batch_size, processes, repeats ≥ 1, has {self.batches}, "
                f"{self.batch_size}, {self.processes} and {self.repeats}; raise what is too low"
            )


class Positions(Dataset[dict[str, torch.Tensor]]):
    """The feed's own examples by position, for a DataLoader."""

    def __init__(self, feed: TrainingFeed, count: int) -> None:
        self.feed = feed
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        examples = Examples(feed=self.feed, start=0, stop=0, steps_per_task=0, share=(0, 1))
        return {name: torch.tensor(value) for name, value in examples.at(self.feed.order(), position).items()}


def feed(options: cli.Flat[FeedBenchmark]) -> None:
    """Prints samples/s of both (median, lowest, highest), their ratio, and the time to the first batch as JSON."""
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
    # Blocks arrive whole: the first is at hand before the clock starts.
    start = max(10, ours.rows_per_task // options.batch_size)
    with ray_cluster():
        ray.data.DataContext.get_current().execution_options.resource_limits = ray.data.ExecutionResources(
            cpu=options.processes
        )
        for _ in range(options.repeats):
            runs["feed"].append(_timed(ours.batches(0, options.batches), options, start))
            loader = DataLoader(positions, batch_size=options.batch_size, num_workers=options.processes)
            runs["dataloader"].append(_timed(map(unpacked, loader), options, start))
    rates = {name: sorted(rate for _, rate in each) for name, each in runs.items()}
    medians = {name: statistics.median(each) for name, each in rates.items()}
    result = {
        "machine": machine("cpu"),
        "rows_per_task": ours.rows_per_task,
        "samples_per_second": {name: round(rate, 1) for name, rate in medians.items()},
        "spread": {name: [round(each[0], 1), round(each[-1], 1)] for name, each in rates.items()},
        "feed_over_dataloader": round(medians["feed"] / medians["dataloader"], 3),
        "seconds_to_first_batch": {
            name: round(statistics.median(first for first, _ in each), 2) for name, each in runs.items()
        },
    }
    print(json.dumps(result, indent=2))


def _timed(batches: Iterator[object], options: FeedBenchmark, start: int) -> tuple[float, float]:
    """Seconds to the first batch, and samples/s of what comes after so many batches."""
    started = time.perf_counter()
    next(batches)
    first = time.perf_counter() - started
    for _ in islice(batches, start - 1):
        pass
    running = time.perf_counter()
    count = sum(1 for _ in batches)
    return first, count * options.batch_size / (time.perf_counter() - running)
