"""The paper's Table 1: all methods on the same subjects, prompts, seeds and sampler."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from instantbooth.evaluation.cells import Cell
from instantbooth.evaluation.figures import COLUMNS, TIMES, Value, judge, table_row
from instantbooth.evaluation.methods.registry import METHODS
from instantbooth.storage import open_store
from jobs import cli
from jobs.evaluation.protocol import Protocol
from jobs.evaluation.sweep import Entrant, sweep

FILE = "table1.json"
REFERENCE = "instantbooth"
"""Times are also given as multiples of this method's."""


@dataclass(frozen=True, kw_only=True)
class Table1(Protocol):
    """Which methods are compared, and on what."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Rows of the table."""

    @property
    def entrants(self) -> list[Entrant]:
        """The methods with the settings of all."""
        return [Entrant(label=name, method=name, parts=self.parts) for name in self.methods]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An entrant with what it made, and what the judges say of it."""

    entrant: Entrant
    cells: list[Cell]
    values: list[Value]


def table1(options: cli.Flat[Table1]) -> None:
    """Writes table1.json and prints the table; what an earlier run finished is not done again."""
    options.check(options.methods)
    rows = rows_of(options, options.entrants)
    add_ratios(rows)
    result = {"made_by": made_by(options, "table1"), "rows": rows}
    open_store(options.output).put(FILE, (json.dumps(result, indent=2) + "\n").encode())
    show(rows)


def rows_of(protocol: Protocol, entrants: Sequence[Entrant]) -> dict[str, dict[str, Any]]:
    """Label → what `row_of` says."""
    return {each.entrant.label: row_of(each) for each in judge_all(protocol, entrants)}


def judge_all(protocol: Protocol, entrants: Sequence[Entrant]) -> list[Judged]:
    """Makes what is missing, and judges it."""
    made = sweep(protocol, entrants)
    judges, cases = protocol.judges(), protocol.cases()
    gallery = protocol.judged_against(judges)
    return [
        Judged(entrant=each, cells=made[each.label], values=judge(judges, gallery, cases, made[each.label]))
        for each in entrants
    ]


def row_of(judged: Judged) -> dict[str, Any]:
    """The entrant's title, settings and digest, and its figures with their intervals."""
    entrant = judged.entrant
    return {
        "title": METHODS[entrant.method].title,
        "settings": asdict(entrant.parts.settings.of(entrant.method)),
        "digest": entrant.digest,
        **table_row(judged.values),
    }


def add_ratios(rows: dict[str, dict[str, Any]]) -> None:
    """How many times as long as InstantBooth each method takes, where InstantBooth is among them."""
    if REFERENCE in rows:
        for column in TIMES:
            for row in rows.values():
                row[f"{column}_ratio"] = row[column]["mean"] / rows[REFERENCE][column]["mean"]


def made_by(protocol: Protocol, command: str) -> dict[str, Any]:
    """A table's record: command, machine, what was evaluated, and how it was sampled."""
    names = ("split", "identities", "gallery", "references", "prompts_per_kind")
    return {
        "command": f"python -m jobs.evaluate {command}",
        "machine": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "cpus": os.cpu_count(),
            "torch": torch.__version__,
        },
        "protocol": {name: getattr(protocol, name) for name in names},
        "sampling": asdict(protocol.parts.sampling),
    }


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Prints the table: means, with half the width of their intervals."""
    table = Table("method", *COLUMNS.values(), *TIMES.values())
    for row in rows.values():
        figures = [_figure(row.get(column)) for column in COLUMNS]
        times = [_time(row, column) for column in TIMES]
        table.add_row(row["title"], *figures, *times)
    Console().print(table)


def _figure(interval: dict[str, float] | None) -> str:
    if interval is None:
        return "–"
    return f"{interval['mean']:.3f} ± {(interval['high'] - interval['low']) / 2:.3f}"


def _time(row: dict[str, Any], column: str) -> str:
    ratio = row.get(f"{column}_ratio")
    return f"{row[column]['mean']:.2f}" + ("" if ratio is None else f" ({ratio:.1f}×)")
