"""How quality grows with the number of references, which all enter one concept without any training."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from instantbooth.evaluation.cases import check_count
from instantbooth.evaluation.methods.registry import METHODS
from instantbooth.storage import open_store
from jobs import cli
from jobs.evaluation.protocol import Protocol, refuse_unused
from jobs.evaluation.sweep import Entrant, sweep
from jobs.evaluation.table1 import console, judge_made, made_by, row_of

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

    @property
    def contestants(self) -> tuple[str, ...]:
        """The methods."""
        return self.methods

    @property
    def needed(self) -> int:
        """As many as the highest count: the subjects are the same whatever is given of them."""
        return max(self.counts)


def references(options: cli.Flat[References]) -> None:
    """Writes references.json and prints it. All counts are of the same subjects, judged against the same pictures."""
    refuse_unused(options, ("references",), "does nothing here: --counts says how many are given")
    known = replace(options, references=options.needed)
    known.check(known.methods)
    entrants = [Entrant(label=name, method=name, parts=known.parts) for name in known.methods]
    rows = {}
    for count in dict.fromkeys(known.counts):
        made = sweep(replace(known, references=count), entrants)
        rows[str(count)] = {each.entrant.label: row_of(each) for each in judge_made(known, entrants, made)}
    made = made_by(known, "references") | {"command": cli.command_line("jobs.evaluate references", options)}
    result = {"made_by": made, "rows": rows}
    open_store(options.output).put(FILE, (json.dumps(result, indent=2) + "\n").encode())
    _show(rows)


def _show(rows: dict[str, dict[str, dict[str, Any]]]) -> None:
    counts = list(rows.values())
    names = [name for name in SHOWN if all(name in row for found in counts for row in found.values())]
    table = Table("method", "references", *names)
    for method in counts[0]:
        for count, found in rows.items():
            table.add_row(METHODS[method].title, count, *(f"{found[method][name]['mean']:.3f}" for name in names))
    console().print(table)
