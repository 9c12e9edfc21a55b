"""Identity against language: InstantBooth's α × β grid, IP-Adapter's scales, and the other methods as points."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from instantbooth.errors import ParameterError
from instantbooth.evaluation.methods.personalizer import InstantBoothConfig
from instantbooth.evaluation.methods.registry import METHODS
from instantbooth.storage import open_store
from jobs import cli
from jobs.evaluation.goals import PEERS, goals_at_equal_alignment
from jobs.evaluation.protocol import Protocol
from jobs.evaluation.sweep import Entrant
from jobs.evaluation.table1 import made_by, rows_of
from jobs.evaluation.tune import entrant_with
from jobs.goals import conclude

FILE = "frontier.json"
PLOT = "frontier.svg"
X, Y = "alignment", "face_similarity"
CURVES = PEERS


@dataclass(frozen=True, kw_only=True)
class Frontier(Protocol):
    """Which strengths are tried."""

    method: Literal["instantbooth", "instantbooth-masked"] = "instantbooth-masked"
    """Whose α and β are varied; IP-Adapter's references are masked too."""
    adapter_scales: tuple[float, ...] = (0.5, 1.0, 1.4, 1.8)
    """β."""
    concept_scales: tuple[float, ...] = (0.4, 0.8, 1.2, 1.6)
    """α."""
    ip_adapter_scales: tuple[float, ...] = (0.4, 0.8, 1.2, 1.6, 2.0, 2.4, 3.0)
    """Strengths of the image tokens, for both variants."""
    points: tuple[str, ...] = ("textual-inversion", "dreambooth", "dreambooth-lora", "instantbooth-masked")
    """Methods shown as they are in table 1, beside `method` itself."""

    def __post_init__(self) -> None:
        for name in ("adapter_scales", "concept_scales", "ip_adapter_scales"):
            if not getattr(self, name):
                raise ParameterError(f"{name} names no strength; name one or more")


def frontier(options: cli.Flat[Frontier]) -> None:
    """Writes frontier.json and frontier.svg, and prints the goals; exit status 1 where one of them is missed.

    Cells that table1 made are not made again.
    """
    series = entrants_of(options)
    options.check(tuple(dict.fromkeys(each.method for entrants in series.values() for each in entrants)))
    rows = rows_of(options, list({each.label: each for entrants in series.values() for each in entrants}.values()))
    found = {name: [rows[each.label] for each in entrants] for name, entrants in series.items()}
    own = next(row for row in found["points"] if row["method"] == options.method)
    goals = goals_at_equal_alignment(own, {name: found[name] for name in CURVES})
    store = open_store(options.output)
    result = {"made_by": made_by(options, "frontier"), "series": found, "goals": goals}
    store.put(FILE, (json.dumps(result, indent=2) + "\n").encode())
    store.put(PLOT, plot(found, METHODS[options.method].title))
    conclude({"plot": store.uri(PLOT)}, goals)


def entrants_of(options: Frontier) -> dict[str, list[Entrant]]:
    """Series → its entrants: "grid", "points" and a curve for each variant of IP-Adapter."""
    parts = options.parts
    grid = [
        _entrant(options.method, options, InstantBoothConfig(adapter_scale=beta, concept_scale=alpha))
        for alpha, beta in itertools.product(options.concept_scales, options.adapter_scales)
    ]
    curves = {
        name: [
            _entrant(name, options, replace(parts.settings.of(name), scale=scale))
            for scale in options.ip_adapter_scales
        ]
        for name in CURVES
    }
    shown = dict.fromkeys((*options.points, options.method))
    points = [Entrant(label=name, method=name, parts=parts) for name in shown]
    return {"grid": grid, "points": points, **curves}


def plot(series: dict[str, list[dict[str, Any]]], title: str) -> bytes:
    """Identity against alignment, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.6))
    own = "#b4552d"
    axes.scatter(*_xy(series["grid"]), s=22, color=own, alpha=0.45, label=f"{title}, α × β")
    for name, color in zip(CURVES, ("#3d6a8a", "#5a8f5a"), strict=True):
        axes.plot(*_xy(series[name]), marker="o", markersize=3.5, color=color, label=f"{METHODS[name].title}, scales")
    others = itertools.cycle(("#8a6fae", "#c9a227", "#7a7a7a", "#3b3b3b"))
    for row in series["points"]:
        x, y = row[X], row[Y]
        errors = [[[each["mean"] - each["low"]], [each["high"] - each["mean"]]] for each in (x, y)]
        color = own if row["title"] == title else next(others)
        bars = {"xerr": errors[0], "yerr": errors[1], "elinewidth": 0.9, "capsize": 2}
        axes.errorbar(x["mean"], y["mean"], **bars, fmt="D", markersize=6, color=color, label=row["title"])
    axes.set_xlabel("alignment with the prompt (CLIP) →")
    axes.set_ylabel("similarity to the subject →")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    pyplot.close(figure)
    return buffer.getvalue()


def _xy(rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [row[X]["mean"] for row in rows], [row[Y]["mean"] for row in rows]


def _entrant(method: str, options: Frontier, own: Any) -> Entrant:
    label = " ".join([method, *(f"{name}={value}" for name, value in vars(own).items())])
    return entrant_with(label, method, own, options.parts)
