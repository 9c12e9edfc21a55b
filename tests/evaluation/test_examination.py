"""The miniature's examination as it is called: figures on stdout, and an exit status that tells of a missed bar."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instantbooth.evaluation.miniature import BARS
from jobs.evaluate import MiniatureExamination, miniature

FEW = 3


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
