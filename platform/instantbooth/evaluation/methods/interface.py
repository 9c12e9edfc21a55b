"""What every method of personalization offers to the evaluation.

A new method is one file, and its entry and settings in registry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from PIL import Image

Subject = TypeVar("Subject")
"""What a method makes of the references: a concept, an embedding, finetuned weights …"""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A picture of the subject."""

    image: Image.Image
    mask: Image.Image | None = None
    """"L", of the image's size, 255 where the subject is; None where nobody knows."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are sampled; one for all methods that are compared."""

    sampler: str = "dpmsolver++"
    """One of instantbooth.parameters.SAMPLERS."""
    num_inference_steps: int = 25
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance, against the empty prompt."""


class Method(ABC, Generic[Subject]):
    """A way to personalize. Holds its models and settings, and nothing of any subject."""

    def prepare(self, class_noun: str) -> None:
        """Does what is done once for a class, whoever its subjects are; not part of a subject's time."""

    @abstractmethod
    def fit(self, references: Sequence[Reference], class_noun: str) -> Subject:
        """Learns the subject. Raises InputError for references that cannot be used."""

    @abstractmethod
    def generate(self, subject: Subject, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One picture for each prompt, which holds "{subject}" once, and its seed.

        The initial noise of a seed is `unit_noise` of it, in every method. Raises PromptError.
        """
