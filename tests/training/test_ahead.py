"""Batches drawn ahead are those that would be drawn on time."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from instantbooth.training.ahead import drawn_ahead


def draw(step: int) -> tuple[int, torch.Tensor]:
    return os.getpid(), torch.randn(3, generator=torch.Generator().manual_seed(step))


def drawn(workers: int) -> tuple[int, list[int], list[list[float]]]:
    """This process, the processes that drew, and what they drew."""
    makers, batches = zip(*drawn_ahead(draw, range(4, 12), workers=workers), strict=True)
    return os.getpid(), list(makers), [batch.tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 3])
def test_any_number_of_workers_draws_the_same_batches_in_order(workers: int) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        here, makers, batches = pool.submit(drawn, workers).result()
    assert batches == [draw(step)[1].tolist() for step in range(4, 12)]
    assert (set(makers) == {here}) == (workers == 0)
    assert len(set(makers)) == max(workers, 1)
