"""The load of the autoscaling benchmark; that replicas follow it is what the benchmark itself shows."""

from __future__ import annotations

from itertools import pairwise

import pytest

from instantbooth.errors import ParameterError
from jobs.benchmarks.autoscaling import Answer, AutoscalingBenchmark, Look, _summary


def test_the_load_rises_falls_and_ends() -> None:
    load = AutoscalingBenchmark(seconds=100, peak=3)
    assert [load.rate(second) for second in (0, 10, 20, 30, 40, 50, 90)] == pytest.approx([0, 0, 1.5, 3, 1.5, 0, 0])
    due = list(load.arrivals())
    assert len(due) == pytest.approx(3 * 40 / 2, abs=1)
    assert 10 < due[0] < due[-1] < 50
    gaps = [later - earlier for earlier, later in pairwise(due)]
    assert min(gaps) == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"peak": -1}, {"rows_per_replica": 0}, {"max_replicas": 1}])
def test_a_load_that_shows_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ParameterError, match="max_replicas at least 2"):
        AutoscalingBenchmark(**wrong)


def test_a_load_without_arrivals_is_refused() -> None:
    with pytest.raises(ParameterError, match="no picture is asked for"):
        AutoscalingBenchmark(seconds=5, peak=0.4)


def test_where_nothing_succeeded_there_is_no_latency() -> None:
    looks = [Look(second=1.0, replicas=1, queued_rows=0.0, rows={})]
    summary = _summary(AutoscalingBenchmark(), looks, [Answer(second=0.5, waited=0.1, status=503)])
    assert (summary["statuses"], summary["latency_s"]) == ({503: 1}, None)
