"""A manifest becomes pictures: fetch references → encode concepts → generate → write.

Output: `images/<row id>/<prompt>-<n>.png`, each with its provenance inside; `succeeded.jsonl` and `failed.jsonl`, one
record a row of the manifest. A row that fails costs itself alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import ray.data
from PIL import Image

from instantbooth import Concept, Personalizer
from instantbooth.errors import InstantBoothError, ManifestError, ParameterError
from instantbooth.images import decode_image, encode_png
from instantbooth.manifest import ManifestRow, check_manifest, read_manifest
from instantbooth.storage import ObjectStore, open_store, read_uri
from pipelines.model import ModelConfig

SUCCEEDED = "succeeded.jsonl"
FAILED = "failed.jsonl"
IMAGES = "images"
MAX_FILE_BYTES = 20_000_000
MAX_REFERENCE_SIDE = 1024
"""Encoders look at 224 px around the subject: larger references are scaled down once, where they are decoded."""
SETTINGS = ("num_inference_steps", "guidance_scale", "adapter_scale", "concept_scale", "negative_prompt")


@dataclass(frozen=True, kw_only=True)
class PersonalizeConfig:
    """What is generated, with what, and where it goes."""

    manifest: str
    """URI of the manifest."""
    output: str
    """URI of the folder for pictures and records; a new one for each run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Base model and weights."""
    encoders: int = 1
    """Actors that encode concepts."""
    generators: int = 2
    """Actors that generate pictures."""
    rows_per_batch: int = 8
    """Rows of the manifest that one actor works on together."""
    images_per_call: int = 32
    """Pictures, of whichever subjects, that are denoised together."""
    gpus_per_actor: float = 0.0
    """GPUs each actor claims; with 0 it computes on the CPU."""

    def __post_init__(self) -> None:
        for name in ("encoders", "generators", "rows_per_batch", "images_per_call"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} must be at least 1, is {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class PersonalizeReport:
    """Counts of a run."""

    rows: int
    images: int
    failed: int
    """Rows without pictures."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A row on its way; once `error` is set, later stages hand it on untouched."""

    row: ManifestRow
    error: str | None = None
    references: tuple[Image.Image, ...] = ()
    masks: tuple[Image.Image, ...] | None = None
    concept: Concept | None = None
    pictures: tuple[Image.Image, ...] = ()
    """In the order of `requests(row)`."""
    weights: str = ""
    """Digest of the weights that made the pictures."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture of a row."""

    prompt: str
    prompt_index: int
    number: int
    """Which of the prompt's pictures, from 0."""
    seed: int


def personalize(config: PersonalizeConfig) -> PersonalizeReport:
    """Generates every picture of the manifest.

    Raises ManifestError, before anything is generated, with every fault of a malformed manifest; StorageError where it
    cannot be read or the output cannot be written.
    """
    rows = load_manifest(config.manifest)
    store = open_store(config.output)
    works = (
        ray.data.from_items([{"work": Work(row=row)} for row in rows], override_num_blocks=len(rows))
        .map(fetch_references)
        .map_batches(
            ConceptEncoder,
            fn_constructor_args=(config,),
            batch_size=config.rows_per_batch,
            compute=ray.data.ActorPoolStrategy(size=config.encoders),
            num_gpus=config.gpus_per_actor,
        )
        .map_batches(
            ImageGenerator,
            fn_constructor_args=(config,),
            batch_size=config.rows_per_batch,
            compute=ray.data.ActorPoolStrategy(size=config.generators),
            num_gpus=config.gpus_per_actor,
        )
        .map(partial(write_pictures, store=store))
    )
    return _write_records(works.iter_rows(), [row.id for row in rows], store)


def load_manifest(uri: str) -> list[ManifestRow]:
    """The manifest's rows. Raises ManifestError with every fault of every row."""
    data = read_uri(uri)
    if faults := check_manifest(data):
        raise ManifestError("\n".join(faults))
    return list(read_manifest(data))


def requests(row: ManifestRow) -> list[Request]:
    """The row's pictures. Each seed follows from the row's id and seed, the prompt and the number, and nothing else."""
    return [
        Request(prompt=prompt, prompt_index=index, number=number, seed=_seed(row, prompt, number))
        for index, prompt in enumerate(row.prompts)
        for number in range(row.num_images_per_prompt)
    ]


def picture_key(row_id: str, prompt_index: int, number: int) -> str:
    """Where a picture is stored, below the output folder."""
    return f"{IMAGES}/{row_id}/{prompt_index:03d}-{number:02d}.png"


def fetch_references(item: dict[str, Work]) -> dict[str, Work]:
    """Reads and decodes a row's reference images and masks."""
    work = item["work"]
    try:
        references = tuple(_fetch(uri) for uri in work.row.images)
        masks = None if work.row.masks is None else tuple(_fetch(uri) for uri in work.row.masks)
        return {"work": replace(work, references=references, masks=masks)}
    except InstantBoothError as error:
        return {"work": replace(work, error=str(error))}


