"""The evaluation as a page: table, frontier, and the methods' pictures side by side, chosen by rule."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import sha256
from typing import Any

from instantbooth.errors import ParameterError
from instantbooth.evaluation.cases import Case
from instantbooth.evaluation.figures import COLUMNS, TIMES, ranked
from instantbooth.evaluation.methods.registry import METHODS
from instantbooth.presets import tracking_uri
from instantbooth.prompts import SUBJECT_FIELD
from instantbooth.storage import open_store
from instantbooth.tracking import TrackedRun, absolute_tracking_uri, open_run, reporting
from jobs import cli
from jobs.evaluation import ablations, frontier, references
from jobs.evaluation.found import Found, look, named_rows
from jobs.evaluation.goals import REFERENCE, goals_of
from jobs.evaluation.sweep import DIGEST_LENGTH, missing
from jobs.evaluation.table1 import (
    DRAWN,
    REPORTED,
    Judged,
    Table1,
    code_in_words,
    judge_all,
    machines_in_words,
    made_by,
    table_rows,
    write_table,
)
from jobs.tracked import flat
from pipelines.page import render, thumbnail_uri

PAGE = "report.html"
RANKED_BY = "face_similarity"
THUMBNAIL = 96
LOWER_IS_BETTER = ("face_distance",)


@dataclass(frozen=True, kw_only=True)
class Report(Table1):
    """The table's own options, so that its cells are found again."""

    shown: int = 2
    """Best, and as many worst, subjects whose pictures are shown, beside the middle one."""
    tracking_uri: str = field(default_factory=tracking_uri)
    """MLflow: figures, record and page go to a run there. By default MLFLOW_TRACKING_URI."""

    @property
    def table(self) -> Table1:
        """The table's options alone."""
        return Table1(**{each.name: getattr(self, each.name) for each in fields(Table1)})


def report(options: cli.Flat[Report]) -> None:
    """Writes report.html from the cells of table1, and what frontier, references and ablations left beside them.

    What those made with other subjects, models or sampling is left out, and the page says so. table1.json is written
    anew, of what the page shows. ParameterError where table1 is not finished.
    """
    options.check(options.methods)
    entrants = options.entrants
    if lacking := missing(options, entrants):
        raise ParameterError(
            f"{len(lacking)} of {len(entrants) * options.identities} cells are not made yet, such as "
            f"{METHODS[lacking[0][0].method].title}'s; run jobs.evaluate table1 with the same options first"
        )
    made = made_by(options, "report") | {"methods": {each.label: each.digest for each in entrants}}
    run = _run_of(options, made)
    judged = judge_all(options, entrants)
    rows, drawn = table_rows(options, judged), options.drawn_row()
    command = cli.command_line("jobs.evaluate table1", options.table)
    write_table(options, made_by(options, "table1") | {"command": command}, rows, drawn)
    store = open_store(options.output)
    found = look(store, made)
    plot = drawing(store.get(frontier.PLOT).decode()) if frontier.FILE in found.files else None
    page = page_of(options, judged, rows, drawn, made, found, plot)
    store.put(PAGE, page.encode())
    print(store.uri(PAGE), *found.left_out, sep="\n")
    _track(run, {"table1": rows} | {file: dict(named_rows(file, each)) for file, each in found.files.items()}, page)


def page_of(
    options: Report,
    judged: Sequence[Judged],
    rows: Mapping[str, Mapping[str, Any]],
    drawn: Mapping[str, Any] | None,
    made: Mapping[str, Any],
    found: Found,
    plot: str | None,
) -> str:
    """The page; `plot` is an SVG element."""
    best = best_of(rows)
    return render(
        "evaluation.html.j2",
        rows=rows,
        drawn=drawn,
        drawn_title=DRAWN,
        columns={column: title for column, title in COLUMNS.items() if column in best},
        reported={name: row for name, row in REPORTED.items() if name in rows},
        reported_columns={column: COLUMNS[column] for column in _reported() if column in best},
        times=TIMES,
        machines=machines_in_words(rows),
        code=code_in_words(rows),
        goals={**goals_of(rows), **found.files.get(frontier.FILE, {}).get("goals", {})},
        best=best,
        made_by=made,
        left_out=found.left_out,
        plot=plot,
        grid=_grid(found),
        references=_references(found),
        ablations=_ablations(found),
        ranked_by=rows[ranking_method(options.methods)]["title"],
        cases=_shown(options, judged),
        record=json.dumps(made, indent=2),
    )


def drawing(svg: str) -> str:
    """An SVG file as an element of a page: without what stands before it, which names places elsewhere."""
    return svg[svg.index("<svg") :]


def _reported() -> Iterable[str]:
    return dict.fromkeys(column for row in REPORTED.values() for column in row)


