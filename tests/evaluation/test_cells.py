"""What is kept of an evaluation: whole cells, found again by all that they depend on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from instantbooth import Personalizer
from instantbooth.errors import StorageError
from instantbooth.evaluation.cells import RECORD, Cells, evaluate
from instantbooth.evaluation.methods.interface import Sampling
from instantbooth.evaluation.methods.personalizer import InstantBooth
from instantbooth.evaluation.miniature_cases import draw_cases
from instantbooth.storage import open_store


def test_a_cell_is_there_when_it_is_whole_and_holds_what_was_made(booth: Personalizer, tmp_path: Path) -> None:
    case = draw_cases("validation", 1, references=1, prompts_per_kind=1)[0]
    method = InstantBooth(booth, Sampling(num_inference_steps=1), masked=True)
    cell = evaluate(method, case, machine="an abacus", code="v1")
    assert len(cell.pictures) == len(case.prompts) == 5
    together = method.generate(method.fit(case.references, case.class_noun), case.texts, case.seeds)
    # The first was sampled alone, for its time: company changes no more than rounding.
    assert np.abs(np.asarray(cell.pictures[0], int) - np.asarray(together[0], int)).max() <= 1
    assert cell.seconds.fit > 0
    assert cell.seconds.all_pictures > cell.seconds.first_picture > cell.seconds.fit

    cells = Cells(store=open_store(str(tmp_path)), method="instantbooth", digest="abc")
    assert not cells.has(case)
    cells.write(case, cell)
    assert cells.has(case)
    back = cells.read(case)
    assert (back.seconds, back.machine, back.code) == (cell.seconds, "an abacus", "v1")
    assert all(np.array_equal(a, b) for a, b in zip(back.pictures, cell.pictures, strict=True))
    assert not cells.has(replace(case, prompts=case.prompts[:2]))
    assert not replace(cells, digest="abd").has(case)

    next(tmp_path.rglob("000.png")).write_bytes(b"no picture")
    with pytest.raises(StorageError, match="is damaged"):
        cells.read(case)
    next(tmp_path.rglob(RECORD)).unlink()
    assert not cells.has(case)
