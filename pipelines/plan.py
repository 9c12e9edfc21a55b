"""What a manifest comes to: pictures, each with an id that follows from all that determines it.

A picture is known by the URIs of its references, not by their content: a changed photo needs a new name.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from instantbooth.ledger import digest_of
from instantbooth.manifest import ManifestRow
from instantbooth.model.loading import Precision

ID_BYTES = 16
WORK_ID = re.compile(rf"[0-9a-f]{{{2 * ID_BYTES}}}")
IMAGES = "images"
CONCEPTS = "concepts"
SETTINGS = ("num_inference_steps", "guidance_scale", "adapter_scale", "concept_scale", "negative_prompt", "sampler")
"""What a row may say about sampling; named as in Personalizer.generate."""


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What of the model determines pictures: the weights' content, and the names of the other parts."""

    base: str
    image_encoder: str | None
    weights: str
    """Digest of the trained weights."""
    config: str
    """Digest of their config.json: the defaults of what rows leave out, and the placeholder."""
    patch_layer: int = -1
    """Of the image encoder: what config.json says of concepts."""
    segmenter: str | None = None
    """What finds the subject where no mask is given."""
    image_format: str = "png"
    """Of the pictures: one of images.OUTPUT_FORMATS."""
    precision: Precision = "fp32"
    """In which numbers it computes, concepts included."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One picture of a row."""

    work: str
    """Its id: a digest of subject, prompt, sampling parameters, seed and model."""
    key: str
    """Where the picture is stored, below the output."""
    prompt: str
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
    encoders = (model.base, model.image_encoder, model.weights, model.patch_layer, model.segmenter, model.precision)
    subject = digest_of("concept", *_subject(row), *encoders)
    return f"{CONCEPTS}/{subject}.safetensors"


class Settled:
    """Works that have a record, in 16 bytes each."""

    def __init__(self, works: Iterable[str]) -> None:
        """`works` are ids as `digest_of` makes them; anything else is left out."""
        known = bytearray()
        for work in works:
            if WORK_ID.fullmatch(work):
                known += bytes.fromhex(work)
        self._works = np.sort(np.frombuffer(known, dtype=f"S{ID_BYTES}"))

    def __contains__(self, work: str) -> bool:
        wanted = np.frombuffer(bytes.fromhex(work), dtype=self._works.dtype)
        place = int(np.searchsorted(self._works, wanted)[0])
        return place < len(self._works) and bool(self._works[place] == wanted[0])


@dataclass(frozen=True, kw_only=True)
class Task:
    """A row with what is still to be made of it."""

    row: ManifestRow
    missing: tuple[int, ...]
    """Which of its pieces."""


def packed(tasks: Iterable[Task], size: int) -> Iterator[bytes]:
    """Tasks in chunks of `size`, compressed: a manifest of any length is carried so, at some 200 bytes a row."""
    lines: list[str] = []
    for task in tasks:
        lines.append(json.dumps([json.loads(task.row.to_json()), task.missing]))
        if len(lines) == size:
            yield zlib.compress("\n".join(lines).encode())
            lines = []
    if lines:
        yield zlib.compress("\n".join(lines).encode())


def unpacked(chunk: bytes) -> Iterator[Task]:
    """The tasks of one chunk."""
    for line in zlib.decompress(chunk).decode().split("\n"):
        row, missing = json.loads(line)
        yield Task(row=ManifestRow(**row), missing=tuple(missing))


def _piece(row: ManifestRow, model: ModelIdentity, prompt: str, index: int, number: int) -> Piece:
    settings = {name: getattr(row, name) for name in SETTINGS}
    seed = _seed(row, prompt, number)
    work = digest_of(row.id, _subject(row), prompt, settings, row.size, seed, row.attempt, vars(model))
    return Piece(
        work=work,
        key=f"{IMAGES}/{row.id}/{index:03d}-{number:02d}-{work[:8]}.{model.image_format}",
        prompt=prompt,
        seed=seed,
    )


def _subject(row: ManifestRow) -> list[object]:
    return [list(row.images), list(row.masks or ()), row.class_noun]


def _seed(row: ManifestRow, prompt: str, number: int) -> int:
    """From the row's id and seed, the prompt and the number, and nothing else: 63 bits."""
    name = json.dumps([row.id, row.seed, prompt, number])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1
