"""The miniature's examination as it is called: figures on stdout, and an exit status that tells of a missed bar."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instantbooth import Personalizer
from instantbooth.evaluation.miniature import BARS, Examination, draw_subjects
from instantbooth.presets import miniature_folder
from jobs.evaluate import MiniatureExamination, miniature

FEW = 3


def test_persons_and_cats_are_identified_apart(booth: Personalizer) -> None:
    exam = Examination(booth, miniature_folder() / "judges", draw_subjects("validation", 8, prompts=2))
    owners = [exam.subjects[owner] for owner in exam.owners.tolist()]
    # Cats are shown as they are, all four persons as the first of them.
    shown = [owner if owner.class_noun == "cat" else exam.subjects[0] for owner in owners]
    images = [subject.references[0].image for subject in shown]
    assert exam.identification_by_noun(images) == {"cat": 1, "person": 0.25}
    assert exam.identification_top1(images) == 0.625


@pytest.mark.full
@pytest.mark.parametrize("bar", [0.0, 1.01], ids=["met", "missed"])
def test_the_exit_status_tells_whether_every_bar_is_met(
    bar: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in BARS:
        monkeypatch.setitem(BARS, name, bar)
    with pytest.raises(SystemExit) as ended:
        miniature(MiniatureExamination(identities=FEW, split="validation", output=tmp_path))
    printed = json.loads(capsys.readouterr().out)
    compared = {"five references better than one"} & set(printed["missed"])
    five, one = (printed["figures"][f"identification_top1{suffix}"] for suffix in ("", "_one_reference"))
    assert bool(compared) == (five <= one)
    assert set(printed["missed"]) - compared == (set(BARS) if bar else set())
    assert ended.value.code == (1 if printed["missed"] else 0)
    assert (printed["split"], printed["identities"]) == ("validation", FEW)
    assert set(BARS) <= set(printed["figures"])
    assert (tmp_path / "miniature.png").stat().st_size > 0
    assert json.loads((tmp_path / "miniature.json").read_text()) == printed
