"""The training loop: resumed it is the same run, and several processes are one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from instantbooth.errors import ParameterError
from instantbooth.training.loop import LoopConfig, train

CONFIG = LoopConfig(steps=12, batch_size=8, learning_rate=0.05, warmup_steps=2, decay_steps=4, checkpoint_every=4)


def fit(
    folder: Path, config: LoopConfig, *, noise: float = 1.0, killed_at: int | None = None
) -> tuple[list[float], Tensor]:
    torch.manual_seed(0)
    module = nn.Linear(4, 1)
    target = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    steps = count()

    def draw(examples: int, generator: Generator) -> Tensor:
        return torch.eye(4).repeat(examples, 1) + noise * torch.randn(4 * examples, 4, generator=generator)

    def loss(inputs: Tensor) -> Tensor:
        if next(steps) == killed_at:
            raise InterruptedError
        return (module(inputs) - inputs @ target.T).square().mean()

    losses = train("line", module, draw, loss, config, folder=folder, device=torch.device("cpu"))
    return losses, module.weight.detach().clone()


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    """A process without Ray, whose threads do not survive the fork that several training processes come from."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_in_two_pieces_equals_one_without_a_break(
    tmp_path: Path, processes: int, elsewhere: ProcessPoolExecutor
) -> None:
    config = replace(CONFIG, processes=processes)
    whole, weight = elsewhere.submit(fit, tmp_path / "whole", config).result()
    with pytest.raises(InterruptedError):
        elsewhere.submit(fit, tmp_path / "pieces", config, killed_at=6).result()
    again, resumed = elsewhere.submit(fit, tmp_path / "pieces", config).result()
    assert len(whole) == len(again) == 12
    assert torch.equal(weight, resumed)
    assert whole == again
    assert whole[-1] < whole[0]


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, CONFIG)
    with pytest.raises(ParameterError, match=r"of a training with learning_rate 0.05; repeat its options"):
        fit(tmp_path, replace(CONFIG, learning_rate=0.1))


def test_processes_share_a_batch(tmp_path: Path, elsewhere: ProcessPoolExecutor) -> None:
    halved = replace(CONFIG, processes=2)
    alone, weight = fit(tmp_path / "alone", CONFIG, noise=0.0)
    shared, same = elsewhere.submit(fit, tmp_path / "shared", halved, noise=0.0).result()
    torch.testing.assert_close(weight, same)
    assert alone == pytest.approx(shared)
    drawn, _ = fit(tmp_path / "drawn", CONFIG)
    halves, _ = elsewhere.submit(fit, tmp_path / "halves", halved).result()
    assert drawn != halves, "each process must draw examples of its own"


def fit_with_a_helper_that_fails(folder: Path) -> None:
    module = nn.Linear(2, 1)

    def draw(examples: int, generator: Generator) -> Tensor:
        if generator.initial_seed() >= 1_000 * 1_000_003:
            raise MemoryError
        return torch.ones(examples, 2)

    def loss(inputs: Tensor) -> Tensor:
        return module(inputs).mean()

    train("line", module, draw, loss, replace(CONFIG, processes=2), folder=folder, device=torch.device("cpu"))


def test_a_process_that_fails_ends_the_training(tmp_path: Path, elsewhere: ProcessPoolExecutor) -> None:
    with pytest.raises(RuntimeError, match="ended early"):
        elsewhere.submit(fit_with_a_helper_that_fails, tmp_path).result()


def test_processes_that_do_not_divide_a_batch_are_refused() -> None:
    with pytest.raises(ParameterError, match="3 and 8"):
        replace(CONFIG, processes=3)


def test_a_parameter_moves_by_its_multiple_of_the_learning_rate(tmp_path: Path) -> None:
    module = nn.Linear(1, 1)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    config = replace(CONFIG, steps=1, weight_decay=0.0)

    def loss(inputs: Tensor) -> Tensor:
        return (module(inputs) - 1).square().mean()

    def ones(examples: int, generator: Generator) -> Tensor:
        return torch.ones(examples, 1)

    multiples = {module.bias: 0.1}
    train("line", module, ones, loss, config, folder=tmp_path, device=torch.device("cpu"), multiples=multiples)
    # Adam's first step is as long as the rate.
    assert module.weight.item() > 0
    assert module.bias.item() == pytest.approx(0.1 * module.weight.item(), rel=1e-3)
