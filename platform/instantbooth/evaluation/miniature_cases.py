"""The miniature's held-out identities as cases: the paper's three kinds of prompt, with what a judge must see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from instantbooth.evaluation.cases import KINDS, Case, Prompt, check_count, reconstruction_prompts
from instantbooth.evaluation.methods.interface import Reference
from instantbooth.evaluation.miniature import draw_subjects, told
from instantbooth.miniature.corpus import identity_of, subject_seed
from instantbooth.miniature.scene import ATTRIBUTES, UNSAID, Scene, caption_of
from instantbooth.miniature.world import render
from instantbooth.prompts import SUBJECT_FIELD

STYLES = tuple(style for style in ATTRIBUTES["style"] if style != "photo")
HATS = tuple(hat for hat in ATTRIBUTES["headwear"] if hat != "none")


def draw_cases(split: str, count: int, *, references: int = 5, prompts_per_kind: int = 2) -> list[Case]:
    """Identities 0 … count − 1 of a split, with their photos and masks, and prompts of every kind.

    The photos are those of `draw_subjects`. Raises ParameterError for counts below 1.
    """
    for name, value in (("identities", count), ("references", references), ("prompts_per_kind", prompts_per_kind)):
        check_count(name, value, 1)
    cases = []
    for number, subject in enumerate(draw_subjects(split, count, references=references, prompts=0)):
        rng = np.random.default_rng([subject_seed(split, number), 3])
        prompts = [_draw_prompt(kind, subject.class_noun, rng) for kind in KINDS for _ in range(prompts_per_kind)]
        cases.append(
            Case(
                name=f"{subject.class_noun}-{number:03d}",
                number=number,
                class_noun=subject.class_noun,
                references=tuple(Reference(image=each.image, mask=each.mask) for each in subject.references),
                prompts=(*prompts, *reconstruction_prompts()),
            )
        )
    return cases


def draw_asked(split: str, case: Case) -> list[Image.Image]:
    """A subject of `draw_cases` as its prompts ask for it, drawn by the renderer: what a perfect method would make."""
    seed = subject_seed(split, case.number)
    identity, rng = identity_of(seed), np.random.default_rng([seed, 4])
    pictures = []
    for prompt in case.prompts:
        asked: dict[str, Any] = {"style": "photo", **UNSAID, **prompt.wanted}
        asked.pop("subject", None)
        pictures.append(render(identity, replace(Scene.sample(rng), **asked)).image)
    return pictures


def _draw_prompt(kind: str, noun: str, rng: np.random.Generator) -> Prompt:
    style = str(rng.choice(STYLES)) if kind == "style" else "photo"
    named = {"style": style, "background": str(rng.choice(ATTRIBUTES["background"]))}
    if kind == "composition":
        named["clothing"] = str(rng.choice(ATTRIBUTES["clothing"]))
        named["headwear"] = str(rng.choice(HATS))
        named["action"] = str(rng.choice(ATTRIBUTES["action"]))
    return Prompt(kind=kind, text=caption_of(named, SUBJECT_FIELD), wanted={"subject": noun} | told(named))
