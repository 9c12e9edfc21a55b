"""How quality grows with the number of references, which all enter one concept without any training."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from instantbooth.evaluation.cases import check_count
from instantbooth.evaluation.methods.registry import METHODS
from instantbooth.storage import open_store
from jobs import cli
from jobs.evaluation.protocol import Protocol
from jobs.evaluation.sweep import Entrant
from jobs.evaluation.table1 import made_by, rows_of

FILE = "references.json"
SHOWN = ("alignment", "prompt_accuracy", "face_similarity", "identification", "reconstruction", "seconds_picture")


@dataclass(frozen=True, kw_only=True)
class References(Protocol):
    """Who is given how many pictures."""

    methods: tuple[str, ...] = ("instantbooth", "instantbooth-masked")
    """Methods that take any number: f_c is the mean over the references, f_p their concatenation."""
    counts: tuple[int, ...] = (1, 2, 3, 5, 10)
    """References of each subject; the first ones of the same pictures."""

    def __post_init__(self) -> None:
        check_count("counts", min(self.counts, default=0), 1)


def references(options: cli.Flat[References]) -> None:
    """Writes references.json and prints it. All counts are judged against the same gallery."""
    options.check(options.methods)
    entrants = [Entrant(label=name, method=name, parts=options.parts) for name in options.methods]
    rows = {str(count): rows_of(replace(options, references=count), entrants) for count in options.counts}
    result = {"made_by": made_by(options, "references"), "rows": rows}
    open_store(options.output).put(FILE, (json.dumps(result, indent=2) + "\n").encode())
    _show(rows)


def _show(rows: dict[str, dict[str, dict[str, Any]]]) -> None:
    table = Table("method", "references", *SHOWN)
    for method in next(iter(rows.values())):
        for count, found in rows.items():
            table.add_row(METHODS[method].title, count, *(f"{found[method][name]['mean']:.3f}" for name in SHOWN))
    Console().print(table)
