"""Stable Diffusion 1.5's true configuration with random weights, loaded, trained and sampled like the miniature.

`make test-full`; takes minutes and 16 GB, so it stands outside `make test`.
"""

import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from instantbooth import Personalizer
from instantbooth.training.adapters import (
    AdapterObjective,
    AdapterTrainingConfig,
    ExamplePreparer,
    optimizer_for,
    unpacked,
)
from jobs.benchmarks.full_size import write_full_size
from tests.tiny import portrait

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15")
    write_full_size(folder)
    return folder


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_sd15_encodes_trains_and_samples_within_16_gb(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    booth = Personalizer.untrained(folder, device="cpu", dtype=torch.bfloat16)
    counts = {
        "adapters": millions(booth.trained.adapters),
        "encoders": millions(booth.trained.encoders),
        "image encoder": millions(booth.image_encoder),
        "unet": millions(booth.base.unet) - millions(booth.trained.adapters),
    }
    seconds: dict[str, float] = {}

    def timed(name: str) -> None:
        seconds[name] = time.perf_counter() - started

    images, masks = zip(*(portrait(seed, 224) for seed in range(2)), strict=True)
    started = time.perf_counter()
    concept = booth.encode(list(images), "person", list(masks))
    timed("encode 2 images")
    assert concept.patch_features.shape == (2 * 257, 768)
    started = time.perf_counter()
    picture = booth.generate("a photo of a {subject}", concept, num_inference_steps=2, adapter_scale=1.0)[0]
    timed("generate, 2 steps with guidance")
    assert picture.size == (512, 512)
    objective = AdapterObjective(booth, AdapterTrainingConfig(image_dropout=0))
    optimizer = optimizer_for(objective, objective.config)
    preparer = ExamplePreparer.for_model(str(folder), str(folder / "image_encoder"))
    example = preparer(image=images[0], mask=masks[0], caption="a {subject}", noun="cat", rng=np.random.default_rng(0))
    batch = unpacked({name: torch.from_numpy(value)[None] for name, value in example.items()})
    before = [adapter.gate.item() for adapter in booth.trained.adapters.values()]
    started = time.perf_counter()
    for seed in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective(batch, torch.Generator().manual_seed(seed))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    timed("2 training steps")
    assert torch.isfinite(loss)
    assert before != [adapter.gate.item() for adapter in booth.trained.adapters.values()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    with capsys.disabled():
        print({name: f"{value:.1f} M" for name, value in counts.items()})
        print({name: f"{value:.1f} s" for name, value in seconds.items()}, f"peak {peak:.1f} GB")
    assert 58.5 < counts["adapters"] < 59.5
    assert peak < 16
