"""The benchmark of a training step, on a tiny model: the same code as at full size."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from instantbooth.errors import ParameterError
from jobs.benchmarks.train import TrainBenchmark
from jobs.benchmarks.training_step import compare_steps, diffusers_step, examples


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_every_variant_makes_its_steps(tiny: Path) -> None:
    steps = compare_steps(tiny / "base", tiny / "clip", batch_size=2, steps=2, device=torch.device("cpu"))
    assert list(steps) == ["eager", "diffusers", "compiled"]
    assert all(each["samples_per_second"] > 0 for each in steps.values())


def test_the_step_that_is_compared_with_trains_the_whole_unet(tiny: Path) -> None:
    batch = examples(tiny / "base", tiny / "clip", 2)
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    step, unet = diffusers_step(tiny / "base", batch, torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in unet.parameters()]
    step()
    assert all(not torch.equal(one, other) for one, other in zip(before, unet.parameters(), strict=True))


def test_a_benchmark_without_data_is_refused() -> None:
    with pytest.raises(ParameterError, match="name an ingestion's output, or full_size"):
        TrainBenchmark()
