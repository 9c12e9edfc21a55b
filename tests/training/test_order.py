"""Which sample comes when: every sample once an epoch, from seed and step alone, whoever reads it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantbooth.errors import ParameterError
from instantbooth.training.order import SampleOrder

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(sum)


@given(sizes=SIZES, seed=st.integers(0, 2**32), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_row_once(sizes: list[int], seed: int, epoch: int) -> None:
    order = SampleOrder(rows=tuple(sizes), seed=seed)
    start = epoch * len(order)
    places = [order.place(position) for position in range(start, start + len(order))]
    expected = {(shard, row) for shard, rows in enumerate(sizes) for row in range(rows)}
    assert sorted((place.shard, place.row) for place in places) == sorted(expected)
    assert {place.epoch for place in places} == {epoch}


@given(sizes=SIZES, world=st.sampled_from([1, 2, 3, 4, 6, 12]), step=st.integers(0, 100))
def test_workers_share_the_same_batch_however_many_they_are(sizes: list[int], world: int, step: int) -> None:
    order = SampleOrder(rows=tuple(sizes), seed=0)
    shares = [order.batch(step, 12, rank=rank, world=world) for rank in range(world)]
    assert [position for share in shares for position in share] == list(order.batch(step, 12))


def test_any_position_is_the_same_when_it_is_looked_up_first_and_epochs_differ() -> None:
    sizes = (40, 7, 64, 64, 12)
    order = SampleOrder(rows=sizes, seed=3)
    sequence = [order.place(position) for position in range(4 * len(order))]
    for position in (0, 100, 186, 187, 500):
        assert SampleOrder(rows=sizes, seed=3).place(position) == sequence[position]
    epochs = [[(place.shard, place.row) for place in sequence if place.epoch == epoch] for epoch in range(4)]
    assert all(one != other for one, other in pairwise(epochs))
    assert epochs[0] != [(p.shard, p.row) for p in map(SampleOrder(rows=sizes, seed=4).place, range(len(order)))]


def test_a_batch_mixes_many_shards_and_a_worker_holds_few() -> None:
    order = SampleOrder(rows=(64,) * 100, seed=0)
    assert len({order.place(position).shard for position in order.batch(5, 16)}) >= 15
    window = [order.place(position).shard for step in range(100, 120) for position in order.batch(step, 16, world=4)]
    assert len(set(window)) <= 8


def test_a_data_set_without_rows_is_refused() -> None:
    with pytest.raises(ParameterError, match="no rows"):
        SampleOrder(rows=(0, 0), seed=0)
