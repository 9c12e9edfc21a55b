"""One resumable training loop for everything the miniature world trains on one machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor, nn

from instantbooth.errors import ParameterError
from instantbooth.model.loading import autocast
from instantbooth.training.ahead import drawn_ahead
from instantbooth.training.ema import EMA
from instantbooth.training.gradient_processes import GradientProcesses

MOST_DRAWERS = 12
"""Processes that draw batches ahead for a GPU."""

Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast to train."""

    steps: int
    """Optimizer steps in all."""
    batch_size: int
    """Examples in a step, over all processes."""
    learning_rate: float
    """Peak learning rate of AdamW, reached after `warmup_steps`."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """Last steps, over which the learning rate falls linearly to a tenth."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    ema_decay: float = 0.999
    """Decay of the averaged parameters, which are what training returns."""
    clip_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    processes: int = 1
    """On a CPU, processes that share a batch, one thread each; 1 is one process with all threads. Ignored on a GPU,
    where other processes draw the batches ahead."""
    seed: int = 0
    """Every random number of step k comes from a generator seeded by it, k and the process's rank."""

    def __post_init__(self) -> None:
        if self.processes < 1 or self.batch_size % self.processes:
            raise ParameterError(
                f"processes must divide batch_size, are {self.processes} and {self.batch_size}; change one of them"
            )


def train(
    name: str,
    module: nn.Module,
    draw: Callable[[int, Generator], Batch],
    loss: Callable[[Batch], Tensor],
    config: LoopConfig,
    *,
    folder: Path,
    device: torch.device,
    multiples: Mapping[nn.Parameter, float] | None = None,
) -> list[float]:
    """Minimises `loss(batch)` over the trainable parameters of `module`, resuming from `folder`.

    `draw(examples, generator)` makes a batch on the CPU, with everything random that the loss needs.
    `multiples` are of the learning rate, for parameters with another one.
    ParameterError where a checkpoint there, `name`.pt, is of a training with another configuration.
    At the end `module` holds the averaged parameters, in eval mode. Returns the loss of every step.
    It computes in bfloat16 where the device does so itself: on CPUs with AVX512-BF16 that halves the time of
    convolutions.
    """
    rates = multiples or {}
    parameters = {p: rates.get(p, 1.0) for p in module.parameters() if p.requires_grad}
    on_cpu = device.type == "cpu"
    processes = config.processes if on_cpu else 1

    def batch(rank: int, step: int) -> Batch:
        generator = Generator().manual_seed((rank * 1_000 + config.seed) * 1_000_003 + step)
        return draw(config.batch_size // processes, generator)

    def gradient(drawn: Batch) -> float:
        with autocast(device):
            value = loss(drawn)
        for parameter in parameters:
            parameter.grad = None
        value.backward()
        return float(value.detach())

    module.train()
    with _threads(1 if processes > 1 else torch.get_num_threads()):
        others = GradientProcesses(processes - 1, list(parameters), lambda rank, step: gradient(batch(rank, step)))

        def batches(steps: range) -> Iterator[Batch]:
            drawers = 0 if on_cpu else min(MOST_DRAWERS, os.cpu_count() or 1)
            return drawn_ahead(partial(batch, 0), steps, workers=drawers)

        try:
            losses = _descend(name, parameters, batches, gradient, others, config, folder / f"{name}.pt", device)
        finally:
            others.close()
    module.eval()
    return losses


def last_loss(losses: Sequence[float]) -> float:
    """The mean over the last 200 steps, whose single losses scatter."""
    return fmean(losses[-200:])


def _descend(
    name: str,
    parameters: Mapping[nn.Parameter, float],
    batches: Callable[[range], Iterator[Batch]],
    gradient: Callable[[Batch], float],
    others: GradientProcesses,
    config: LoopConfig,
    checkpoint: Path,
    device: torch.device,
) -> list[float]:
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, multiple in parameters.items():
        groups.setdefault(multiple, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": own} for own in groups.values()],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.99),
        fused=True,
    )
    ema = EMA(parameters, config.ema_decay)
    losses = _restore(checkpoint, config, parameters, optimizer, ema, device) if checkpoint.exists() else []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(name, total=config.steps, completed=len(losses))
        steps = range(len(losses), config.steps)
        drawn = batches(steps)
        for step in steps:
            for group, multiple in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = config.learning_rate * multiple * _schedule(step, config)
            others.start(step)
            losses.append(others.join(gradient(next(drawn))))
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimizer.step()
            ema.update(step)
            recent = sum(losses[-50:]) / len(losses[-50:])
            progress.update(bar, advance=1, description=f"{name}  loss {recent:.4f}")
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                _save(checkpoint, config, parameters, optimizer, ema, losses)
    ema.swap()
    return losses


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _schedule(step: int, config: LoopConfig) -> float:
    rise = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    fall = min(1.0, (config.steps - step) / config.decay_steps) if config.decay_steps else 1.0
    return rise * max(fall, 0.1)


def _save(
    path: Path,
    config: LoopConfig,
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: EMA,
    losses: list[float],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "parameters": [p.detach() for p in parameters],
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict(),
        "losses": losses,
        "config": asdict(config),
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _restore(
    path: Path,
    config: LoopConfig,
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: EMA,
    device: torch.device,
) -> list[float]:
    state = torch.load(path, map_location=device, weights_only=True)
    asked = asdict(config)
    if changed := [f"{name} {state['config'][name]}" for name in asked if state["config"][name] != asked[name]]:
        raise ParameterError(
            f"{path} is of a training with {', '.join(changed)}; repeat its options, or name another output folder"
        )
    with torch.no_grad():
        for parameter, saved in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    ema.load_state_dict(state["ema"])
    losses: list[float] = state["losses"]
    return losses
