"""What happens to a row between its manifest and its pictures: its references are fetched, its concept is encoded, its
pictures are denoised and committed. Each stage takes what the one before left, and an error stays with its row.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from instantbooth import Concept
from instantbooth.errors import ConceptError, InstantBoothError, MissingObjectError, StorageError, WeightsError
from instantbooth.images import ImageLimits, decode_reference
from instantbooth.ledger import Ledger
from instantbooth.manifest import ManifestRow
from instantbooth.storage import ObjectStore, absolute_uri, open_store, patiently, read_uri
from pipelines.failures import Failure, judged, lacks_device_memory
from pipelines.model import ModelConfig
from pipelines.plan import ModelIdentity, Piece, Task, concept_key, pieces, unpacked

MAX_FILE_BYTES = ImageLimits.max_bytes
READERS = 8
"""Rows whose references a task fetches at once."""
RECENT = 32
"""Concepts that an encoder keeps at hand: rows of one subject stand side by side as a rule."""

log = logging.getLogger("instantbooth.personalize")

# A task has one CPU, and a picture of 50 million pixels takes half a gigabyte to decode: one at a time.
_decoding = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every worker has to know."""

    output: str
    """URI of the output."""
    folder: Path
    """From which a row's relative paths are meant: the driver's working directory, which is no worker's."""
    model: ModelConfig
    identity: ModelIdentity
    """What `model` must turn out to be."""
    concepts: str | None = None
    """URI of an earlier output with concepts."""
    conditional: bool = True
    """Whether the output honours conditional writes."""
    row_budget: int | None = None
    exact: bool = False
    compile: bool = False

    def ledger(self) -> Ledger:
        """The output's ledger."""
        return Ledger(open_store(self.output), conditional=self.conditional)

    def check_weights(self) -> None:
        """Raises WeightsError where the weights are others than when the job started."""
        found = self.model.identity().weights
        if found != self.identity.weights:
            raise WeightsError(
                f"{self.model.weights} changed from {self.identity.weights[:12]} to {found[:12]} while the job "
                "started; write new weights elsewhere, and run the job again"
            )


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


class Actor(ABC):
    """Works on the rows of one stage. What it lacks to start it says of its first batch: had it died instead, Ray would
    tell of a dead actor, and the project's own words would be somewhere in a traceback.
    """

    def __init__(self, stages: StageConfig, device: str) -> None:
        self.model = stages.identity
        self.ledger = stages.ledger()
        self.device = torch.device(device)
        self.fault: InstantBoothError | None = None
        try:
            self.load(stages)
            stages.check_weights()
        except InstantBoothError as error:
            self.fault = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any] | Iterator[dict[str, Any]]:
        if self.fault is not None:
            raise self.fault
        return self.done(batch["work"])

    @abstractmethod
    def load(self, stages: StageConfig) -> None:
        """Gets what the actor works with. Raises WeightsError or ParameterError."""

    @abstractmethod
    def done(self, works: Iterable[Work]) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """What becomes of a batch, as Ray Data takes it."""


class ConceptEncoder(Actor):
    """With the encoders: rows get their concept, and lose their references."""

    def load(self, stages: StageConfig) -> None:
        self.encoder = stages.model.load_encoder(device=str(self.device), precision=self.model.precision)
        self.output = open_store(stages.output)
        self.recent: dict[str, Concept] = {}

    def done(self, works: Iterable[Work]) -> dict[str, Any]:
        items = [work if work.failure or work.concept else self._with_concept(work) for work in works]
        column = np.empty(len(items), dtype=object)
        column[:] = items
        return {"work": column}

    def _with_concept(self, work: Work) -> Work:
        bare = replace(work, references=(), masks=None)
        key, seconds = concept_key(work.row, self.model), work.seconds
        try:
            # Since this row was fetched another one may have come with the same subject, here or at another actor.
            concept = self.recent.pop(key, None) or _known_concept(key, [self.output])
            if concept is None:
                started = time.perf_counter()
                data = self._encoded(work)
                seconds = {**seconds, "encode": time.perf_counter() - started}
                # Where two actors encode one subject, the first concept stored is the one both use.
                concept = Concept.from_bytes(self.ledger.keep(key, data), name=self.output.uri(key))
        except (StorageError, ConceptError) as error:
            # What is kept cannot be had, or is damaged: the row's own pictures are not at fault.
            return replace(bare, failure=Failure.of(error, transient=True))
        except Exception as error:
            # What encoding takes is bounded: another process has the memory.
            return replace(bare, failure=judged(error, self.device, transient=lacks_device_memory(error)))
        self.recent[key] = concept
        if len(self.recent) > RECENT:
            del self.recent[next(iter(self.recent))]
        return replace(bare, concept=concept, seconds=seconds)

    def _encoded(self, work: Work) -> bytes:
        masks = None if work.masks is None else list(work.masks)
        return self.encoder.encode(list(work.references), class_noun=work.row.class_noun, masks=masks).to_bytes()


def _fetch(task: Task, *, stages: StageConfig, stores: list[ObjectStore]) -> Work:
    started = time.perf_counter()
    row_pieces = pieces(task.row, stages.identity)
    work = Work(row=task.row, pieces=tuple(row_pieces[number] for number in task.missing))
    try:
        if (concept := _known_concept(concept_key(work.row, stages.identity), stores)) is not None:
            return replace(work, concept=concept, seconds={"fetch": time.perf_counter() - started})
    except StorageError as error:
        return replace(work, failure=Failure.of(error, transient=True))
    try:
        references = _images(work.row.images, stages.folder)
        masks = None if work.row.masks is None else _images(work.row.masks, stages.folder)
        seconds = {"fetch": time.perf_counter() - started}
        return replace(work, references=references, masks=masks, seconds=seconds)
    except Exception as error:
        return replace(work, failure=Failure.of(error))


def _known_concept(key: str, stores: list[ObjectStore]) -> Concept | None:
    """From the first store that has it whole. StorageError where one cannot be asked."""
    for store in stores:
        try:
            return Concept.from_bytes(patiently(partial(store.get, key)), name=store.uri(key))
        except MissingObjectError:
            continue
        except ConceptError as error:
            log.warning("%s; the subject is encoded anew", error)
    return None


def _images(uris: Iterable[str], folder: Path) -> tuple[Image.Image, ...]:
    return tuple(_image(absolute_uri(uri, folder)) for uri in uris)


def _image(uri: str) -> Image.Image:
    data = patiently(lambda: read_uri(uri, max_bytes=MAX_FILE_BYTES))
    with _decoding:
        return decode_reference(data, name=uri)
