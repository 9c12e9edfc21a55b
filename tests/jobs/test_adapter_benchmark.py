"""The benchmark of the adapters: what it compares, and in the numbers that a GPU computes in."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from instantbooth.model.adapter import GatedAdapter
from jobs.benchmarks.adapter import REFERENCE_COUNTS, AdapterBenchmark, WrittenOut, adapter, variants_of
from tests.tiny import tiny_booth


@torch.inference_mode()
def test_the_saved_and_the_written_out_adapters_predict_the_same(tiny: Path) -> None:
    booth = tiny_booth(tiny)  # gates are open
    unet, adapters = booth.base.unet, booth.trained.adapters
    torch.manual_seed(0)
    variants = variants_of(unet, adapters, requests=2, tokens=5, prompt_tokens=6)

    def fusers() -> set[type]:
        return {type(module.fuser) for module in unet.modules() if hasattr(module, "fuser")}

    bare = variants["bare"]()
    for count in REFERENCE_COUNTS:
        saved, used = variants[f"saved_{count}"](), fusers()
        written_out = variants[f"equation_{count}"]()
        assert (used, fusers()) == ({GatedAdapter}, {WrittenOut})
        torch.testing.assert_close(saved, written_out, atol=1e-4, rtol=1e-4)
        changed = (saved - bare).abs().amax(dim=(1, 2, 3))
        assert changed[:2].min() > 0.01, "the requests' rows see their references"
        assert changed[2:].max() == 0, "the unconditional ones have none"


def test_every_variant_makes_its_steps_in_half_precision(capsys: pytest.CaptureFixture[str]) -> None:
    # The goals are for a machine that does nothing else.
    with suppress(SystemExit):
        adapter(AdapterBenchmark(requests=1, repeats=1, precision="bf16", device="cpu"))
    result = json.loads(capsys.readouterr().out)
    medians = result["median_milliseconds"]
    variants = [f"{kind}_{count}" for count in REFERENCE_COUNTS for kind in ("saved", "equation")]
    assert list(medians) == ["bare", *variants]
    assert min(medians.values()) > 0
