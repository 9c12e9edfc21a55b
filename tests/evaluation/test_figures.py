"""Figures tell good pictures from bad ones: rendered ones that do what a prompt asks, and others that do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from instantbooth.errors import ParameterError, WeightsError
from instantbooth.evaluation.cases import RECONSTRUCTION, Case
from instantbooth.evaluation.cells import Cell, Seconds
from instantbooth.evaluation.figures import (
    COLUMNS,
    Gallery,
    Judges,
    Value,
    difference,
    judge,
    judge_pictures,
    ranked,
    table_row,
)
from instantbooth.evaluation.judges import AttributeJudge, IdentityJudge
from instantbooth.evaluation.miniature_cases import draw_asked, draw_cases
from instantbooth.miniature.corpus import identity_of, subject_seed
from instantbooth.miniature.world import Scene, render
from instantbooth.presets import miniature_folder

SUBJECTS = 4


@pytest.fixture(scope="module")
def judges() -> Judges:
    folder = miniature_folder()
    return Judges.load(
        folder / "clip",
        IdentityJudge.load(folder / "judges" / "identity"),
        attributes=AttributeJudge.load(folder / "judges" / "attributes"),
    )


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return draw_cases("validation", SUBJECTS, references=3)


def drawn(case: Case, *, identity: int, obedient: bool = True) -> Cell:
    """A cell as a perfect method would make it, or one that pictures somebody else, or that does not listen."""
    who = identity_of(subject_seed("validation", identity))
    pictures: list[Image.Image] = []
    for prompt in case.prompts:
        wanted = {name: value for name, value in prompt.wanted.items() if name != "subject"}
        scene = replace(Scene(clothing="red"), **wanted) if obedient else Scene(clothing="white", background="moon")
        pictures.append(render(who, scene).image)
    return Cell(seconds=Seconds(fit=1.0, first=2.0, rest=4.0), pictures=tuple(pictures), machine="an abacus", code="v1")


def test_perfect_pictures_have_perfect_figures_and_strangers_are_told_apart(judges: Judges, cases: list[Case]) -> None:
    gallery = Gallery(judges.identity, cases)
    right = table_row(judge(judges, gallery, cases, [drawn(case, identity=case.number) for case in cases]))
    # Subjects alternate between persons and cats: the next but one is of the same class.
    strangers = [drawn(case, identity=(case.number + 2) % SUBJECTS) for case in cases]
    wrong = table_row(judge(judges, gallery, cases, strangers))
    deaf = table_row(
        judge(judges, gallery, cases, [drawn(each, identity=each.number, obedient=False) for each in cases])
    )
    columns = set(COLUMNS) - {"dino"}
    assert columns < set(right), "DINO is for photographs"
    assert right["prompt_accuracy"]["mean"] > 0.97
    assert right["identification"]["mean"] > 0.9
    assert wrong["identification"]["mean"] < 0.1
    assert right["face_distance"]["mean"] < wrong["face_distance"]["mean"]
    assert right["face_similarity"]["mean"] > wrong["face_similarity"]["mean"]
    assert deaf["prompt_accuracy"]["mean"] < 0.7
    assert deaf["alignment"]["mean"] < right["alignment"]["mean"]
    assert (right["seconds"]["mean"], right["seconds_all"]["mean"], right["seconds_fit"]["mean"]) == (3.0, 7.0, 1.0)
    for column in columns:
        assert right[column]["low"] <= right[column]["mean"] <= right[column]["high"]
    assert set(right["by_kind"]) == {"background", "style", "composition"}


def test_subjects_drawn_as_their_prompts_ask_are_what_a_perfect_method_makes(judges: Judges, cases: list[Case]) -> None:
    pictures = [draw_asked("validation", case) for case in cases]
    row = table_row(judge_pictures(judges, Gallery(judges.identity, cases), cases, pictures))
    assert row["prompt_accuracy"]["mean"] > 0.97
    assert row["identification"]["mean"] > 0.9
    assert "seconds" not in row
    assert [len(own) for own in pictures] == [len(case.prompts) for case in cases]
    assert pictures[0][0].tobytes() == draw_asked("validation", cases[0])[0].tobytes()


def test_reconstruction_is_judged_on_pictures_of_the_subject_alone(judges: Judges, cases: list[Case]) -> None:
    gallery = Gallery(judges.identity, cases)
    cells = [drawn(case, identity=case.number) for case in cases]
    values = judge(judges, gallery, cases, cells)
    assert {each.kind for each in values if each.column == "reconstruction"} == {RECONSTRUCTION}
    assert RECONSTRUCTION not in {each.kind for each in values if each.column != "reconstruction"}


def test_figures_need_a_gallery_and_judges(judges: Judges, cases: list[Case], tmp_path: Path) -> None:
    cells = [drawn(case, identity=case.number) for case in cases]
    with pytest.raises(ParameterError, match="a gallery of 1"):
        judge(judges, Gallery(judges.identity, cases[:1]), cases, cells)
    with pytest.raises(WeightsError, match="holds no whole CLIP"):
        Judges.load(tmp_path, judges.identity)


def test_every_subject_counts_once_however_many_figures_there_are_of_it() -> None:
    def row(*counts: int) -> dict[str, Any]:
        return table_row(
            [
                Value(column="prompt_accuracy", case=case, kind="style", value=case % 2)
                for case, count in enumerate(counts)
                for _ in range(count)
            ]
        )

    assert row(1, 20, 3, 7, 9) == row(1, 1, 1, 1, 1)
    assert row(1, 20, 3, 7, 9)["by_kind"]["style"]["prompt_accuracy"]["mean"] == pytest.approx(0.4)


def test_a_difference_is_taken_subject_by_subject() -> None:
    def values(shift: float, cases: int = 30) -> list[Value]:
        # Subjects differ far more than methods do.
        return [Value(column="alignment", case=n, kind="style", value=n + shift + 0.01 * (n % 3)) for n in range(cases)]

    found = difference(values(0.1), values(0.0))["alignment"]
    assert found["mean"] == pytest.approx(0.1)
    assert 0.09 < found["low"] <= found["high"] < 0.11
    assert [case for case, _ in ranked(values(0.0, 4), "alignment")] == [3, 2, 1, 0]
    with pytest.raises(ParameterError, match="judge the same"):
        difference(values(0.1), values(0.0, cases=2))
