"""Curated shards become training examples, prepared beside the training workers and streamed to them.

All epochs are one Ray Data execution: starting one costs 2 to 9 s, and an epoch's number must reach each row, because
its augmentation is drawn from (seed, epoch, id). Shards and the rows within each are reordered in every epoch.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray.data

from instantbooth.images import decode_image
from instantbooth.storage import read_uri

Prepare = Callable[..., dict[str, Any]]


def training_feed(shards: Sequence[str], prepare: Prepare, *, seed: int, epochs: int) -> ray.data.Dataset:
    """Examples of `epochs` passes over the shards (URIs), as `prepare` makes them: arrays only, no ids.

    The order in which rows are read depends on `seed` alone; which worker gets which block does not.
    """
    plan = [
        {"shard": shards[index], "epoch": epoch}
        for epoch in range(epochs)
        for index in np.random.default_rng([seed, epoch]).permutation(len(shards))
    ]
    return (
        ray.data.from_items(plan, override_num_blocks=len(plan))
        .flat_map(ShardReader(seed=seed))
        .map(ExampleMaker(prepare=prepare, seed=seed))
    )


@dataclass(frozen=True, kw_only=True)
class ShardReader:
    """Rows of one shard in the order of one epoch."""

    seed: int

    def __call__(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        rows = pq.read_table(io.BytesIO(read_uri(item["shard"]))).to_pylist()
        rng = np.random.default_rng([self.seed, item["epoch"], int(rows[0]["id"][:16], 16)])
        for index in rng.permutation(len(rows)):
            yield rows[index] | {"epoch": item["epoch"]}


@dataclass(frozen=True, kw_only=True)
class ExampleMaker:
    """One curated row as a training example."""

    prepare: Prepare
    seed: int

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self.prepare(
            image=decode_image(row["image"], name=row["id"]).convert("RGB"),
            mask=decode_image(row["mask"], name=row["id"]).convert("L"),
            caption=row["caption"],
            noun=row["noun"],
            rng=np.random.default_rng([self.seed, row["epoch"], int(row["id"][:16], 16)]),
        )
