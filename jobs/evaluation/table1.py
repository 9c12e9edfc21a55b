"""The paper's Table 1: all methods on the same subjects, prompts, seeds and sampler."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from instantbooth.evaluation.figures import COLUMNS, TIMES, judge, table_row
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


def table1(options: cli.Flat[Table1]) -> None:
    """Writes table1.json and prints the table; what an earlier run finished is not done again."""
    options.check(options.methods)
    entrants = [Entrant(label=name, method=name, parts=options.parts) for name in options.methods]
    rows = rows_of(options, entrants)
    add_ratios(rows)
    result = {
        "made_by": {
            "command": "python -m jobs.evaluate table1",
            "machine": machine(),
            "protocol": protocol_of(options),
            "sampling": asdict(options.parts.sampling),
        },
        "rows": rows,
    }
    open_store(options.output).put(FILE, (json.dumps(result, indent=2) + "\n").encode())
    show(rows)


def rows_of(protocol: Protocol, entrants: list[Entrant]) -> dict[str, dict[str, Any]]:
    """Label → the entrant's figures, its title, settings and digest."""
    made = sweep(protocol, entrants)
    judges, cases = protocol.judges(), protocol.cases()
    gallery = protocol.galleries(judges)
    rows = {}
    for each in entrants:
        own = each.parts.settings.of(each.method)
        rows[each.label] = {
            "title": METHODS[each.method].title,
            "settings": None if own is None else asdict(own),  # type: ignore[call-overload]
            "digest": each.digest,
            **table_row(judge(judges, gallery, cases, made[each.label])),
        }
    return rows


def add_ratios(rows: dict[str, dict[str, Any]]) -> None:
    """How many times as long as InstantBooth each method takes, where InstantBooth is among them."""
    if REFERENCE in rows:
        for column in TIMES:
            for row in rows.values():
                row[f"{column}_ratio"] = row[column]["mean"] / rows[REFERENCE][column]["mean"]


def protocol_of(protocol: Protocol) -> dict[str, Any]:
    """What was evaluated, for a table's record."""
    names = ("split", "identities", "gallery", "references", "prompts_per_kind")
    return {name: getattr(protocol, name) for name in names}


def machine() -> dict[str, Any]:
    """What the times were taken on."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
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
