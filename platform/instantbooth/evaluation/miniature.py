"""The miniature world's own examination: held-out prompts, held-out identities, judges with held-out figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from instantbooth import Concept, Personalizer
from instantbooth.evaluation.judges import AttributeJudge, IdentityJudge
from instantbooth.evaluation.methods.interface import Sampling
from instantbooth.evaluation.methods.sampling import encode_prompts, sample
from instantbooth.evaluation.metrics import identification_top1, nearest_identity, prompt_accuracy
from instantbooth.miniature.corpus import class_noun_of, identity_of, subject_seed
from instantbooth.miniature.world import Picture, Scene, caption_of, render
from instantbooth.presets import preset
from instantbooth.prompts import SUBJECT_FIELD

NAMED_SHARE = 0.7
"""Each attribute but the style is named by this share of the prompts."""
BARS = {
    "base_prompt_accuracy": 0.90,
    "identification_top1": 0.60,
    "prompt_accuracy": 0.80,
    "attribute_judge_accuracy": 0.97,
    "identity_judge_auc": 0.98,
}
"""Figures a shipped miniature must reach."""
SCALES: dict[str, Sequence[float]] = {
    "adapter_scale": (0.8, 1.2, 1.4),
    "concept_scale": (0.8, 1.2),
}
"""The method's sampling parameters, chosen on validation identities in this order, and the values tried. Guidance is
not among them: it is the base's, and the same for all methods that are compared."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A held-out identity, its reference pictures (with the renderer's masks), and prompts to judge by."""

    class_noun: str
    references: list[Picture]
    prompts: list[str]
    """With "{subject}"."""
    wanted: list[dict[str, str]]
    """The attributes each prompt names, for the judge."""


def judges_of(base: str) -> Path | None:
    """The judges beside a miniature's base, preset or folder; None for any other: judges know their own world alone.

    Raises WeightsError for an unknown preset.
    """
    folder = Path(base if Path(base).is_dir() else preset(base).base).absolute().parent / "judges"
    return folder if folder.is_dir() else None


def draw_subjects(split: str, count: int, *, references: int = 5, prompts: int = 4) -> list[Subject]:
    """Identities 0 … count − 1 of a split, photographed in random scenes, with random prompts."""
    return [_draw_subject(subject_seed(split, number), references, prompts) for number in range(count)]


def _draw_subject(seed: int, references: int, prompts: int) -> Subject:
    rng = np.random.default_rng([seed, 2])
    identity, noun = identity_of(seed), class_noun_of(seed)
    photos = [render(identity, replace(Scene.sample(rng), style="photo")) for _ in range(references)]
    named = [_draw_named(rng) for _ in range(prompts)]
    wanted = [{"subject": noun} | told(each) for each in named]
    return Subject(
        class_noun=noun,
        references=photos,
        prompts=[caption_of(each, SUBJECT_FIELD) for each in named],
        wanted=wanted,
    )


def _draw_named(rng: np.random.Generator) -> dict[str, str]:
    scene = Scene.sample(rng).attributes()
    return {name: value for name, value in scene.items() if name == "style" or rng.random() < NAMED_SHARE}


def told(attributes: dict[str, str]) -> dict[str, str]:
    """Only what the caption says in words: the usual ("no hat", "in the centre") stays unsaid."""
    silent = caption_of({}, "x")
    return {name: value for name, value in attributes.items() if caption_of({name: value}, "x") != silent}


def generate_unpersonalized(booth: Personalizer, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """The frozen base alone, with the weights' default sampler, steps and guidance."""
    defaults = booth.defaults
    sampling = Sampling(
        sampler=defaults.sampler,
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
    )
    with torch.inference_mode():
        prompt_embeds = encode_prompts(booth.base, prompts)
    return sample(booth.base, prompt_embeds, seeds, sampling)


