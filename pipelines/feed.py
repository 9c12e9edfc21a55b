"""Curated shards become training examples, prepared by Ray Data beside the training workers and streamed to them.

Which sample comes when is SampleOrder's to say, from the manifest alone. Each worker runs a pipeline of its own over
its share of the batches, from any step on: that is what lets a training be resumed to the sample, which Ray Train's own
data sets cannot. A task prepares a few batches in order, and Ray Data keeps the order of tasks.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
from numpy.typing import NDArray
from torch import Tensor

from instantbooth.errors import MissingObjectError, StorageError, TrainingError
from instantbooth.images import decode_image
from instantbooth.storage import open_store, patiently, read_uri
from instantbooth.training.order import LANES, SampleOrder
from pipelines.curation.shards import TRAIN
from pipelines.ingest import MANIFEST

Prepare = Callable[..., dict[str, Any]]

TASK_BYTES = 16 * 2**20
MAX_ROWS_PER_TASK = 256
SEGMENT_TASKS = 512
"""Tasks of one Ray Data execution. Planning more takes long; starting the next takes seconds, so not fewer either."""
PREFETCHED_BATCHES = 2
SHARDS_HELD = LANES + 8
"""Shards that a process keeps in memory: those its lanes are reading, and some that begin."""
PRECOMPUTED = ("latents", "prompt_embeds")


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The shards of one split, as the manifest of an ingestion lists them."""

    uris: tuple[str, ...]
    rows: tuple[int, ...]
    digest: str
    """Of the split's content: the SHA-256 of the shards' digests."""

    @classmethod
    def of(cls, dataset: str, split: str = TRAIN) -> Shards:
        """Reads the manifest in an ingestion's output folder. StorageError where there is none."""
        store = open_store(dataset)
        try:
            files = json.loads(patiently(partial(store.get, MANIFEST)))["files"]
        except MissingObjectError as error:
            raise StorageError(f"there is no {MANIFEST} in {dataset}; point to an ingestion that finished") from error
        chosen = [entry for entry in files if entry["split"] == split and entry["rows"]]
        content = "".join(entry["sha256"] for entry in chosen)
        return cls(
            uris=tuple(store.uri(entry["key"]) for entry in chosen),
            rows=tuple(entry["rows"] for entry in chosen),
            digest=sha256(content.encode()).hexdigest(),
        )


