"""What is evaluated: prompts of three kinds that a judge can check, and nothing unusable."""

from dataclasses import replace

import numpy as np
import pytest

from instantbooth.errors import ParameterError, PromptError
from instantbooth.evaluation.cases import KINDS, RECONSTRUCTION, Case, Prompt
from instantbooth.evaluation.miniature import draw_subjects
from instantbooth.evaluation.miniature_cases import draw_cases


def test_a_case_has_prompts_of_every_kind_that_say_what_is_wanted() -> None:
    cases = draw_cases("validation", 4, references=2, prompts_per_kind=3)
    for case in cases:
        counts = {kind: sum(prompt.kind == kind for prompt in case.prompts) for kind in (*KINDS, RECONSTRUCTION)}
        assert counts == {"background": 3, "style": 3, "composition": 3, RECONSTRUCTION: 2}
        for prompt in case.prompts:
            styled = prompt.wanted.get("style", "photo") != "photo"
            assert styled == (prompt.kind == "style")
            assert ("headwear" in prompt.wanted) == (prompt.kind == "composition")
            assert prompt.kind == RECONSTRUCTION or prompt.wanted["subject"] == case.class_noun
    assert {case.class_noun for case in cases} == {"person", "cat"}
    assert len({seed for case in cases for seed in case.seeds}) == 4 * 11


def test_cases_show_the_subjects_of_the_examination_and_are_the_same_every_time() -> None:
    cases, again = draw_cases("validation", 2), draw_cases("validation", 2)
    assert [case.digest for case in cases] == [case.digest for case in again]
    for case, subject in zip(cases, draw_subjects("validation", 2), strict=True):
        photos = [np.asarray(picture.image) for picture in subject.references]
        assert np.array_equal([np.asarray(each.image) for each in case.references], photos)


def test_a_digest_tells_references_and_prompts_apart() -> None:
    case, other = draw_cases("validation", 2)
    assert case.digest != replace(case, references=other.references).digest
    assert case.digest != replace(case, references=case.references[:2]).digest
    assert case.digest != replace(case, prompts=case.prompts[1:]).digest


def test_unusable_cases_are_refused() -> None:
    case = draw_cases("validation", 1)[0]
    with pytest.raises(PromptError, match="names no subject"):
        replace(case, prompts=(Prompt(kind="style", text="a watercolor of a cat"),))
    with pytest.raises(ParameterError, match="person-000 has 0 references"):
        Case(name="person-000", number=0, class_noun="person", references=(), prompts=case.prompts)
    with pytest.raises(ParameterError, match="identities must be at least 1, is 0"):
        draw_cases("validation", 0)
