"""The paper's ablations (its Table 3): the method with one thing changed, all else and the budget the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from instantbooth import Personalizer
from instantbooth.config import GenerationDefaults
from instantbooth.evaluation.methods.textual_inversion import embedded
from instantbooth.model.base import BaseModel
from instantbooth.model.subjects import SubjectEncoder
from instantbooth.training.adapters import AdapterObjective, AdapterTrainingConfig
from instantbooth.training.attention import write_out_attention

FULL = "full"
AGREES = "agrees"
NO_CHANGE = 0.02
"""A change of alignment or reconstruction so small is none."""


class InjectedBefore(Personalizer):
    """V̂ is replaced before the text encoder, which reads the concept as a word among words."""

    def prompt_embeds(self, input_ids: Tensor, positions: Tensor, concept_embeddings: Tensor) -> Tensor:
        """As the method's own, but that f_c stands for V̂'s token embedding."""
        with embedded(self.base.text_encoder, positions, concept_embeddings):
            return self.base.encode_text(input_ids)


class GlobalOnly(Personalizer):
    """The adapters are fed the global feature alone: each image's f_c in place of its patch features."""

    def __init__(self, base: BaseModel, subject_encoder: SubjectEncoder, defaults: GenerationDefaults) -> None:
        super().__init__(base, subject_encoder, defaults)
        self.trained.encoders.register_forward_hook(_without_patches)


def _without_patches(encoders: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    concept_embeddings, _ = output
    return concept_embeddings, concept_embeddings[:, None]


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A row: what differs from the method, and what the paper reports of it."""

    title: str
    alignment: float
    """As reported, for persons on real photographs."""
    reconstruction: float
    personalizer: type[Personalizer] = Personalizer
    """Another way to use what is trained."""
    masked: bool = True
    """Whether the backgrounds of training's references are masked out."""
    adapters: bool = True
    """Whether adapters are trained; else their gates stay closed, and the concept embedding is all there is."""
    tuned: Literal["unet", "image_encoder"] | None = None
    """What is trained beside the method's own parts."""
    references: int | None = None
    """How many pictures of a subject it is given; all that there are where nothing is said."""

    @property
    def training(self) -> tuple[object, ...]:
        """All by which its training differs from the others': rows that agree in it share one."""
        return self.personalizer.__name__, self.masked, self.adapters, self.tuned


ABLATIONS: Mapping[str, Ablation] = {
    FULL: Ablation(title="InstantBooth", alignment=0.3140, reconstruction=0.7329),
    "no-mask": Ablation(title="without training mask", alignment=0.3127, reconstruction=0.7485, masked=False),
    "global-only": Ablation(
        title="global feature only", alignment=0.3269, reconstruction=0.6494, personalizer=GlobalOnly
    ),
    "no-adapter": Ablation(title="no adapter", alignment=0.3242, reconstruction=0.5468, adapters=False),
    "before-text-encoder": Ablation(
        title="V̂ before the text encoder", alignment=0.3127, reconstruction=0.7495, personalizer=InjectedBefore
    ),
    "image-encoder-tuned": Ablation(
        title="image encoder tuned", alignment=0.3266, reconstruction=0.6425, tuned="image_encoder"
    ),
    "unet-tuned": Ablation(title="U-Net tuned", alignment=0.3142, reconstruction=0.7265, tuned="unet"),
    "one-image": Ablation(title="one test image", alignment=0.3140, reconstruction=0.7261, references=1),
}
"""In the paper's order, the method itself first."""


def ablated_objective(
    booth: Personalizer, config: AdapterTrainingConfig, ablation: Ablation
) -> tuple[AdapterObjective, list[nn.Parameter]]:
    """The method's objective with the row's parameters open or closed; those that are tuned besides."""
    objective = AdapterObjective(booth, config)
    if not ablation.adapters:
        for unused in (objective.trained.adapters, objective.trained.encoders.patch):
            unused.requires_grad_(False)
    if ablation.tuned is None:
        return objective, []
    part = tuned_part(booth, ablation.tuned)
    write_out_attention(booth.base.unet, booth.image_encoder.tower)
    tuned = [parameter for parameter in part.parameters() if not parameter.requires_grad]
    part.requires_grad_(True)
    # The loop trains what the objective holds.
    objective.add_module("tuned", part)
    return objective, tuned


def tuned_part(booth: Personalizer, name: Literal["unet", "image_encoder"]) -> nn.Module:
    """The module that such a row trains beside the method's own."""
    part: nn.Module = booth.base.unet if name == "unet" else booth.image_encoder.tower
    return part


def verdict(reported: float, seen: Mapping[str, float]) -> str:
    """Whether a change against the full method goes the paper's way: AGREES, or in a few words how it does not.

    `reported` is the paper's change, `seen` has mean, low and high of ours, subject by subject: only a change whose
    interval leaves out 0 has a direction. Where the paper saw none, ours must be surely less than NO_CHANGE.
    """
    if reported == 0 and max(-seen["low"], seen["high"]) < NO_CHANGE:
        return AGREES
    if seen["low"] <= 0 <= seen["high"]:
        return "no clear change"
    if reported * seen["mean"] > 0:
        return AGREES
    return "higher here" if seen["mean"] > 0 else "lower here"