@dataclass(frozen=True, kw_only=True)
class TrainingFeed:
    """The examples of one worker, batch by batch."""

    shards: Shards
    prepare: Prepare
    seed: int
    batch_size: int
    """Of a step, over all workers."""
    rows_per_task: int = 32
    """Examples that one task prepares."""
    precomputed: bool = False
    """Whether latents and prompt embeddings are taken from the shards, where ingestion put them."""

    def order(self) -> SampleOrder:
        """Which sample comes when."""
        return _order(self.shards.rows, self.seed)

    def batches(self, start: int, stop: int, *, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        """This rank's share of the batches of steps start … stop − 1, in order.

        Beside the example's arrays each batch has `position` [b] and `sample` [b], the first 60 bits of the row's id.
        Raises TrainingError rather than hand over another batch than the one that is due.
        """
        share = self.batch_size // world
        steps_per_task = max(1, self.rows_per_task // share)
        order = self.order()
        step = start
        for segment in range(start, stop, SEGMENT_TASKS * steps_per_task):
            end = min(stop, segment + SEGMENT_TASKS * steps_per_task)
            pipeline = self._pipeline(segment, end, steps_per_task, rank, world)
            for batch in pipeline.iter_torch_batches(batch_size=share, prefetch_batches=PREFETCHED_BATCHES):
                due = order.batch(step, self.batch_size, rank=rank, world=world)
                if batch["position"].tolist() != list(due):
                    raise TrainingError(
                        f"step {step} got samples {batch['position'].tolist()} where {due} are due; run the same "
                        "command again"
                    )
                yield batch
                step += 1

    def _pipeline(self, start: int, stop: int, steps_per_task: int, rank: int, world: int) -> ray.data.Dataset:
        """steps → shards and rows → examples."""
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        tasks = -(-(stop - start) // steps_per_task)
        examples = Examples(feed=self, start=start, stop=stop, steps_per_task=steps_per_task, share=(rank, world))
        return ray.data.range(tasks, override_num_blocks=tasks).map_batches(examples, batch_size=None)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A few steps' share as training examples; augmentation is drawn from (seed, epoch, id)."""

    feed: TrainingFeed
    start: int
    stop: int
    steps_per_task: int
    share: tuple[int, int]
    """(rank, world)."""

    def __call__(self, tasks: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[np.generic]]:
        """The examples of these tasks, stacked in order."""
        order, (rank, world) = self.feed.order(), self.share
        made = [
            self.at(order, position)
            for task in tasks["id"].tolist()
            for step in range(*self._steps(task))
            for position in order.batch(step, self.feed.batch_size, rank=rank, world=world)
        ]
        return {name: np.stack([each[name] for each in made]) for name in made[0]}

    def at(self, order: SampleOrder, position: int) -> dict[str, Any]:
        """The example at a position of the training."""
        place = order.place(position)
        row = _shard(self.feed.shards.uris[place.shard]).slice(place.row, 1).to_pylist()[0]
        number = {"position": np.int64(position), "sample": np.int64(int(row["id"][:15], 16))}
        return self._example(row, place.epoch) | number

    def _steps(self, task: int) -> tuple[int, int]:
        first = self.start + task * self.steps_per_task
        return first, min(first + self.steps_per_task, self.stop)

    def _example(self, row: dict[str, Any], epoch: int) -> dict[str, Any]:
        example = self.feed.prepare(
            image=decode_image(row["image"], name=row["id"]).convert("RGB"),
            mask=decode_image(row["mask"], name=row["id"]).convert("L"),
            caption=row["caption"],
            noun=row["noun"],
            rng=np.random.default_rng([self.feed.seed, epoch, int(row["id"][:16], 16)]),
        )
        if self.feed.precomputed:
            missing = [name for name in PRECOMPUTED if not row.get(name)]
            if missing:
                raise TrainingError(
                    f"the shards have no {', '.join(missing)}; ingest with precompute, or train without precomputed"
                )
            del example["pixel_values"]
            example |= {name: np.frombuffer(row[name], np.float16) for name in PRECOMPUTED}
        return example


def rows_per_task(image_size: int, encoder_size: int) -> int:
    """How many examples of pictures of these sides (pixels) a task prepares: small ones are made faster than tasks.

    Measured on the miniature's: at 32, a task of 30 ms, the feed made 516 samples/s where a DataLoader made 869.
    """
    example_bytes = 4 * 3 * (image_size**2 + encoder_size**2)
    return max(1, min(TASK_BYTES // example_bytes, MAX_ROWS_PER_TASK))


def sample_name(sample: int) -> str:
    """The first 15 characters of a row's id, from what a batch carries of it."""
    return f"{sample:015x}"


def first_examples(feed: TrainingFeed, count: int) -> dict[str, Tensor]:
    """The first rows of the shards as one batch, augmented the same way every time; for validation."""
    examples = Examples(feed=feed, start=0, stop=0, steps_per_task=0, share=(0, 1))
    rows = (row for uri in feed.shards.uris for row in shard_rows(uri))
    made = [examples._example(row, 0) for row, _ in zip(rows, range(count), strict=False)]
    return {name: torch.from_numpy(np.stack([each[name] for each in made])) for name in made[0]}


def shard_rows(uri: str) -> list[dict[str, Any]]:
    """A shard's rows, columns of SCHEMA and what was precomputed."""
    return _table(uri).to_pylist()


@functools.lru_cache(maxsize=1)
def _order(rows: tuple[int, ...], seed: int) -> SampleOrder:
    return SampleOrder(rows=rows, seed=seed)


@functools.lru_cache(maxsize=SHARDS_HELD)
def _shard(uri: str) -> pa.Table:
    return _table(uri)


def _table(uri: str) -> pa.Table:
    return pq.read_table(io.BytesIO(patiently(partial(read_uri, uri))))
