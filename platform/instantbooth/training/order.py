"""The order in which a training sees its samples: a function of the seed and of nothing else.

An epoch is a permutation of all rows. It is computed from how many rows each shard has, so that any position can be
looked up without reading what comes before: a training that is resumed, on however many workers, goes on with the next.

Shuffling rows freely would scatter every batch over all shards. Instead an epoch is dealt to lanes: shards are put in
random order, the rows of each too, and the sequence is cut into LANES equal parts; positions take turns among them. A
batch then mixes rows of LANES shards, and each part of a shard is read once, by one worker.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from instantbooth.errors import ParameterError

LANES = 16
REMEMBERED = 2
"""Epochs kept in memory: a batch may take the end of one and the start of the next."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one sample lies."""

    epoch: int
    shard: int
    row: int


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """Position → shard and row, for any number of epochs."""

    rows: tuple[int, ...]
    """Rows of each shard."""
    seed: int
    _epochs: OrderedDict[int, NDArray[np.int64]] = field(default_factory=OrderedDict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not sum(self.rows):
            raise ParameterError("the data set has no rows to train on; ingest some, or keep more of them")

    def __len__(self) -> int:
        """Samples of an epoch."""
        return sum(self.rows)

    def place(self, position: int) -> Place:
        """The sample at a position, from 0."""
        epoch, within = divmod(position, len(self))
        number = int(self._epoch(epoch)[within])
        shard = int(np.searchsorted(self._ends, number, side="right"))
        start = int(self._ends[shard]) - self.rows[shard]
        return Place(epoch=epoch, shard=shard, row=number - start)

    def batch(self, step: int, size: int, *, rank: int = 0, world: int = 1) -> range:
        """Positions of a rank's share of the batch of a step, from 0; the shares together are the same in any world."""
        share = size // world
        first = step * size + rank * share
        return range(first, first + share)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.rows, dtype=np.int64)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            self._epochs[epoch] = _permutation(self.rows, self.seed, epoch)
            while len(self._epochs) > REMEMBERED:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


def _permutation(rows: Sequence[int], seed: int, epoch: int) -> NDArray[np.int64]:
    """Every row number once, shards and rows reordered, dealt to lanes."""
    rng = np.random.default_rng([seed, epoch])
    starts = np.cumsum([0, *rows])
    sequence = np.concatenate([starts[shard] + rng.permutation(rows[shard]) for shard in rng.permutation(len(rows))])
    longest = -(-len(sequence) // LANES)
    lanes = np.full(longest * LANES, -1, np.int64)
    lanes[: len(sequence)] = sequence
    # Lane by lane along one axis, position by position along the other.
    dealt = lanes.reshape(LANES, longest).T.ravel()
    return dealt[dealt >= 0]
