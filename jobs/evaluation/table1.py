"""The paper's Table 1: all methods on the same subjects, prompts, seeds and sampler."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from rich.console import Console
from rich.table import Table

from instantbooth.evaluation.cells import Cell
from instantbooth.evaluation.figures import COLUMNS, TIMES, Value, difference, judge, table_row
from instantbooth.evaluation.methods.registry import METHODS, field_of
from instantbooth.model.base import locate
from instantbooth.storage import open_store
from jobs import cli
from jobs.evaluation.goals import OWN, PEERS, REFERENCE, goals_of
from jobs.evaluation.protocol import Protocol
from jobs.evaluation.sweep import DIGEST_LENGTH, Entrant, folder_digest, sweep
from jobs.goals import conclude
from jobs.tracked import revision

FILE = "table1.json"
DRAWN = "the subjects themselves, drawn"
"""Title of the row under the methods': what a perfect method would be judged."""
WIDTH = 200
REPORTED: Mapping[str, Mapping[str, float]] = {
    "textual-inversion": {
        "alignment": 0.2556,
        "face_distance": 1.5462,
        "face_similarity": 0.1130,
        "reconstruction": 0.7832,
        "seconds": 1500,
    },
    "dreambooth": {
        "alignment": 0.3088,
        "face_distance": 1.2281,
        "face_similarity": 0.2408,
        "reconstruction": 0.8335,
        "seconds": 600,
    },
    "instantbooth": {
        "alignment": 0.3140,
        "face_distance": 1.1901,
        "face_similarity": 0.2456,
        "reconstruction": 0.7329,
        "seconds": 6,
    },
    "instantbooth-masked": {
        "alignment": 0.3135,
        "face_distance": 1.1899,
        "face_similarity": 0.2418,
        "seconds": 6,
    },
}
"""Table 1 as the paper reports it, for persons on real photographs: to compare orders with, not figures."""


@dataclass(frozen=True, kw_only=True)
class Table1(Protocol):
    """Which methods are compared, and on what."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Rows of the table."""

    @property
    def contestants(self) -> tuple[str, ...]:
        """The methods."""
        return self.methods

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
    """Writes table1.json and prints the table and its goals; exit status 1 where one of them is missed.

    What an earlier run finished is not done again.
    """
    options.check(options.methods)
    rows = table_rows(options, judge_all(options, options.entrants))
    drawn = options.drawn_row()
    place = write_table(options, made_by(options, "table1"), rows, drawn)
    show(rows, drawn)
    conclude({"table": place}, goals_of(rows))


def write_table(
    options: Table1, made: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], drawn: Mapping[str, Any] | None
) -> str:
    """Writes table1.json; returns its URI."""
    result = {"made_by": made, "rows": rows, "drawn": drawn, "goals": goals_of(rows), "reported": REPORTED}
    store = open_store(options.output)
    store.put(FILE, (json.dumps(result, indent=2) + "\n").encode())
    return store.uri(FILE)


def rows_of(protocol: Protocol, entrants: Sequence[Entrant]) -> dict[str, dict[str, Any]]:
    """Label → what `row_of` says."""
    return {each.entrant.label: row_of(each) for each in judge_all(protocol, entrants)}


def judge_all(protocol: Protocol, entrants: Sequence[Entrant]) -> list[Judged]:
    """Makes what is missing, and judges it."""
    return judge_made(protocol, entrants, sweep(protocol, entrants))


def judge_made(protocol: Protocol, entrants: Sequence[Entrant], made: Mapping[str, list[Cell]]) -> list[Judged]:
    """Judges what `sweep` made of the protocol's subjects, whatever references it was given of them."""
    judges, gallery, cases = protocol.judges, protocol.judged_against, protocol.cases
    return [
        Judged(entrant=each, cells=made[each.label], values=judge(judges, gallery, cases, made[each.label]))
        for each in entrants
    ]


def row_of(judged: Judged) -> dict[str, Any]:
    """The entrant's method, title, settings and digest, its figures with intervals; where its times were taken, and by
    which code its cells were made."""
    entrant = judged.entrant
    return {
        "method": entrant.method,
        "title": METHODS[entrant.method].title,
        "settings": asdict(entrant.parts.settings.of(entrant.method)),
        "digest": entrant.digest,
        "machines": sorted({cell.machine for cell in judged.cells}),
        "code": sorted({cell.code for cell in judged.cells}),
        **table_row(judged.values),
    }


