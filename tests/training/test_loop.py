"""The training loop: resumed it is the same run, and several processes are one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from instantbooth.errors import ParameterError
from instantbooth.training.loop import LoopConfig, train

CONFIG = LoopConfig(steps=12, batch_size=8, learning_rate=0.05, warmup_steps=2, decay_steps=4, checkpoint_every=4)


def fit(folder: Path, config: LoopConfig, *, noise: float = 1.0) -> tuple[list[float], Tensor]:
    torch.manual_seed(0)
    module = nn.Linear(4, 1)
    target = torch.tensor([[1.0, -2.0, 0.5, 3.0]])

    def loss(examples: int, generator: Generator) -> Tensor:
        inputs = torch.eye(4).repeat(examples, 1) + noise * torch.randn(4 * examples, 4, generator=generator)
        return (module(inputs) - inputs @ target.T).square().mean()

    losses = train("line", module, loss, config, folder=folder, device=torch.device("cpu"))
    return losses, module.weight.detach().clone()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_in_two_pieces_equals_one_without_a_break(tmp_path: Path, processes: int) -> None:
    config = replace(CONFIG, processes=processes)
    whole, weight = fit(tmp_path / "whole", config)
    fit(tmp_path / "pieces", replace(config, steps=4, decay_steps=0))
    again, resumed = fit(tmp_path / "pieces", config)
    assert len(whole) == len(again) == 12
    assert torch.equal(weight, resumed)
    assert whole[4:] == again[4:]
    assert whole[-1] < whole[0]


def test_processes_share_a_batch(tmp_path: Path) -> None:
    alone, weight = fit(tmp_path / "alone", CONFIG, noise=0.0)
    shared, same = fit(tmp_path / "shared", replace(CONFIG, processes=2), noise=0.0)
    torch.testing.assert_close(weight, same)
    assert alone == pytest.approx(shared)
    drawn, _ = fit(tmp_path / "drawn", CONFIG)
    halves, _ = fit(tmp_path / "halves", replace(CONFIG, processes=2))
    assert drawn != halves, "each process must draw examples of its own"


def test_a_process_that_fails_ends_the_training(tmp_path: Path) -> None:
    module = nn.Linear(2, 1)
    parent = torch.get_num_threads()

    def loss(examples: int, generator: Generator) -> Tensor:
        if generator.initial_seed() >= 1_000 * 1_000_003:
            raise MemoryError
        return module(torch.ones(examples, 2)).mean()

    with pytest.raises(RuntimeError, match="ended early"):
        train("line", module, loss, replace(CONFIG, processes=2), folder=tmp_path, device=torch.device("cpu"))
    assert torch.get_num_threads() == parent


def test_processes_that_do_not_divide_a_batch_are_refused() -> None:
    with pytest.raises(ParameterError, match="3 and 8"):
        replace(CONFIG, processes=3)
