"""The dashboard asks for what the endpoint's /metrics has, and shows all of it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
from prometheus_client.parser import text_string_to_metric_families

from instantbooth.engine import EngineStats
from serve.metrics import StageMetrics, engine_metrics, exposition, queue_metrics

DASHBOARD = json.loads((Path(__file__).parent.parent.parent / "infra" / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel, target) for panel in PANELS for target in panel["targets"]]
COUNTING = ("counter", "histogram")
ADDED_BY_PROMETHEUS = {"le"}


def exported() -> dict[str, tuple[str, str, dict[str, set[str]]]]:
    """Sample → its metric, the metric's type, and the values of its labels, on the page of four replicas."""
    stages = [StageMetrics(stage) for stage in ("ingress", "encode", "generate", "job")]
    stages[0].rejections.labels("overloaded").inc()
    counts = EngineStats(waiting={(64, 64): 1}, running={(64, 64): 2}, ended={"finished": 3})
    own = ([], [], engine_metrics(counts, 8, 1), queue_metrics(1))
    snapshots = [stage.snapshot(more) for stage, more in zip(stages, own, strict=True)]
    samples: dict[str, tuple[str, str, dict[str, set[str]]]] = {}
    for family in text_string_to_metric_families(exposition(snapshots).decode()):
        for sample in family.samples:
            labels = samples.setdefault(sample.name, (family.name, family.type, defaultdict(set)))[2]
            for label, value in sample.labels.items():
                labels[label].add(value)
    return samples


SAMPLES = exported()


def parts(query: str) -> Iterator[Any]:
    """Every node of a query, which must be PromQL."""
    waiting = [promql.parse(query.replace("$__rate_interval", "1m"))]
    while waiting:
        node = waiting.pop()
        yield node
        children = [getattr(node, name, None) for name in ("lhs", "rhs", "expr", "vector_selector")]
        waiting += [child for child in (*children, *getattr(node, "args", ())) if child is not None]


def selectors(query: str) -> list[Any]:
    return [node for node in parts(query) if isinstance(node, promql.VectorSelector)]


@pytest.mark.parametrize("query", [target["expr"] for _, target in TARGETS])
def test_a_query_asks_for_what_is_exported(query: str) -> None:
    found = selectors(query)
    assert found
    for selector in found:
        labels = SAMPLES[selector.name][2]
        for matcher in selector.matchers.matchers:
            assert matcher.value in labels[matcher.name]
    labels_of_all = set.intersection(*(set(SAMPLES[selector.name][2]) for selector in found))
    for node in parts(query):
        if isinstance(node, promql.AggregateExpr) and node.modifier:
            assert set(node.modifier.labels) <= labels_of_all


@pytest.mark.parametrize("query", [target["expr"] for _, target in TARGETS])
def test_counters_are_rates_and_gauges_are_not(query: str) -> None:
    if query.startswith("count"):
        return  # the number of series, whatever their values
    rated = {node.vector_selector.name for node in parts(query) if isinstance(node, promql.MatrixSelector)}
    for selector in selectors(query):
        assert (SAMPLES[selector.name][1] in COUNTING) == (selector.name in rated)


@pytest.mark.parametrize(("panel", "target"), TARGETS, ids=[target["expr"][:40] for _, target in TARGETS])
def test_a_legend_names_labels_that_the_query_leaves(panel: dict[str, Any], target: dict[str, Any]) -> None:
    named = {part.partition("}}")[0] for part in target["legendFormat"].split("{{")[1:]}
    left: set[str] = set()
    for node in parts(target["expr"]):
        if isinstance(node, promql.AggregateExpr) and node.modifier:
            left |= set(node.modifier.labels) - ADDED_BY_PROMETHEUS
    assert named <= left
    assert panel["datasource"] == target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {SAMPLES[selector.name][0] for _, target in TARGETS for selector in selectors(target["expr"])}
    assert {metric for metric, _, _ in SAMPLES.values()} == shown


def test_a_name_that_is_not_exported_would_be_noticed() -> None:
    for wrong in ("rate(instantbooth_steps[1m])", "ray_instantbooth_queued_work_rows"):
        assert {selector.name for selector in selectors(wrong)} - set(SAMPLES)
    with pytest.raises(ValueError, match="expected type"):
        list(parts("rate(instantbooth_steps_total)"))


def test_grafana_finds_what_it_needs() -> None:
    assert {"uid", "title", "schemaVersion", "time", "templating"} <= set(DASHBOARD)
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["title"] and panel["description"] for panel in PANELS)
    for panel in PANELS:
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        assert one["x"] + one["w"] <= 24
        apart = [one[a] + one[b] <= other[a] or other[a] + other[b] <= one[a] for a, b in (("x", "w"), ("y", "h"))]
        assert any(apart)