class Examination:
    """Generates for a set of subjects and judges what comes out."""

    def __init__(self, booth: Personalizer, judges: Path, subjects: list[Subject]) -> None:
        """`judges` holds attributes/ and identity/."""
        self.booth = booth
        self.attributes = AttributeJudge.load(judges / "attributes", device=booth.base.device)
        self.identity = IdentityJudge.load(judges / "identity", device=booth.base.device)
        self.subjects = subjects
        galleries = [self.identity.embed([p.image for p in subject.references]) for subject in subjects]
        self.gallery = torch.stack(galleries)
        self.prompts = [prompt for subject in subjects for prompt in subject.prompts]
        self.wanted = [wanted for subject in subjects for wanted in subject.wanted]
        self.owners = torch.tensor([n for n, subject in enumerate(subjects) for _ in subject.prompts])

    def concepts(self, references: int) -> list[Concept]:
        """One for each subject, of its first pictures and the renderer's masks."""
        return [
            self.booth.encode(
                [p.image for p in subject.references[:references]],
                subject.class_noun,
                [p.mask for p in subject.references[:references]],
            )
            for subject in self.subjects
        ]

    def personalized(
        self,
        concepts: list[Concept],
        *,
        adapter_scale: float | None = None,
        concept_scale: float | None = None,
    ) -> list[Image.Image]:
        """A picture for every prompt, prompt n with seed n."""
        return self.booth.generate(
            self.prompts,
            [concepts[owner] for owner in self.owners.tolist()],
            adapter_scale=adapter_scale,
            concept_scale=concept_scale,
            seed=list(range(len(self.prompts))),
        )

    def unpersonalized(self) -> list[Image.Image]:
        """The base's pictures for the same prompts and seeds, the noun in the subject's place."""
        nouns = [self.subjects[owner].class_noun for owner in self.owners.tolist()]
        prompts = [p.replace(SUBJECT_FIELD, noun) for p, noun in zip(self.prompts, nouns, strict=True)]
        return generate_unpersonalized(self.booth, prompts, range(len(prompts)))

    def prompt_accuracy(self, images: list[Image.Image]) -> float:
        """Share of the named attributes that the judge sees."""
        return prompt_accuracy(self.attributes, images, self.wanted)

    def identification_top1(self, images: list[Image.Image]) -> float:
        """Share of pictures nearest to their own subject's reference gallery."""
        return identification_top1(self.identity.embed(images), self.owners, self.gallery)

    def identification_by_noun(self, images: list[Image.Image]) -> dict[str, float]:
        """The same among the pictures of each class noun; the gallery stays whole."""
        hits = nearest_identity(self.identity.embed(images), self.gallery) == self.owners
        nouns = [self.subjects[owner].class_noun for owner in self.owners.tolist()]
        return {
            noun: float(hits[torch.tensor([each == noun for each in nouns])].float().mean())
            for noun in sorted(set(nouns))
        }

    def similarity(self, images: list[Image.Image]) -> float:
        """Mean cosine between a picture and its subject's references, by the identity judge."""
        embedded = self.identity.embed(images)
        own: Tensor = torch.einsum("nd,nrd->nr", embedded, self.gallery[self.owners])
        return float(own.mean())


def examine(exam: Examination) -> tuple[dict[str, float], list[Image.Image]]:
    """The figures behind BARS, the same with one reference picture, and the pictures made with five.

    identification_top1 is told of persons and cats apart as well.
    """
    figures = {"base_prompt_accuracy": exam.prompt_accuracy(exam.unpersonalized())}
    pictures = {}
    for references, suffix in ((5, ""), (1, "_one_reference")):
        images = pictures[references] = exam.personalized(exam.concepts(references))
        figures[f"identification_top1{suffix}"] = exam.identification_top1(images)
        by_noun = exam.identification_by_noun(images)
        figures |= {f"identification_top1_{noun}{suffix}": share for noun, share in by_noun.items()}
        figures[f"identity_similarity{suffix}"] = exam.similarity(images)
        figures[f"prompt_accuracy{suffix}"] = exam.prompt_accuracy(images)
    return figures, pictures[5]


def choose_scales(
    exam: Examination,
    *,
    prompt_accuracy_floor: float = 0.84,
    report: Callable[[dict[str, float]], None] = lambda row: None,
) -> dict[str, float]:
    """The scales of the best identification among those that keep the prompt accuracy; for validation subjects.

    They start at the weights' defaults; each in turn is then set to the best of its values, the others as chosen so
    far. Where none keeps the accuracy, the one with the highest counts.
    """
    concepts = exam.concepts(5)

    def tried(scales: Mapping[str, float]) -> dict[str, float]:
        images = exam.personalized(concepts, **scales)
        row = {
            **scales,
            "identification_top1": exam.identification_top1(images),
            "identity_similarity": exam.similarity(images),
            "prompt_accuracy": exam.prompt_accuracy(images),
        }
        report(row)
        return row

    def best(rows: Sequence[dict[str, float]]) -> dict[str, float]:
        kept = [row for row in rows if row["prompt_accuracy"] >= prompt_accuracy_floor]
        if not kept:
            return max(rows, key=lambda row: row["prompt_accuracy"])
        return max(kept, key=lambda row: (row["identification_top1"], row["identity_similarity"]))

    chosen = tried({name: getattr(exam.booth.defaults, name) for name in SCALES})
    for name, values in SCALES.items():
        scales = {each: chosen[each] for each in SCALES}
        chosen = best([chosen, *(tried(scales | {name: value}) for value in values if value != chosen[name])])
    return chosen
