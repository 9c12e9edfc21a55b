"""What a manifest comes to: pictures, each with an id that follows from all that determines it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from instantbooth.ledger import work_id
from instantbooth.manifest import ManifestRow

IMAGES = "images"
CONCEPTS = "concepts"
SETTINGS = ("num_inference_steps", "guidance_scale", "adapter_scale", "concept_scale", "negative_prompt", "sampler")
"""What a row may say about sampling; named as in Personalizer.generate."""


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What of the model determines pictures."""

    base: str
    image_encoder: str | None
    weights: str
    """Digest of the trained weights."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One picture of a row."""

    work: str
    """Its id: a digest of subject, prompt, sampling parameters, seed and model."""
    key: str
    """Where the picture is stored, below the output."""
    prompt: str
    prompt_index: int
    number: int
    """Which of the prompt's pictures, from 0."""
    seed: int


def pieces(row: ManifestRow, model: ModelIdentity) -> list[Piece]:
    """The row's pictures."""
    return [
        _piece(row, model, prompt, index, number)
        for index, prompt in enumerate(row.prompts)
        for number in range(row.num_images_per_prompt)
    ]


def concept_key(row: ManifestRow, model: ModelIdentity) -> str:
    """Where the row's concept is stored; rows with the same pictures of one subject share it."""
    subject = work_id("concept", *_subject(row), model.base, model.image_encoder, model.weights)
    return f"{CONCEPTS}/{subject}.safetensors"


def job_id(works: Sequence[str]) -> str:
    """One id for all of a job's work, in its order."""
    return work_id("job", list(works))


def _piece(row: ManifestRow, model: ModelIdentity, prompt: str, index: int, number: int) -> Piece:
    settings = {name: getattr(row, name) for name in SETTINGS}
    seed = _seed(row, prompt, number)
    work = work_id(row.id, _subject(row), prompt, settings, row.size, seed, row.attempt, vars(model))
    return Piece(
        work=work,
        key=f"{IMAGES}/{row.id}/{index:03d}-{number:02d}-{work[:8]}.png",
        prompt=prompt,
        prompt_index=index,
        number=number,
        seed=seed,
    )


def _subject(row: ManifestRow) -> list[object]:
    return [list(row.images), list(row.masks or ()), row.class_noun]


def _seed(row: ManifestRow, prompt: str, number: int) -> int:
    """From the row's id and seed, the prompt and the number, and nothing else: 63 bits."""
    name = json.dumps([row.id, row.seed, prompt, number])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1
