"""What is evaluated: subjects nobody trained on, their references, and the prompts they are pictured by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from PIL import Image

from instantbooth.errors import ParameterError
from instantbooth.evaluation.methods.interface import Reference
from instantbooth.prompts import SUBJECT_FIELD, expand

KINDS = ("background", "style", "composition")
"""The paper's three kinds of prompt: a background changed, a style transferred, a scene composed."""
RECONSTRUCTION = "reconstruction"
"""Pictures of nothing but the subject, by which the paper measures reconstruction."""
RECONSTRUCTIONS = 2
"""Pictures of a subject alone."""
SEEDS_PER_CASE = 1000


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a picture is asked for."""

    kind: str
    """One of KINDS, or RECONSTRUCTION."""
    text: str
    """Holds "{subject}" once."""
    wanted: Mapping[str, str] = field(default_factory=dict)
    """The attributes that the text names, where a judge knows attributes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A subject with its references and prompts."""

    name: str
    number: int
    """Seeds follow from it."""
    class_noun: str
    references: tuple[Reference, ...]
    prompts: tuple[Prompt, ...]
    known: tuple[Image.Image, ...] = ()
    """Pictures of it, whether methods are given them or not, that generated ones are compared with."""

    def __post_init__(self) -> None:
        if not self.references or not self.prompts:
            raise ParameterError(
                f"subject {self.name} has {len(self.references)} references and {len(self.prompts)} prompts; "
                "at least one of each is needed"
            )
        for prompt in self.prompts:
            expand(prompt.text, self.class_noun)

    @property
    def texts(self) -> list[str]:
        """The prompts' texts."""
        return [prompt.text for prompt in self.prompts]

    @property
    def seeds(self) -> list[int]:
        """One for each prompt; the same for every method."""
        return [self.number * SEEDS_PER_CASE + n for n in range(len(self.prompts))]

    @property
    def plain_texts(self) -> list[str]:
        """The prompts as a judge reads them: the class noun in the subject's place."""
        return [text.replace(SUBJECT_FIELD, self.class_noun) for text in self.texts]

    @property
    def compared(self) -> tuple[Image.Image, ...]:
        """What generated pictures are compared with: the references where no others are known."""
        return self.known or tuple(each.image for each in self.references)

    @property
    def digest(self) -> str:
        """Names all that a method is given of the case."""
        words = [self.number, self.class_noun, self.texts]
        content = sha256(json.dumps(words).encode())
        for reference in self.references:
            content.update(reference.image.tobytes())
            content.update(b"" if reference.mask is None else reference.mask.tobytes())
        return content.hexdigest()


def reconstruction_prompts() -> list[Prompt]:
    """The subject alone, again and again: only the seed differs."""
    return [Prompt(kind=RECONSTRUCTION, text=f"a photo of a {SUBJECT_FIELD}")] * RECONSTRUCTIONS


def check_count(name: str, value: int, least: int) -> None:
    """ParameterError where a count is below what an evaluation needs."""
    if value < least:
        raise ParameterError(f"{name} must be at least {least}, is {value}; raise it")