class ConceptEncoder:
    """An actor with the encoders: rows get their concept, and lose their references."""

    def __init__(self, config: PersonalizeConfig) -> None:
        self.booth = _load(config)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _column(work if work.error else self._encode(work) for work in batch["work"])

    def _encode(self, work: Work) -> Work:
        try:
            masks = None if work.masks is None else list(work.masks)
            concept = self.booth.encode(list(work.references), class_noun=work.row.class_noun, masks=masks)
            return replace(work, concept=concept, references=(), masks=None)
        except InstantBoothError as error:
            return replace(work, error=str(error), references=(), masks=None)


class ImageGenerator:
    """An actor with the whole model: pictures of different subjects share one forward pass."""

    def __init__(self, config: PersonalizeConfig) -> None:
        self.booth = _load(config)
        self.weights = self.booth.weights_digest
        self.images_per_call = config.images_per_call

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        works = [work for work in batch["work"] if not work.error]
        try:
            done = self._generate(works)
        except InstantBoothError:
            # One row's fault (a prompt that is too long, say) fails its whole batch: find it by running each row alone.
            done = [self._generate_alone(work) for work in works]
        return _column([*done, *(work for work in batch["work"] if work.error)])

    def _generate_alone(self, work: Work) -> Work:
        try:
            return self._generate([work])[0]
        except InstantBoothError as error:
            return replace(work, error=str(error), concept=None)

    def _generate(self, works: Sequence[Work]) -> list[Work]:
        wanted = [(work, request) for work in works for request in requests(work.row)]
        images: list[Image.Image] = []
        for start in range(0, len(wanted), self.images_per_call):
            rows = wanted[start : start + self.images_per_call]
            images += self.booth.generate(
                [request.prompt for _, request in rows],
                [work.concept for work, _ in rows],
                seed=[request.seed for _, request in rows],
                **{name: [getattr(work.row, name) for work, _ in rows] for name in SETTINGS},
            )
        pictures = iter(images)
        return [
            replace(work, pictures=tuple(islice(pictures, len(requests(work.row)))), weights=self.weights)
            for work in works
        ]


def write_pictures(item: dict[str, Work], *, store: ObjectStore) -> dict[str, Any]:
    """Stores a row's pictures, each with its provenance; returns the row's record as JSON."""
    work, row = item["work"], item["work"].row
    record: dict[str, Any] = {"id": row.id, "class_noun": row.class_noun, "metadata": dict(row.metadata)}
    if work.error or work.concept is None:
        return {"id": row.id, "images": 0, "record": json.dumps(record | {"error": work.error})}
    images = []
    for request, picture in zip(requests(row), work.pictures, strict=True):
        key = picture_key(row.id, request.prompt_index, request.number)
        provenance = {
            "prompt": request.prompt,
            "class_noun": row.class_noun,
            "seed": str(request.seed),
            "weights": work.weights,
            "concept": work.concept.digest,
        }
        store.put(key, encode_png(picture, provenance))
        images.append({"key": key, "prompt": request.prompt, "seed": request.seed})
    record |= {"weights": work.weights, "concept": work.concept.digest, "images": images}
    return {"id": row.id, "images": len(images), "record": json.dumps(record)}


def _load(config: PersonalizeConfig) -> Personalizer:
    return config.model.load(device="cuda" if config.gpus_per_actor else "cpu")


def _fetch(uri: str) -> Image.Image:
    image = decode_image(read_uri(uri, max_bytes=MAX_FILE_BYTES), name=uri)
    image.thumbnail((MAX_REFERENCE_SIDE, MAX_REFERENCE_SIDE))
    return image


def _seed(row: ManifestRow, prompt: str, number: int) -> int:
    name = json.dumps([row.id, row.seed, prompt, number])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1


def _column(works: Iterable[Work]) -> dict[str, Any]:
    items = list(works)
    column = np.empty(len(items), dtype=object)
    column[:] = items
    return {"work": column}


def _write_records(results: Iterable[dict[str, Any]], order: list[str], store: ObjectStore) -> PersonalizeReport:
    by_id = {result["id"]: result for result in results}
    succeeded = [by_id[row_id]["record"] for row_id in order if by_id[row_id]["images"]]
    failed = [by_id[row_id]["record"] for row_id in order if not by_id[row_id]["images"]]
    for key, records in ((SUCCEEDED, succeeded), (FAILED, failed)):
        store.put(key, "".join(f"{record}\n" for record in records).encode())
    images = sum(result["images"] for result in by_id.values())
    return PersonalizeReport(rows=len(order), images=images, failed=len(failed))
