"""Hyperparameters of the methods, chosen on validation identities by one rule for all."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rich.table import Table

from instantbooth.errors import ParameterError
from instantbooth.evaluation.methods.registry import METHODS, Parts, Settings, field_of
from instantbooth.evaluation.photographs import Split
from instantbooth.storage import open_store
from jobs import cli
from jobs.evaluation.protocol import SETTINGS, Protocol
from jobs.evaluation.sweep import Entrant, missing
from jobs.evaluation.table1 import console, rows_of

TRIALS = "tuning.json"
SHOWN = ("prompt_accuracy", "alignment", "face_similarity", "identification", "seconds")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Values that are tried, each with each."""

    textual_inversion_learning_rate: tuple[float, ...] = (1e-3, 5e-3, 2e-2)
    textual_inversion_steps: tuple[int, ...] = (500, 1500)
    dreambooth_learning_rate: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    dreambooth_steps: tuple[int, ...] = (200, 600)
    dreambooth_lora_learning_rate: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    dreambooth_lora_steps: tuple[int, ...] = (200, 600)
    ip_adapter_scale: tuple[float, ...] = (0.4, 0.8, 1.2, 1.6, 2.0, 2.4, 3.0)
    ip_adapter_plus_scale: tuple[float, ...] = (0.4, 0.8, 1.2, 1.6, 2.0, 2.4, 3.0, 4.0)
    instantbooth_adapter_scale: tuple[float, ...] = (0.6, 1.0, 1.4, 1.8)
    instantbooth_concept_scale: tuple[float, ...] = (0.4, 0.8, 1.2, 1.6)
    instantbooth_masked_adapter_scale: tuple[float, ...] = (0.6, 1.0, 1.4, 1.8)
    instantbooth_masked_concept_scale: tuple[float, ...] = (0.4, 0.8, 1.2, 1.6)

    def of(self, method: str) -> dict[str, tuple[float, ...]]:
        """Field of the method's settings → values to try."""
        stem = field_of(method)
        known = [each.name for each in fields(Settings().of(method))]
        return {name: getattr(self, f"{stem}_{name}") for name in known if hasattr(self, f"{stem}_{name}")}


@dataclass(frozen=True, kw_only=True)
class Tune(Protocol):
    """What is tried, and on whom."""

    split: Split = "validation"
    identities: int = 4
    methods: tuple[str, ...] = tuple(METHODS)
    """Which are tuned; the others keep their settings."""
    grid: Grid = Grid()

    @property
    def contestants(self) -> tuple[str, ...]:
        """The methods."""
        return self.methods


def tune(options: cli.Flat[Tune]) -> None:
    """Writes settings.json, which the other commands read there, and tuning.json, which holds every trial's figures.

    The best trial has the highest geometric mean of prompt accuracy (alignment, of photographs) and face similarity:
    one that buys either of them with the other does not win. Where none is above 0, similarity decides. Trials that
    earlier runs left in the output compete too.
    """
    if options.split == "test":
        raise ParameterError("hyperparameters are not chosen on the split they are judged on; leave --split out")
    options.check(options.methods)
    store = open_store(options.output)
    earlier = json.loads(store.get(TRIALS)) if store.exists(TRIALS) else {}
    trials = {
        name: with_earlier(candidates(name, options.parts, options.grid), earlier, options) for name in options.methods
    }
    rows = rows_of(options, [each for entrants in trials.values() for each in entrants])
    chosen = options.parts.settings
    for name, entrants in trials.items():
        best = max(entrants, key=lambda each: _rank(rows[each.label])).parts.settings.of(name)
        chosen = with_settings(chosen, name, best)
        for line in at_the_edge(name, best, [each.parts.settings.of(name) for each in entrants]):
            print(line)
    for row in rows.values():
        row["score"] = score(row)
    others = {label: row for label, row in earlier.items() if row["method"] not in trials}
    store.put(TRIALS, (json.dumps(others | rows, indent=2) + "\n").encode())
    tuned = chosen.to_json({*options.methods_set, *trials})
    store.put(SETTINGS, tuned.encode())
    _show(rows)
    print(tuned)


def candidates(method: str, parts: Parts, grid: Grid) -> list[Entrant]:
    """One entrant for each combination of the grid's values."""
    values = grid.of(method)
    entrants = []
    for combination in itertools.product(*values.values()):
        changes = dict(zip(values, combination, strict=True))
        label = " ".join([method, *(f"{name}={value:g}" for name, value in changes.items())])
        entrants.append(entrant_with(label, method, replace(parts.settings.of(method), **changes), parts))
    return entrants


def entrant_with(label: str, method: str, own: Any, parts: Parts) -> Entrant:
    """A method with settings of its own in these parts."""
    settings = with_settings(parts.settings, method, own)
    return Entrant(label=label, method=method, parts=replace(parts, settings=settings))


def with_earlier(entrants: list[Entrant], rows: Mapping[str, Mapping[str, Any]], options: Tune) -> list[Entrant]:
    """The entrants of a method, and those of earlier rows whose cells are all still there, of the same models."""
    method, parts = entrants[0].method, entrants[0].parts
    found = {each.label: each for each in entrants}
    for label, row in rows.items():
        if row["method"] == method and label not in found:
            entrant = entrant_with(label, method, replace(parts.settings.of(method), **row["settings"]), parts)
            if not missing(options, [entrant]):
                found[label] = entrant
    return list(found.values())


def at_the_edge(method: str, best: Any, tried: Sequence[Any]) -> list[str]:
    """In words, every number of the best settings that is the highest or the lowest that was tried."""
    words = []
    for each in fields(best):
        values = {getattr(settings, each.name) for settings in tried}
        if len(values) > 1:
            value, ends = getattr(best, each.name), {min(values): "lowest", max(values): "highest"}
            if value in ends:
                words.append(
                    f"{method}: {each.name} {value:g} is the {ends[value]} tried; a wider --grid may find better"
                )
    return words


def with_settings(settings: Settings, method: str, own: Any) -> Settings:
    """The settings with one method's replaced."""
    return replace(settings, **{field_of(method): own})


def score(row: dict[str, Any]) -> float:
    """What is maximised; alignment stands for prompt accuracy where no judge knows attributes."""
    obedience = row["prompt_accuracy" if "prompt_accuracy" in row else "alignment"]["mean"]
    return math.sqrt(max(obedience, 0.0) * max(row["face_similarity"]["mean"], 0.0))


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    return score(row), row["face_similarity"]["mean"]


def _show(rows: dict[str, dict[str, Any]]) -> None:
    names = [name for name in SHOWN if all(name in row for row in rows.values())]
    table = Table("trial", "score", *names)
    for label, row in sorted(rows.items(), key=lambda item: -item[1]["score"]):
        table.add_row(label, f"{row['score']:.3f}", *(f"{row[name]['mean']:.3f}" for name in names))
    console().print(table)
