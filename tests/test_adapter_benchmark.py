"""The benchmark of the adapters, in the numbers that a GPU computes in."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest

from jobs.benchmarks.adapter import REFERENCE_COUNTS, AdapterBenchmark, adapter


def test_every_variant_makes_its_steps_in_half_precision(capsys: pytest.CaptureFixture[str]) -> None:
    # The goals are for a machine that does nothing else.
    with suppress(SystemExit):
        adapter(AdapterBenchmark(requests=1, repeats=1, precision="bf16", device="cpu"))
    result = json.loads(capsys.readouterr().out)
    medians = result["median_milliseconds"]
    variants = [f"{kind}_{count}" for count in REFERENCE_COUNTS for kind in ("saved", "equation")]
    assert list(medians) == ["bare", *variants]
    assert min(medians.values()) > 0
