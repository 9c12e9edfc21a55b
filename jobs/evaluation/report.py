"""The evaluation as a page: table, frontier, and the methods' pictures side by side, chosen by rule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instantbooth.evaluation.cases import Case
from instantbooth.evaluation.figures import COLUMNS, TIMES, ranked
from instantbooth.prompts import SUBJECT_FIELD
from instantbooth.storage import ObjectStore, open_store
from instantbooth.tracking import open_run
from jobs import cli
from jobs.evaluation import ablations
from jobs.evaluation.frontier import PLOT
from jobs.evaluation.table1 import FILE as TABLE
from jobs.evaluation.table1 import REFERENCE, REPORTED, Judged, Table1, judge_all, made_by, table_rows
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
    tracking_uri: str | None = None
    """MLflow, such as sqlite:///mlflow.db: figures and page go to a run; nowhere if not given."""


def report(options: cli.Flat[Report]) -> None:
    """Writes report.html, from the cells of table1 and what frontier and ablations made, where they have been run."""
    options.check(options.methods)
    judged = judge_all(options, options.entrants)
    rows = table_rows(judged)
    store = open_store(options.output)
    made, best = made_by(options, "report"), best_of(rows)
    page = render(
        "evaluation.html.j2",
        rows=rows,
        columns={column: title for column, title in COLUMNS.items() if column in best},
        reported=REPORTED,
        times=TIMES,
        best=best,
        made_by=made,
        plot=store.get(PLOT).decode() if store.exists(PLOT) else None,
        ablations=_ablations(store),
        ranked_by=rows[ranking_method(options.methods)]["title"],
        cases=_shown(options, judged),
        settings=json.dumps({name: [row["settings"], row["digest"]] for name, row in rows.items()}, indent=2),
    )
    store.put(PAGE, page.encode())
    store.put(TABLE, (json.dumps({"made_by": made, "rows": rows}, indent=2) + "\n").encode())
    if options.tracking_uri is not None:
        _track(options, rows, page)
    print(store.uri(PAGE))


def _ablations(store: ObjectStore) -> dict[str, Any] | None:
    """Headings and rows of the ablations' table."""
    if not store.exists(ablations.FILE):
        return None
    found = json.loads(store.get(ablations.FILE))
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
    cases = options.cases()
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


def _track(options: Report, rows: Mapping[str, Mapping[str, Any]], page: str) -> None:
    """One run for the output: every mean and bound as a metric, the page as an artifact."""
    run = open_run(str(options.tracking_uri), options.output)
    figures = {
        f"{label}.{column}.{bound}": value
        for label, row in rows.items()
        for column in (*COLUMNS, *TIMES)
        for bound, value in row.get(column, {}).items()
    }
    run.log_steps({0: figures})
    run.keep({PAGE: page.encode()})
    run.end("FINISHED")
