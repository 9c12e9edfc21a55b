"""What is kept of an evaluation: one cell for each method and subject, whole or not there.

    cells/<method>/<digest>/<case>/000.png …    the pictures, prompt by prompt
    cells/<method>/<digest>/<case>/cell.json    written last: the times it took, on which machine, by which code

The digest names the method's models and settings, and the case's name ends on one of its references and prompts: where
anything is changed that pictures depend on, other cells are looked for.
"""

from __future__ import annotations

import io
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image

from instantbooth.errors import StorageError
from instantbooth.evaluation.cases import Case
from instantbooth.evaluation.methods.interface import Method
from instantbooth.images import encode_png
from instantbooth.storage import ObjectStore

RECORD = "cell.json"


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Wall time of a cell, models loaded and the class prepared."""

    fit: float
    """From references to subject: tuning, or encoding."""
    first: float
    """Sampling one picture alone."""
    rest: float
    """Sampling the others, together."""

    @property
    def first_picture(self) -> float:
        """End to end for a subject of whom one picture is wanted."""
        return self.fit + self.first

    @property
    def all_pictures(self) -> float:
        """End to end for all of the subject's pictures."""
        return self.fit + self.first + self.rest


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one method made of one subject."""

    seconds: Seconds
    pictures: tuple[Image.Image, ...]
    """One for each prompt."""
    machine: str
    """What made it, by which its times are to be read."""
    code: str
    """The revision that made it; the digest does not name it."""


def evaluate(method: Method[Any], case: Case, *, machine: str, code: str) -> Cell:
    """Fits the subject and pictures it by all prompts, on the clock; the class is prepared before that."""
    method.prepare(case.class_noun)
    references, texts, seeds = case.references, case.texts, case.seeds
    start = _now()
    subject = method.fit(references, case.class_noun)
    fitted = _now()
    pictures = method.generate(subject, texts[:1], seeds[:1])
    first = _now()
    if len(texts) > 1:
        pictures += method.generate(subject, texts[1:], seeds[1:])
    seconds = Seconds(fit=fitted - start, first=first - fitted, rest=_now() - first)
    return Cell(seconds=seconds, pictures=tuple(pictures), machine=machine, code=code)


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of one method under one digest."""

    store: ObjectStore
    method: str
    digest: str
    """Of the method's models, settings and sampling."""

    def write(self, case: Case, cell: Cell) -> None:
        """Keeps a cell. StorageError where it cannot be written."""
        for number, picture in enumerate(cell.pictures):
            self.store.put(self._key(case, f"{number:03d}.png"), encode_png(picture, {"prompt": case.texts[number]}))
        made = {"machine": cell.machine, "code": cell.code}
        record = {"seconds": asdict(cell.seconds), "pictures": len(cell.pictures), **made}
        self.store.put(self._key(case, RECORD), (json.dumps(record, indent=2) + "\n").encode())

    def has(self, case: Case) -> bool:
        """Whether the case is finished."""
        return self.store.exists(self._key(case, RECORD))

    def read(self, case: Case) -> Cell:
        """A finished cell. StorageError where it is missing or damaged."""
        try:
            record = json.loads(self.store.get(self._key(case, RECORD)))
            data = [self.store.get(self._key(case, f"{n:03d}.png")) for n in range(record["pictures"])]
            pictures = tuple(Image.open(io.BytesIO(each)).convert("RGB") for each in data)
            made = {name: record[name] for name in ("machine", "code")}
            return Cell(seconds=Seconds(**record["seconds"]), pictures=pictures, **made)
        except (OSError, ValueError, KeyError, TypeError) as error:
            place = self.store.uri(self._key(case, RECORD))
            raise StorageError(f"{place} is damaged ({error}); delete its folder and run the same command") from error

    def _key(self, case: Case, file: str) -> str:
        return f"cells/{self.method}/{self.digest}/{case.name}-{case.digest[:8]}/{file}"


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
