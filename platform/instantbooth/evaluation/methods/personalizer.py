"""The paper's own method, with the references as they are or their backgrounds masked out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from PIL import Image

from instantbooth import Concept, Personalizer
from instantbooth.errors import ParameterError
from instantbooth.evaluation.methods.interface import Method, Reference, Sampling
from instantbooth.parameters import check_range


@dataclass(frozen=True, kw_only=True)
class InstantBoothConfig:
    """What trades identity against language; where nothing is said, as the weights have it."""

    adapter_scale: float | None = None
    """β, strength of the patch features."""
    concept_scale: float | None = None
    """α, factor on the concept embedding."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if (value := getattr(self, each.name)) is not None:
                check_range(each.name, value)


class InstantBooth(Method[Concept]):
    """A subject is a concept: nothing is optimised for it."""

    def __init__(
        self, booth: Personalizer, sampling: Sampling, config: InstantBoothConfig | None = None, *, masked: bool
    ) -> None:
        """`masked` is the paper's "InstantBooth + M": inputs masked at test time too, as in training."""
        self.booth = booth
        self.sampling = sampling
        self.config = config or InstantBoothConfig()
        self.masked = masked

    def fit(self, references: Sequence[Reference], class_noun: str) -> Concept:
        """Encodes the references. ParameterError where masks are wanted and one has none."""
        images = [reference.image for reference in references]
        if not self.masked:
            return self.booth.encode(images, class_noun, masked=False)
        masks = [reference.mask for reference in references if reference.mask is not None]
        if len(masks) < len(images):
            raise ParameterError(
                f"{len(images) - len(masks)} of {len(images)} references have no mask; give all, or masked=False"
            )
        return self.booth.encode(images, class_noun, masks)

    def generate(self, subject: Concept, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Pictures of prompts in which the concept stands for the subject."""
        return self.booth.generate(
            list(prompts),
            subject,
            seed=list(seeds),
            adapter_scale=self.config.adapter_scale,
            concept_scale=self.config.concept_scale,
            sampler=self.sampling.sampler,
            num_inference_steps=self.sampling.num_inference_steps,
            guidance_scale=self.sampling.guidance_scale,
        )
