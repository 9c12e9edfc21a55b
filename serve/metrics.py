"""What a stage counts, and how the counts of all replicas become one page in Prometheus' format."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

if TYPE_CHECKING:
    from instantbooth.engine import EngineStats

Snapshot = tuple[str, list[Metric]]
"""A replica's name and metrics; picklable."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class StageMetrics:
    """How long a stage takes, and what it refuses."""

    def __init__(self, stage: str) -> None:
        self.registry = CollectorRegistry()
        self._latency = Histogram(
            "instantbooth_stage_seconds",
            "Time in a stage, for calls that succeeded",
            ["stage"],
            registry=self.registry,
            buckets=SECONDS,
        ).labels(stage)
        self.rejections = Counter(
            "instantbooth_rejections",
            "Answers of the ingress other than success, by their code; those of the proxy before it are not counted",
            ["reason"],
            registry=self.registry,
        )
        self.cancellations = Counter(
            "instantbooth_cancellations", "Calls whose client went away", ["stage"], registry=self.registry
        ).labels(stage)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts the time of a call that succeeds."""
        started = time.perf_counter()
        yield
        self._latency.observe(time.perf_counter() - started)

    def snapshot(self, more: Iterable[Metric] = ()) -> Snapshot:
        """Everything counted so far in this process, and more."""
        return f"{socket.gethostname()}-{os.getpid()}", [*self.registry.collect(), *more]


def engine_metrics(stats: EngineStats, row_budget: int, cached_bytes: int) -> list[Metric]:
    """An engine's own counts."""
    held = GaugeMetricFamily(
        "instantbooth_held_rows", "U-Net rows in a step of what waits and runs, by size", labels=["state", "size"]
    )
    for state, sizes in (("waiting", stats.waiting), ("running", stats.running)):
        for (height, width), rows in sizes.items():
            held.add_metric([state, f"{width}x{height}"], rows)
    ended = CounterMetricFamily("instantbooth_requests_ended", "Pictures by how they ended", labels=["how"])
    for how, count in stats.ended.items():
        ended.add_metric([how], count)
    lookups = CounterMetricFamily(
        "instantbooth_concept_cache", "Look-ups of concepts' keys and values", labels=["outcome"]
    )
    lookups.add_metric(["hit"], stats.concept_hits)
    lookups.add_metric(["miss"], stats.concept_misses)
    gauges = {
        "instantbooth_queued_work_rows": ("U-Net rows still to compute", stats.queued_work),
        "instantbooth_undecoded": ("Finished latents that wait for the VAE", stats.undecoded),
        "instantbooth_row_budget": ("U-Net rows of the model's own size that may share a step", row_budget),
        "instantbooth_concept_cache_bytes": ("Keys and values held", cached_bytes),
    }
    counters = {
        "instantbooth_steps": ("U-Net forward passes", stats.steps),
        "instantbooth_rows": ("U-Net rows of requests in them; over those offered: occupancy", stats.rows),
        "instantbooth_offered_rows": ("U-Net rows there was room for in them", stats.offered_rows),
        "instantbooth_padded_rows": ("U-Net rows in them that filled a shape up: waste", stats.padded_rows),
        "instantbooth_step_seconds": ("Time in them; over steps: step time", stats.step_seconds),
    }
    return [
        held,
        ended,
        lookups,
        *(GaugeMetricFamily(name, text, value=value) for name, (text, value) in gauges.items()),
        *(CounterMetricFamily(name, text, value=value) for name, (text, value) in counters.items()),
    ]


def queue_metrics(queued_rows: int) -> list[Metric]:
    """What the jobs' replica counts beside its stage."""
    text = "U-Net rows of jobs that wait for their turn"
    return [GaugeMetricFamily("instantbooth_queued_jobs_rows", text, value=queued_rows)]


def exposition(snapshots: Iterable[Snapshot]) -> bytes:
    """The metrics of replicas by name, each sample with its replica as a label, as Prometheus reads them."""
    merged: dict[str, Metric] = {}
    for replica, metrics in snapshots:
        for metric in metrics:
            into = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            into.samples += [
                sample._replace(labels={**sample.labels, "replica": replica})
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
    return generate_latest(_Collected(merged.values()))


class _Collected(CollectorRegistry):
    """A registry of metrics that were collected elsewhere."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        super().__init__()
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)
