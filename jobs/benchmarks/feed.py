"""The training feed against a plain PyTorch DataLoader that does the same work on the same shards."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch.utils.data import DataLoader, Dataset

from instantbooth.errors import ParameterError
from instantbooth.machine import machine
from instantbooth.presets import preset
from instantbooth.training.adapters import ExamplePreparer, unpacked
from jobs import cli
from jobs.cluster import ray_cluster
from jobs.goals import at_least, conclude
from pipelines.feed import Shards, TrainingFeed, rows_per_task


@dataclass(frozen=True, kw_only=True)
class FeedBenchmark:
    """How fast examples arrive where nothing is done with them."""

    data: str
    """URI of an ingestion's output folder."""
    batch_size: int = 16
    """Examples of a batch."""
    batches: int = 600
    """Batches of a run; those of the feed's first tasks, one in each process, do not count."""
    processes: int = 2
    """That make examples, of the DataLoader as of the feed."""
    repeats: int = 3
    """Runs of each, in turn."""

    def __post_init__(self) -> None:
        if min(self.batches, self.batch_size, self.processes, self.repeats) < 1:
            raise ParameterError(
                f"a benchmark needs batches, batch_size, processes and repeats of 1 at least, has {self.batches}, "
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
        return {name: torch.tensor(value) for name, value in self.feed.at(self.feed.order(), position).items()}


def feed(options: cli.Flat[FeedBenchmark]) -> None:
    """Prints samples/s of both (median, lowest, highest), their ratio, and the time to the first batch as JSON.

    Exit status 1 where the goal is missed.
    """
    model = preset("miniature")
    preparer = ExamplePreparer.for_model(model.base, model.image_encoder)
    ours = TrainingFeed(
        shards=Shards.of(options.data),
        prepare=preparer,
        seed=0,
        batch_size=options.batch_size,
        rows_per_task=rows_per_task(preparer.image_size, preparer.encoder_size),
        tasks_ahead=options.processes,
    )
    positions = Positions(ours, options.batches * options.batch_size)
    runs: dict[str, list[tuple[float, float]]] = {"feed": [], "dataloader": []}
    # What tasks make arrives whole, and the first in every process are done together: their examples cost no time that
    # a clock started at the first of them would see.
    start = math.ceil(options.processes * ours.rows_per_task / options.batch_size)
    if options.batches < 4 * start:
        raise ParameterError(
            f"batches must be at least {4 * start}, the first {start} do not count; is {options.batches}; raise it"
        )
    with ray_cluster():
        for _ in range(options.repeats):
            runs["feed"].append(_timed(ours.batches(0, options.batches), options, start))
            loader = DataLoader(positions, batch_size=options.batch_size, num_workers=options.processes)
            runs["dataloader"].append(_timed(map(unpacked, loader), options, start))
    rates = {name: sorted(rate for _, rate in each) for name, each in runs.items()}
    medians = {name: statistics.median(each) for name, each in rates.items()}
    ratio = round(medians["feed"] / medians["dataloader"], 3)
    result = {
        "machine": machine("cpu"),
        "rows_per_task": ours.rows_per_task,
        "samples_per_second": {name: round(rate, 1) for name, rate in medians.items()},
        "spread": {name: [round(each[0], 1), round(each[-1], 1)] for name, each in rates.items()},
        "feed_over_dataloader": ratio,
        # Of the first run, as a training has it: later ones find their processes started.
        "seconds_to_first_batch": {name: round(each[0][0], 2) for name, each in runs.items()},
    }
    conclude(result, {"feed over dataloader": at_least(ratio, 0.9)})


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
