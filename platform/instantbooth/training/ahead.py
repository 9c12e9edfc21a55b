"""Batches drawn by other processes while earlier ones are trained on: a GPU must not wait for captions and crops."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch.utils.data import DataLoader, Dataset

Batch = TypeVar("Batch")


class _Steps(Dataset[Batch]):
    """Step → its batch, as DataLoader wants it."""

    def __init__(self, draw: Callable[[int], Batch]) -> None:
        self._draw = draw

    def __getitem__(self, step: int) -> Batch:
        return self._draw(step)


def drawn_ahead(draw: Callable[[int], Batch], steps: Sequence[int], *, workers: int) -> Iterator[Batch]:
    """`draw(step)` of each step in turn; with `workers` by as many forked processes, two batches of each ahead.

    Forked, they share the data with this process. `draw` must keep to the CPU, and be the same function of the step
    anywhere. Without workers a batch is drawn when it is asked for. Not with workers in a process that runs Ray or
    gRPC: their threads do not survive a fork.
    """
    loader: DataLoader[Batch] = DataLoader(
        _Steps(draw),
        sampler=steps,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_prepare,
    )
    return iter(loader)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _prepare(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
