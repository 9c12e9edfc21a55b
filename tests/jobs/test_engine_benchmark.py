"""The engine benchmark's parts: arrivals, the fixed batches it compares with, peaks and goals."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from threading import Timer
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from instantbooth import Personalizer
from instantbooth.engine.concepts import KeysValuesCache
from instantbooth.engine.knee import TYPICAL_REFERENCES, measure_steps, typical_batch
from instantbooth.model.flops import flops_of
from instantbooth.model.personalizer import Request
from jobs.benchmarks.arrivals import Picture, poisson, replay
from jobs.benchmarks.engine import REQUEST_LEVEL, STEP_LEVEL, EngineBenchmark, _identical, _measure, goals_of
from jobs.benchmarks.engine_peak import against_one_request, flops_of_step, share_of_peak
from jobs.benchmarks.fixed_batches import FixedBatches
from jobs.benchmarks.peak import unet_tflop
from jobs.goals import at_least, at_most, conclude
from tests.tiny import portrait


@pytest.fixture(scope="module")
def requests(booth: Personalizer) -> list[Request]:
    """Five of one subject, of two to six steps."""
    image, mask = portrait(1)
    concept = booth.encode([image], "person", [mask])
    return [
        booth.requests("a photo of a {subject}", concept, seed=steps, num_inference_steps=steps, guidance_scale=3.0)[0]
        for steps in range(2, 7)
    ]


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 3}, {"batch_size": 3, "shrinking": True}])
def test_fixed_batches_make_the_same_pictures(
    booth: Personalizer, requests: list[Request], settings: dict[str, int]
) -> None:
    with FixedBatches(booth, KeysValuesCache(booth, 2**20), **settings) as server:
        pictures = [server.submit(request) for request in requests]
        made = [np.asarray(picture.result(20), int) for picture in pictures]
    for request, picture in zip(requests, made, strict=True):
        alone = np.asarray(booth.base.decode(booth.sample([request]))[0], int)
        assert abs(picture - alone).max() <= 1


def test_whoever_waits_for_a_batch_that_fails_is_told(booth: Personalizer, requests: list[Request]) -> None:
    with FixedBatches(booth, KeysValuesCache(booth, 2**20), batch_size=2) as server:
        failed = server.submit(None)  # type: ignore[arg-type]
        with pytest.raises(AttributeError):
            failed.result(20)
        assert server.submit(requests[0]).result(20)


def test_arrivals_are_a_poisson_process() -> None:
    times = poisson(20_000, np.random.default_rng(0))
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1, abs=0.03)
    assert (gaps > 1).mean() == pytest.approx(np.exp(-1), abs=0.02)


def test_requests_are_sent_at_their_times_whoever_still_waits() -> None:
    sent: list[float] = []
    started = time.perf_counter()

    def submit(request: Request) -> Picture:
        sent.append(time.perf_counter() - started)
        picture: Picture = Future()
        Timer(0.2, picture.set_result, [Image.new("RGB", (1, 1))]).start()
        return picture

    outcome = replay(submit, [None] * 4, [0.0, 0.05, 0.05, 0.1])  # type: ignore[list-item]
    assert all(at >= due for at, due in zip(sent, [0.0, 0.05, 0.05, 0.1], strict=True))
    assert sent[-1] < 0.2
    assert all(latency >= 0.2 for latency in outcome.latencies)
    assert 0.3 <= outcome.seconds < 2
    assert outcome.summary()["images_per_second"] == pytest.approx(4 / outcome.seconds, abs=0.001)

    def refuse(request: Request) -> Picture:
        picture: Picture = Future()
        picture.set_exception(ValueError("no"))
        return picture

    with pytest.raises(ValueError, match="no"):
        replay(refuse, [None], [0.0])  # type: ignore[list-item]


def test_the_knee_is_compared_with_one_request_and_with_the_peak(booth: Personalizer) -> None:
    seconds = measure_steps(booth, max_rows=4, repeats=2)
    ratios = against_one_request(booth, seconds, 4, repeats=2, backend="eager")
    assert ratios["knee_over_one_eager"] == pytest.approx(2 * seconds[2] / seconds[4], abs=0.001)
    assert ratios["knee_over_one_compiled"] > 0
    known = share_of_peak(booth, {4: 1e-3}, 4, "NVIDIA H100 80GB HBM3")
    assert known["share_of_peak"] == pytest.approx(flops_of_step(booth, 4) / 1e-3 / 989e12, abs=0.001)
    assert "share_of_peak" not in share_of_peak(booth, seconds, 4, "a processor")


def test_the_arithmetic_of_a_step_is_that_of_its_requests(booth: Personalizer) -> None:
    batch = typical_batch(booth, 8, steps=1)
    with sdpa_kernel(SDPBackend.MATH):
        assert flops_of_step(booth, 8) == flops_of(batch.step) > 0
    image, mask = portrait(0)
    concept = booth.encode([image] * TYPICAL_REFERENCES, "person", [mask] * TYPICAL_REFERENCES)
    assert flops_of_step(booth, 2) == pytest.approx(unet_tflop(booth, concept) * 1e12, rel=1e-9)


def test_the_engine_is_compared_with_the_best_of_several_static_batches(
    booth: Personalizer, requests: list[Request]
) -> None:
    workload = SimpleNamespace(identical=lambda count, steps: [requests[0]] * count)
    options = SimpleNamespace(min_steps=2, max_steps=2, repeats=1)
    curve = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}
    result = _identical(booth, workload, curve, options)  # type: ignore[arg-type]
    rates = result["images_per_second"]
    static = {name: rate for name, rate in rates.items() if name != STEP_LEVEL}  # type: ignore[attr-defined]
    assert list(static) == ["static batch of 1", "static batch of 2", "static batch of 4"]
    best = max(static, key=static.__getitem__)
    assert best == f"static batch of {result['requests_in_best_static_batch']}"
    assert result["step_level_over_best_static_batch"] == pytest.approx(rates[STEP_LEVEL] / static[best], abs=0.01)


def test_a_machine_too_slow_for_the_curve_measures_one_guided_request_all_the_same(
    booth: Personalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.benchmarks.engine.PATIENCE_S", 0)
    result = _measure(booth, EngineBenchmark(requests=2, min_steps=2, max_steps=2, repeats=2, trials=2))
    assert set(result["steps"]["milliseconds"]) == {1, 2}
    assert len(goals_of(result)) == 2


def test_the_engine_is_held_to_its_goals() -> None:
    result: dict[str, object] = {
        "arrivals": {"p95_over_request_level": {0.5: {REQUEST_LEVEL: 0.9}, 1.0: {REQUEST_LEVEL: 0.4}}},
        "identical_requests": {"step_level_over_best_static_batch": 0.94},
    }
    assert list(goals_of(result).values()) == [(0.4, 0.5, True), (0.94, 0.95, False)]
    result["one_request"] = {"knee_over_one_eager": 3.5, "knee_over_one_compiled": 1.4}
    assert list(goals_of(result).values())[2:] == [(3.5, 3.0, True), (1.4, 1.5, False)]


def test_a_goal_that_is_missed_ends_in_failure(capsys: pytest.CaptureFixture[str]) -> None:
    conclude({"rate": 2}, {"rate": at_least(2, 2), "latency": at_most(1.0, 1.1)})
    assert json.loads(capsys.readouterr().out)["goals"] == {"rate": [2, 2, True], "latency": [1.0, 1.1, True]}
    for missed in (at_least(1.9, 2), at_most(1.2, 1.1)):
        with pytest.raises(SystemExit) as ended:
            conclude({}, {"missed": missed, "met": at_least(1, 0)})
        assert ended.value.code == 1