def _shown_columns(rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str]) -> dict[str, str]:
    return {column: title for column, title in headings.items() if any(column in row for row in rows)}


def _grid(found: Found) -> dict[str, Any] | None:
    """Headings and rows of the strengths' table."""
    if frontier.FILE not in found.files:
        return None
    rows = found.files[frontier.FILE]["series"]["grid"]
    return {"columns": _shown_columns(rows, COLUMNS), "rows": rows}


def _references(found: Found) -> dict[str, Any] | None:
    """Headings and rows of the references' table."""
    if references.FILE not in found.files:
        return None
    made, counts = (found.files[references.FILE][part] for part in ("made_by", "rows"))
    rows = [row | {"count": count} for count, methods in counts.items() for row in methods.values()]
    rows.sort(key=lambda row: str(row["title"]))
    return {
        "columns": _shown_columns(rows, {**COLUMNS, "seconds_picture": "Seconds a picture ↓"}),
        "rows": rows,
        "made_by": made,
    }


def _ablations(files: Found) -> dict[str, Any] | None:
    """Headings and rows of the ablations' table."""
    if ablations.FILE not in files.files:
        return None
    found = files.files[ablations.FILE]
    return {
        "made_by": found["made_by"],
        "columns": {column: COLUMNS[column] for column in ablations.SHOWN},
        "reported": {column: COLUMNS[column] for column in ablations.REPORTED},
        "rows": [
            row | {"beside": {column: ablations.beside(row, column) for column in ablations.REPORTED}}
            for row in found["rows"].values()
        ],
    }


def best_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Column → the label with the best mean."""
    best = {}
    for column in COLUMNS:
        means = {label: row[column]["mean"] for label, row in rows.items() if column in row}
        if means:
            best[column] = (min if column in LOWER_IS_BETTER else max)(means, key=lambda label: means[label])
    return best


def ranking_method(methods: Sequence[str]) -> str:
    """The method whose figures order the subjects."""
    return REFERENCE if REFERENCE in methods else methods[-1]


def chosen(order: Sequence[tuple[int, float]], shown: int) -> list[tuple[str, int, float]]:
    """(rank in words, subject, score) of the first, the middle and the last of an order, nobody twice."""
    top, rest = order[:shown], order[shown:]
    bottom = rest[max(0, len(rest) - shown) :]
    middle = [each for each in order[len(order) // 2 :][:1] if each not in (*top, *bottom)]
    return [(word, *each) for word, found in (("best", top), ("middle", middle), ("worst", bottom)) for each in found]


def _shown(options: Report, judged: Sequence[Judged]) -> list[dict[str, Any]]:
    ranking = next(each for each in judged if each.entrant.label == ranking_method(options.methods))
    cases = options.cases
    places = chosen(ranked(ranking.values, RANKED_BY), options.shown)
    return [
        _case(word, cases[number], score, [each.cells[number].pictures for each in judged])
        for word, number, score in places
    ]


def _case(word: str, case: Case, score: float, pictures: Sequence[Sequence[Any]]) -> dict[str, Any]:
    lines = [
        {
            "prompt": prompt.text.replace(SUBJECT_FIELD, f"… {case.class_noun}"),
            "images": [thumbnail_uri(own[n], THUMBNAIL) for own in pictures],
        }
        for n, prompt in enumerate(case.prompts)
    ]
    references = [thumbnail_uri(each.image, THUMBNAIL) for each in case.references]
    return {"rank": word, "name": case.name, "score": score, "references": references, "lines": lines}


def _run_of(options: Report, made: Mapping[str, Any]) -> TrackedRun:
    """One run for each record, which is logged as its parameters. Opened first: a page that cannot be is told early."""
    uri, digest = absolute_tracking_uri(options.tracking_uri), sha256(json.dumps(made).encode()).hexdigest()
    folder = open_store(options.output).uri(PAGE).rpartition("/")[0]
    dropped = len(made["protocol"].get("dropped", ()))
    with reporting(uri):
        run = open_run(uri, f"{folder}@{digest[:DIGEST_LENGTH]}")
        run.log_parameters(flat({**made, "protocol": made["protocol"] | {"dropped": dropped}}))
    return run


def _track(run: TrackedRun, tables: Mapping[str, Mapping[str, Mapping[str, Any]]], page: str) -> None:
    """Every mean and bound as a metric, the page as an artifact."""
    figures = {
        f"{table.removesuffix('.json')}.{name}.{column}.{bound}": value
        for table, rows in tables.items()
        for name, row in rows.items()
        for column in (*COLUMNS, *TIMES)
        for bound, value in row.get(column, {}).items()
    }
    with reporting(run.tracking_uri):
        run.log_steps({0: figures})
        run.keep({PAGE: page.encode()})
        run.end("FINISHED")
