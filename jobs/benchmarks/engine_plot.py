"""The engine benchmark as a picture: the curve of rows against step time, and latency against load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws what the benchmark wrote as JSON into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.suptitle(f"{result['model']} on {result['machine']}")
    step_time, throughput, latency = figure.subplots(1, 3)
    _curve(step_time, result["steps"]["milliseconds"], result["steps"]["knee_rows"])
    step_time.set(ylabel="step [ms]", title="A step takes longer …")
    _curve(throughput, result["steps"]["rows_per_second"], result["steps"]["knee_rows"])
    throughput.set(ylabel="rows / s", title="… and makes more, up to the knee")
    _latencies(latency, result["arrivals"]["loads"])
    figure.savefig(path, dpi=120)


def _curve(axes: Any, by_rows: Mapping[str, float], knee: int) -> None:
    axes.plot([int(rows) for rows in by_rows], list(by_rows.values()), marker="o")
    axes.axvline(knee, linestyle="--", color="grey")
    axes.annotate(f"knee: {knee} rows", (knee, 0), xytext=(-4, 4), textcoords="offset points", ha="right", color="grey")
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(rows) for rows in by_rows], list(by_rows))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("U-Net rows in the step")


def _latencies(axes: Any, loads: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    names = list(next(iter(loads.values())))
    for name in names:
        points = [by_server[name] for by_server in loads.values()]
        (line,) = axes.plot(list(loads), [point["p95_s"] for point in points], marker="o", label=f"{name}, p95")
        axes.plot(list(loads), [point["p50_s"] for point in points], linestyle=":", color=line.get_color())
    axes.set_ylim(bottom=0)
    axes.set(xlabel="arrivals / serial's capacity", ylabel="latency [s]", title="Latency, dotted: median")
    axes.legend(fontsize="small")
