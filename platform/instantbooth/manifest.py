"""Manifests: rows of work, one JSON object a line.

    {"id": "ada", "images": ["s3://in/ada/1.jpg"], "class_noun": "person", "prompts": ["a photo of a {subject}"]}

Nothing is guessed: an unknown field, a field given twice or a value out of range makes a row bad, and every fault is
reported as `line N: field: rule, value, fix`.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from instantbooth.errors import ManifestError, StorageError, did_you_mean
from instantbooth.parameters import range_fault
from instantbooth.storage import check_uri

ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
MAX_IMAGES = 16
SUBJECT = "{subject}"


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """One subject and the pictures wanted of it. None means the default that comes with the weights.

    Lists are taken for tuples. Raises ManifestError with every fault of the row.
    """

    id: str
    """Unique in its manifest, and safe as one part of a path: 1 to 128 of A-Z a-z 0-9 . _ -, with no dot in front."""
    images: tuple[str, ...]
    """URIs of 1 to 16 reference images of the subject."""
    class_noun: str
    """What the subject is, such as "person"."""
    prompts: tuple[str, ...]
    """At least one; each has {subject} exactly once."""
    masks: tuple[str, ...] | None = None
    """URIs of one mask per reference image."""
    num_images_per_prompt: int = 1
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    adapter_scale: float | None = None
    concept_scale: float | None = None
    negative_prompt: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Carried through to the results unread; any JSON."""

    def __post_init__(self) -> None:
        for name in ("images", "prompts", "masks"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if faults := list(_faults({name: getattr(self, name) for name in FIELDS})):
            raise ManifestError("; ".join(faults))

    def to_json(self) -> str:
        """The row as one line of a manifest, without what was left at its default."""
        values = {name: getattr(self, name) for name in FIELDS}
        return json.dumps(
            {name: value for name, value in values.items() if name in REQUIRED or value != DEFAULTS[name]}
        )


FIELDS = tuple(each.name for each in fields(ManifestRow))
REQUIRED = ("id", "images", "class_noun", "prompts")
NUMBERS = (
    "num_images_per_prompt",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "adapter_scale",
    "concept_scale",
)
NULLABLE = tuple(each.name for each in fields(ManifestRow) if each.default is None)
DEFAULTS = dict.fromkeys(NULLABLE) | {"num_images_per_prompt": 1, "metadata": {}}


def read_manifest(data: bytes | Iterable[bytes]) -> Iterator[ManifestRow]:
    """Rows of a manifest, from its bytes or from its lines as they come; blank lines are passed over.

    Raises ManifestError at the first bad row, with all of that row's faults, and for a manifest without rows.
    """
    for row, faults in _read(data):
        if faults:
            raise ManifestError("\n".join(faults))
        if row:
            yield row


def check_manifest(data: bytes | Iterable[bytes]) -> list[str]:
    """Every fault of every row, as `line N: field: rule, value, fix`; empty for a manifest that can be worked on."""
    return [fault for _, faults in _read(data) for fault in faults]


def _read(data: bytes | Iterable[bytes]) -> Iterator[tuple[ManifestRow | None, list[str]]]:
    """Each line's row, or its faults."""
    first_lines: dict[str, int] = {}
    number = 0
    empty = True
    for number, line in enumerate(io.BytesIO(data) if isinstance(data, bytes) else data, start=1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not text.strip():
            continue
        empty = False
        row, faults = _parse(text)
        if row:
            first = first_lines.setdefault(row.id, number)
            if first != number:
                faults = [f"id: must be unique, {row.id!r} is on line {first} too; rename one"]
        yield (None if faults else row), [f"line {number}: {fault}" for fault in faults]
    if empty:
        yield None, [f"the manifest must have at least one row, has none on {number} lines; add one JSON object a line"]


def _parse(line: bytes) -> tuple[ManifestRow | None, list[str]]:
    try:
        record = json.loads(line.decode(), object_pairs_hook=_unambiguous, parse_constant=_finite, parse_float=_finite)
        # A lone surrogate survives json.loads and would fail later, in a tokenizer or a file name.
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return None, [f"row: must be one JSON object in UTF-8 on one line, is not ({error}); correct it"]
    if not isinstance(record, dict):
        return None, [f'row: must be a JSON object, is {_shown(record)}; write {{"id": …, "images": […], …}}']
    faults = [
        f"{name}: must be a known field, is not; {did_you_mean(name, FIELDS)}" for name in record if name not in FIELDS
    ]
    faults += [f"{name}: must be given, is missing; add it" for name in REQUIRED if name not in record]
    known = {name: value for name, value in record.items() if name in FIELDS}
    faults += _faults(known)
    return (None, faults) if faults else (ManifestRow(**known), [])


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return record


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError(f"{literal} is not a finite number")
    return number


def _faults(record: Mapping[str, Any]) -> Iterator[str]:
    """`field: rule, value, fix` for every value in `record` that breaks its field's rule."""
    for name, value in record.items():
        if value is None and name in NULLABLE:
            continue
        if name in NUMBERS:
            fault = range_fault(name, value)
        elif name in ("images", "masks"):
            fault = _uris_fault(value)
        elif name == "prompts":
            fault = _prompts_fault(value)
        elif name == "id":
            fault = _id_fault(value)
        elif name == "metadata":
            fault = (
                None if isinstance(value, Mapping) else f"must be an object, is {_shown(value)}; write {{}} or omit it"
            )
        else:
            fault = _text_fault(name, value)
        if fault:
            yield f"{name}: {fault}"
    images, masks = record.get("images"), record.get("masks")
    if isinstance(images, (list, tuple)) and isinstance(masks, (list, tuple)) and len(images) != len(masks):
        yield f"masks: must be one per image, are {len(masks)} for {len(images)}; add or drop some, or omit masks"


def _id_fault(value: object) -> str | None:
    if isinstance(value, str) and ID.fullmatch(value):
        return None
    return f"must be 1 to 128 of A-Z a-z 0-9 . _ - with no dot in front, is {_shown(value)}; rename it"


def _text_fault(name: str, value: object) -> str | None:
    if not isinstance(value, str):
        return f"must be text, is {_shown(value)}; put it in quotes"
    if name == "class_noun" and not value.strip():
        return f"must not be empty, is {_shown(value)}; name what the subject is, such as person"
    return None


def _uris_fault(value: object) -> str | None:
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_IMAGES:
        found = f"{len(value)} of them" if isinstance(value, (list, tuple)) else _shown(value)
        return f"must be a list of 1 to {MAX_IMAGES} URIs, is {found}; list them in brackets"
    for uri in value:
        try:
            check_uri(uri)
        except StorageError as error:
            return str(error)
    return None


def _prompts_fault(value: object) -> str | None:
    if not isinstance(value, (list, tuple)) or not value:
        return f"must be a list of at least one prompt, is {_shown(value)}; list them in brackets"
    for prompt in value:
        if not isinstance(prompt, str) or prompt.count(SUBJECT) != 1:
            return (
                f"must each hold {SUBJECT} exactly once, one is {_shown(prompt)}; put {SUBJECT} where the subject goes"
            )
    return None


def _shown(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."
