"""What happens to a row between its manifest and its pictures: its references are fetched, its concept is encoded, its
pictures are denoised and committed. Each stage takes what the one before left, and an error stays with its row.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import ray
from PIL import Image

from instantbooth import Concept
from instantbooth.engine import Engine, EngineConfig, Ticket
from instantbooth.errors import EngineError, MissingObjectError, StorageError, WeightsError
from instantbooth.images import decode_image, encode_image
from instantbooth.ledger import Ledger
from instantbooth.manifest import ManifestRow
from instantbooth.storage import ObjectStore, open_store, patiently, read_uri
from pipelines.model import ModelConfig
from pipelines.plan import SETTINGS, ModelIdentity, Piece, Task, concept_key, pieces, unpacked

MAX_FILE_BYTES = 20_000_000
MAX_REFERENCE_SIDE = 1024
"""Encoders look at 224 px around the subject: larger references are scaled down once, where they are decoded."""
READERS = 8
"""Rows whose references a task fetches at once."""
WRITERS = 8
"""Pictures that an actor stores at once."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every worker has to know."""

    output: str
    """URI of the output."""
    model: ModelConfig
    identity: ModelIdentity
    """What `model` must turn out to be."""
    concepts: str | None = None
    """URI of an earlier output with concepts."""
    conditional: bool = True
    """Whether the output honours conditional writes."""
    row_budget: int | None = None
    exact: bool = False

    def ledger(self) -> Ledger:
        """The output's ledger."""
        return Ledger(open_store(self.output), conditional=self.conditional)

    def engine(self) -> EngineConfig:
        """How pictures are denoised."""
        exact = {"texts_apart": True, "decode_batch": 1, "buckets": (max(1, (self.row_budget or 1) // 2),)}
        return EngineConfig(row_budget=self.row_budget, max_requests=1_000_000, **(exact if self.exact else {}))


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a row, or one of its pictures, cannot be made."""

    code: str
    """The error's name: image, missing_object, prompt, …"""
    message: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The failure behind an error."""
        words = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()
        return cls(code=words, message=str(error))


@dataclass(frozen=True, kw_only=True)
class Work:
    """A row on its way; once `failure` is set, later stages hand it on untouched."""

    row: ManifestRow
    pieces: tuple[Piece, ...]
    """The pictures that are still to be made."""
    failure: Failure | None = None
    references: tuple[Image.Image, ...] = ()
    masks: tuple[Image.Image, ...] | None = None
    concept: Concept | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage → time it took for the row."""


def fetch_references(item: Mapping[str, bytes], *, stages: StageConfig) -> Iterator[dict[str, Work]]:
    """The rows of a chunk, each with its concept where it is known, else its decoded reference images and masks."""
    stores = [open_store(uri) for uri in (stages.output, stages.concepts) if uri is not None]
    with ThreadPoolExecutor(READERS) as readers:
        for work in readers.map(partial(_fetch, stages=stages, stores=stores), unpacked(item["chunk"])):
            yield {"work": work}


class ConceptEncoder:
    """An actor with the encoders: rows get their concept, and lose their references."""

    def __init__(self, stages: StageConfig, device: str) -> None:
        self.encoder = stages.model.load_encoder(device=device)
        _check_weights(stages.model.identity().weights, stages)
        self.model = stages.identity
        self.ledger = stages.ledger()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _column(work if work.failure or work.concept else self._encode(work) for work in batch["work"])

    def _encode(self, work: Work) -> Work:
        started = time.perf_counter()
        bare = replace(work, references=(), masks=None)
        try:
            masks = None if work.masks is None else list(work.masks)
            concept = self.encoder.encode(list(work.references), class_noun=work.row.class_noun, masks=masks)
            seconds = {**work.seconds, "encode": time.perf_counter() - started}
            # Where two actors encode one subject, the first concept stored is the one both use.
            key = concept_key(work.row, self.model)
            kept = Concept.from_bytes(self.ledger.keep(key, concept.to_bytes()), name=key)
            return replace(bare, concept=kept, seconds=seconds)
        except Exception as error:
            return replace(bare, failure=Failure.of(error))


class ImageGenerator:
    """An actor with the whole model and an engine: pictures of different subjects share every forward pass."""

    def __init__(self, stages: StageConfig, device: str) -> None:
        self.booth = stages.model.load(device=device)
        _check_weights(self.booth.weights_digest, stages)
        self.model = stages.identity
        self.ledger = stages.ledger()
        self.engine = Engine(self.booth, stages.engine())
        self.writers = ThreadPoolExecutor(WRITERS)
        self.node = ray.get_runtime_context().get_node_id()

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A row's id; how many of its pictures succeeded, failed, or are open; and the first failure."""
        begun = [(work, [self._begin(work, piece) for piece in work.pieces]) for work in batch["work"]]
        for work, futures in begun:
            outcomes = [future.result() for future in futures]
            statuses = [status for status, _ in outcomes]
            failure = next((failure for _, failure in outcomes if failure is not None), None)
            yield {
                "id": [work.row.id],
                **{name: [statuses.count(name)] for name in ("succeeded", "failed", "open")},
                "code": [failure.code if failure else ""],
                "error": [failure.message if failure else ""],
            }

    def _begin(self, work: Work, piece: Piece) -> Future[tuple[str, Failure | None]]:
        """Lets the picture be made; its record's status, or "open" where the store fails for good."""
        if work.concept is None:
            assert work.failure is not None
            return self.writers.submit(self._fail, piece, work.failure)
        try:
            request = self.booth.requests(
                piece.prompt,
                work.concept,
                seed=piece.seed,
                height=work.row.height,
                width=work.row.width,
                **{name: getattr(work.row, name) for name in SETTINGS},
            )[0]
        except Exception as error:
            return self.writers.submit(self._fail, piece, Failure.of(error))
        return self.writers.submit(self._finish, work, work.concept, piece, self.engine.submit(request))

    def _finish(self, work: Work, concept: Concept, piece: Piece, ticket: Ticket) -> tuple[str, Failure | None]:
        try:
            picture = ticket.result()
        except Exception as error:
            # A broken engine says nothing about this picture: the job stops, and goes on when run again.
            if isinstance(error, EngineError) and not self.engine.alive:
                raise
            return self._fail(piece, Failure.of(error))
        started = time.perf_counter()
        provenance = {
            "prompt": piece.prompt,
            "class_noun": work.row.class_noun,
            "seed": str(piece.seed),
            "weights": self.model.weights,
            "concept": concept.digest,
            "work": piece.work,
        }
        data = encode_image(picture, provenance, image_format=self.model.image_format)
        seconds = {stage: each / len(work.pieces) for stage, each in work.seconds.items()}
        seconds |= {"denoise": ticket.denoise_seconds, "decode": ticket.decode_seconds}
        seconds["pack"] = time.perf_counter() - started
        rounded = {stage: round(each, 5) for stage, each in seconds.items()}
        details = {**provenance, "node": self.node, "seconds": rounded}
        return self._committed(lambda: self.ledger.succeed(piece.work, piece.key, data, details).status), None

    def _fail(self, piece: Piece, failure: Failure) -> tuple[str, Failure | None]:
        details = {"prompt": piece.prompt, "code": failure.code, "error": failure.message, "node": self.node}
        return self._committed(lambda: self.ledger.fail(piece.work, details).status), failure

    def _committed(self, commit: Callable[[], str]) -> str:
        try:
            return commit()
        except StorageError:
            return "open"


def _fetch(task: Task, *, stages: StageConfig, stores: list[ObjectStore]) -> Work:
    started = time.perf_counter()
    row_pieces = pieces(task.row, stages.identity)
    work = Work(row=task.row, pieces=tuple(row_pieces[number] for number in task.missing))
    try:
        if (concept := _known_concept(concept_key(work.row, stages.identity), stores)) is not None:
            return replace(work, concept=concept, seconds={"fetch": time.perf_counter() - started})
        references = tuple(_image(uri) for uri in work.row.images)
        masks = None if work.row.masks is None else tuple(_image(uri) for uri in work.row.masks)
        seconds = {"fetch": time.perf_counter() - started}
        return replace(work, references=references, masks=masks, seconds=seconds)
    except Exception as error:
        return replace(work, failure=Failure.of(error))


def _known_concept(key: str, stores: list[ObjectStore]) -> Concept | None:
    for store in stores:
        try:
            return Concept.from_bytes(patiently(partial(store.get, key)), name=key)
        except MissingObjectError:
            continue
    return None


def _image(uri: str) -> Image.Image:
    data = patiently(lambda: read_uri(uri, max_bytes=MAX_FILE_BYTES))
    image = decode_image(data, name=uri)
    image.thumbnail((MAX_REFERENCE_SIDE, MAX_REFERENCE_SIDE))
    return image


def _check_weights(found: str, stages: StageConfig) -> None:
    """Raises WeightsError where the weights' name has come to mean others than when the job started."""
    if found != stages.identity.weights:
        raise WeightsError(
            f"{stages.model.weights} changed from {stages.identity.weights[:12]} to {found[:12]} while the job "
            "started; name a version, not an alias, and run the job again"
        )


def _column(works: Iterable[Work]) -> dict[str, Any]:
    items = list(works)
    column = np.empty(len(items), dtype=object)
    column[:] = items
    return {"work": column}
