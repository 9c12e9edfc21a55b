"""More processes for a training on a CPU, where two threads on one batch are far from twice as fast as one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import torch
from torch import nn


class GradientProcesses:
    """Forked processes that each compute the gradient of their share of a batch, with one thread each.

    Measured on two cores with the miniature's U-Net in bfloat16: two threads on 32 rows compute 44 rows a second, two
    processes on 16 rows each 68. Forked, they share the data; the parameters move to shared memory, so that what the
    optimizer writes is what they read. Not for a process that runs Ray or gRPC: their threads do not survive a fork.
    """

    def __init__(self, count: int, parameters: Sequence[nn.Parameter], gradient: Callable[[int, int], float]) -> None:
        """`gradient(rank, step)` leaves gradients in the parameters and returns the loss; other ranks begin at 1."""
        self._parameters = parameters
        self._pipes: list[Connection] = []
        if not count:
            return
        for parameter in parameters:
            parameter.share_memory_()
        self._gradients = [[torch.zeros_like(p).share_memory_() for p in parameters] for _ in range(count)]
        fork = multiprocessing.get_context("fork")
        for rank, gradients in enumerate(self._gradients, start=1):
            ours, theirs = fork.Pipe()
            self._pipes.append(ours)
            arguments = (rank, theirs, self._pipes, parameters, gradients, gradient)
            fork.Process(target=_serve, args=arguments, daemon=True).start()
            theirs.close()

    def start(self, step: int) -> None:
        """Lets them begin; meanwhile this process computes its own share."""
        for pipe in self._pipes:
            pipe.send(step)

    def join(self, own: float) -> float:
        """Averages their gradients into this process's, and their losses into `own`. RuntimeError where one died."""
        if not self._pipes:
            return own
        try:
            losses: list[float] = [own, *(pipe.recv() for pipe in self._pipes)]
        except EOFError:
            raise RuntimeError(
                "a training process ended early; start again: it goes on at the last checkpoint"
            ) from None
        pairs = [(p.grad, index) for index, p in enumerate(self._parameters) if p.grad is not None]
        mine = [grad for grad, _ in pairs]
        for theirs in self._gradients:
            torch._foreach_add_(mine, [theirs[index] for _, index in pairs])
        torch._foreach_div_(mine, len(losses))
        return sum(losses) / len(losses)

    def close(self) -> None:
        """Ends them."""
        for pipe in self._pipes:
            pipe.close()


def _serve(
    rank: int,
    pipe: Connection,
    others: Sequence[Connection],
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[torch.Tensor],
    gradient: Callable[[int, int], float],
) -> None:
    """A helper's life: until the parent closes its end of the pipe, or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # More threads would hang: OpenMP's pool does not survive a fork.
    torch.set_num_threads(1)
    for other in others:
        other.close()
    while True:
        try:
            step = pipe.recv()
        except EOFError:
            return
        loss = gradient(rank, step)
        pairs = [(shared, p.grad) for shared, p in zip(gradients, parameters, strict=True) if p.grad is not None]
        torch._foreach_copy_([shared for shared, _ in pairs], [grad for _, grad in pairs])
        pipe.send(loss)