def table_rows(options: Table1, judged: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """The rows of all, compared with InstantBooth's where they are among them.

    `settings_from` says whether the settings were tuned. `leads` holds, for each of InstantBooth's rows, what its
    figures have more than the row's, and `times_as_fast`; `seconds_ratio` is the row's multiple of InstantBooth's time.
    Times are compared where both were taken on one and the same machine.
    """
    rows = {
        each.entrant.label: row_of(each) | {"settings_from": options.settings_from(each.entrant.method), "leads": {}}
        for each in judged
    }
    for own in (each for each in judged if each.entrant.label in OWN):
        mine, label = rows[own.entrant.label], own.entrant.label
        for each in judged:
            row, lead = rows[each.entrant.label], difference(own.values, each.values)
            if len({*row["machines"], *mine["machines"]}) == 1:
                ratios = {column: row[column]["mean"] / mine[column]["mean"] for column in TIMES}
                lead["times_as_fast"] = ratios["seconds"]
                if label == REFERENCE:
                    row |= {f"{column}_ratio": ratio for column, ratio in ratios.items()}
            row["leads"][label] = lead
    return rows


def made_by(protocol: Protocol, command: str) -> dict[str, Any]:
    """A table's record: command and code, what was evaluated with which models, who judged, how it was sampled."""
    cases, parts, data = protocol.cases, protocol.parts, protocol.photographs.data
    named = {each: getattr(parts.models, each) for each in ("base", "image_encoder", "weights")}
    named["segmenter"] = protocol.photographs.segmenter
    places = {name: locate(place) for name, place in named.items() if place is not None}
    places |= {field_of(name): parts.ip_adapter / parts.settings.of(name).variant for name in PEERS}
    places["ip_adapter_image_encoder"] = locate(parts.ip_adapter_image_encoder)
    places |= {f"judge_{name}": place for name, place in protocol.judging.items()}
    subjects = sha256("".join(case.digest for case in cases).encode()).hexdigest()
    return {
        "command": cli.command_line(f"jobs.evaluate {command}", protocol),
        "code": revision(),
        "protocol": protocol.record() | {"data": data and str(data.absolute()), "subjects": subjects[:DIGEST_LENGTH]},
        "sampling": asdict(parts.sampling),
        "settings": asdict(parts.settings),
        "places": {name: str(place) for name, place in places.items()},
        "digests": {name: folder_digest(place)[:DIGEST_LENGTH] for name, place in places.items()},
    }


def show(rows: Mapping[str, Mapping[str, Any]], drawn: Mapping[str, Any] | None) -> None:
    """Prints the table: means, with half the width of their intervals; where times and settings come from."""
    columns = [column for column in COLUMNS if any(column in row for row in rows.values())]
    table = Table("method", *(COLUMNS[column] for column in columns), *TIMES.values(), "settings")
    for row in rows.values():
        figures = [figure(row[column]) for column in columns]
        times = [_time(row, column) for column in TIMES]
        table.add_row(row["title"], *figures, *times, row["settings_from"])
    if drawn is not None:
        table.add_row(DRAWN, *(figure(drawn[column]) for column in columns))
    console().print(table)
    for words in (machines_in_words(rows), code_in_words(rows)):
        console().print(words, highlight=False, markup=False)


def machines_in_words(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Where the times were taken: one machine, or which row's on which."""
    return _one_or_each(rows, "machines", "Times: {}.", "Times of different machines do not compare: {}.")


def code_in_words(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Which code made the pictures: one revision, or which row's which."""
    return _one_or_each(rows, "code", "Pictures by revision {}.", "Pictures by different revisions: {}.")


def _one_or_each(rows: Mapping[str, Mapping[str, Any]], field: str, one: str, different: str) -> str:
    every = {value for row in rows.values() for value in row[field]}
    if len(every) == 1:
        return one.format(every.pop())
    return different.format("; ".join(f"{row['title']}: {' and '.join(row[field])}" for row in rows.values()))


def console() -> Console:
    """Where tables are printed. A log file has no width of its own, and 80 columns cut the figures."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def figure(interval: Mapping[str, float]) -> str:
    """A mean with half the width of its interval."""
    return f"{interval['mean']:.3f} ± {(interval['high'] - interval['low']) / 2:.3f}"


def _time(row: Mapping[str, Any], column: str) -> str:
    ratio = row.get(f"{column}_ratio")
    return f"{row[column]['mean']:.2f}" + ("" if ratio is None else f" ({ratio:.1f}×)")
