"""Manifests: rows of work as JSON Lines, CSV or Parquet.

    {"id": "ada", "images": ["s3://in/ada/1.jpg"], "class_noun": "person", "prompts": ["a photo of a {subject}"]}

In CSV and Parquet a column is a field; an empty cell or null means "not given". In CSV a list is a JSON array or texts
separated by "|", and metadata is a JSON object; in Parquet metadata is a struct, a map or the text of a JSON object.

A row may name its prompts instead: `"prompt_set": "portraits"`. The lists lie once in a JSON file of their own,
`{"portraits": ["a photo of a {subject}", …]}`, since CSV and Parquet have no room for them beside the rows, and since
one set serves many manifests.

Nothing is guessed: an unknown field, a field given twice or a value out of range makes a row bad, and every fault is
reported as `line N: field: rule, value, fix`, in Parquet as `row N: …`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

from instantbooth.errors import ManifestError, StorageError, did_you_mean
from instantbooth.parameters import MAX_REFERENCES, RANGES, SAMPLERS, range_fault
from instantbooth.prompts import CLASS_NOUNS, MAX_PROMPT_CHARS, SUBJECT_FIELD
from instantbooth.storage import check_object_uri

ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
SIZE_STEP = 8
"""Both sides of every picture are multiples of this many pixels; the model may ask for more."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""Control characters that are no white space: a picture cannot carry a prompt with NUL, and none of them is meant."""
SEPARATOR = "|"
"""Between the texts of a list in a CSV cell: rare in prompts and in URIs, unlike commas and semicolons."""

PromptSets = Mapping[str, tuple[str, ...]]
Records = Iterator[tuple[int, dict[str, Any] | str]]
"""The number of each line or row, and its values by field or the fault that hides them."""


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
    """What the subject is, one of instantbooth.prompts.CLASS_NOUNS such as "person"."""
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
    sampler: str | None = None
    """One of SAMPLERS."""
    size: str | None = None
    """Width x height in pixels, such as "512x768"; multiples of 8. Whether the model can make it, the model knows."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Carried through to the results unread; any JSON."""
    attempt: int = 0
    """Raised by one in failed.jsonl: a row that has failed is settled, and this makes it new work."""

    def __post_init__(self) -> None:
        for name in LISTS:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if faults := list(_faults({name: getattr(self, name) for name in FIELDS})):
            raise ManifestError("; ".join(faults))

    @property
    def width(self) -> int | None:
        """Pixels; None where no size is given."""
        return None if self.size is None else _sides(self.size)[0]

    @property
    def height(self) -> int | None:
        """Pixels; None where no size is given."""
        return None if self.size is None else _sides(self.size)[1]

    def to_json(self) -> str:
        """The row as one line of a manifest, without what was left at its default."""
        values = {name: getattr(self, name) for name in FIELDS}
        return json.dumps(
            {name: value for name, value in values.items() if name in REQUIRED or value != DEFAULTS[name]}
        )


FIELDS = tuple(each.name for each in fields(ManifestRow))
REQUIRED = ("id", "images", "class_noun", "prompts")
PROMPT_SET = "prompt_set"
PASSED_OVER = ("code", "error", "pictures")
"""What failed.jsonl says of a row beside the row itself: what was wrong, and which of its pictures were made."""
COLUMNS = (*FIELDS, PROMPT_SET, *PASSED_OVER)
LISTS = ("images", "masks", "prompts")
WHOLE_NUMBERS = tuple(name for name in RANGES if RANGES[name].whole)
NULLABLE = tuple(each.name for each in fields(ManifestRow) if each.default is None)
DEFAULTS = dict.fromkeys(NULLABLE) | {"num_images_per_prompt": 1, "metadata": {}, "attempt": 0}


def scan_manifest(
    data: bytes | Iterable[bytes], *, name: str = "", prompt_sets: PromptSets | None = None
) -> Iterator[tuple[ManifestRow | None, list[str]]]:
    """Each row of a manifest in turn, or None and its faults.

    `data` is the manifest's bytes, a binary file, or its lines as they come; blank lines are passed over. The format
    is told by the ending of `name`, a file's name or URI, or else by what `data` begins with. `prompt_sets` are the
    lists that rows may name. One row is held at a time, and 16 bytes of every id before it.
    """
    unit, records = _records(data, name)
    numbers: dict[bytes, int] = {}
    number = 0
    for number, record in records:
        row, faults = (None, [record]) if isinstance(record, str) else _row(record, prompt_sets or {})
        row_id = record.get("id") if isinstance(record, dict) else None
        if isinstance(row_id, str):
            first = numbers.setdefault(blake2b(row_id.encode(), digest_size=16).digest(), number)
            if first != number:
                faults.append(f"id: must be unique, {_shown(row_id)} is on {unit} {first} too; rename one")
        yield (None if faults else row), [f"{unit} {number}: {fault}" for fault in faults]
    if not number:
        yield None, [f"{name or 'the manifest'} must have at least one row, has none; add one"]


def read_prompt_sets(data: bytes) -> PromptSets:
    """Named lists of prompts, from a JSON file such as {"portraits": ["a photo of a {subject}"]}.

    Raises ManifestError with every fault.
    """
    try:
        sets = _loads(data.decode())
        _check_text(sets)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"prompt sets must be one JSON object in UTF-8, are not ({error}); correct them") from error
    if not isinstance(sets, dict):
        raise ManifestError(f'prompt sets must be a JSON object, are {_shown(sets)}; write {{"name": ["prompt", …]}}')
    faults = [f"prompt set {_shown(name)}: {fault}" for name, value in sets.items() if (fault := _prompts_fault(value))]
    if faults:
        raise ManifestError("\n".join(faults))
    return {name: tuple(prompts) for name, prompts in sets.items()}


def _row(record: dict[str, Any], prompt_sets: PromptSets) -> tuple[ManifestRow | None, list[str]]:
    """The row that a record makes, or its faults."""
    known = {name: value for name, value in record.items() if name in FIELDS}
    faults = [_unknown(name) for name in record if name not in COLUMNS]
    chosen = record.get(PROMPT_SET)
    if chosen is not None and (fault := _prompt_set_fault(chosen, record, prompt_sets)):
        faults.append(f"{PROMPT_SET}: {fault}")
    elif chosen is not None:
        known["prompts"] = prompt_sets[chosen]
    faults += [_missing(name) for name in REQUIRED if name not in known and (name != "prompts" or chosen is None)]
    if not faults:
        with suppress(ManifestError):
            return ManifestRow(**known), []
    return None, [*faults, *_faults(known)]


def _prompt_set_fault(chosen: object, record: Mapping[str, Any], prompt_sets: PromptSets) -> str | None:
    if "prompts" in record:
        return "must stand instead of prompts, is given beside them; drop one of the two"
    if isinstance(chosen, str) and chosen in prompt_sets:
        return None
    fix = (
        did_you_mean(str(chosen), prompt_sets)
        if prompt_sets
        else "none are given: pass --prompt-sets, or write prompts"
    )
    return f"must name a prompt set, is {_shown(chosen)}; {fix}"


def _unknown(name: str) -> str:
    shown = name if name.isidentifier() else _shown(name)
    return f"{shown}: must be a known field, is not; {did_you_mean(name, COLUMNS)}"


def _missing(name: str) -> str:
    return f"{name}: must be given, is missing; add it{f' or {PROMPT_SET}' if name == 'prompts' else ''}"


def _records(data: bytes | Iterable[bytes], name: str) -> tuple[str, Records]:
    """What a row's number counts, and the records."""
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    lines = iter(stream)
    first = next(lines, b"")
    ending = PurePosixPath(name).suffix.lower()
    if ending == ".parquet" or (ending not in (".csv", ".jsonl") and first.startswith(b"PAR1")):
        return "row", _parquet_records(_rewound(stream, first, lines))
    first = first.removeprefix(codecs.BOM_UTF8)
    lines = chain([first], lines)
    if ending == ".csv" or (ending != ".jsonl" and _is_csv_header(first)):
        return "line", _csv_records(lines)
    return "line", _json_records(lines)


def _rewound(stream: object, first: bytes, rest: Iterator[bytes]) -> io.IOBase:
    """A file that can be read from its end, as Parquet must be."""
    if isinstance(stream, io.IOBase) and stream.seekable():
        stream.seek(0)
        return stream
    return io.BytesIO(b"".join(chain([first], rest)))


def _is_csv_header(line: bytes) -> bool:
    # A JSON object's prompts may hold ",size," too.
    if line.lstrip().startswith(b"{"):
        return False
    try:
        return any(cell in COLUMNS for cells in csv.reader([line.decode()]) for cell in cells)
    except (csv.Error, UnicodeDecodeError):
        return False


def _json_records(lines: Iterable[bytes]) -> Records:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = _loads(line.decode())
            _check_text(record)
        except (ValueError, RecursionError) as error:
            yield number, f"row: must be one JSON object in UTF-8 on one line, is not ({error}); correct it"
            continue
        if isinstance(record, dict):
            yield number, record
        else:
            yield number, f'row: must be a JSON object, is {_shown(record)}; write {{"id": …, "images": […], …}}'


def _csv_records(lines: Iterable[bytes]) -> Records:
    # Bytes that are no UTF-8 become lone surrogates, and so a fault of their row alone.
    reader = csv.reader((line.decode(errors="surrogateescape") for line in lines), strict=True)
    header: list[str] = []
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"row: must be comma-separated values, is not ({error}); correct it"
            continue
        if not cells:
            continue
        if not header:
            header = cells
            faults, usable = _column_faults(header)
            yield from ((number, fault) for fault in faults)
            if not usable:
                return
        elif len(cells) == len(header):
            yield number, _table_record(zip(header, map(_csv_value, header, cells), strict=True))
        else:
            yield number, f"row: must have {len(header)} cells, has {len(cells)}; quote cells that hold commas"


def _parquet_records(file: io.IOBase) -> Records:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        table = parquet.ParquetFile(file)
        faults, usable = _column_faults(table.schema_arrow.names)
        yield from ((1, fault) for fault in faults)
        if not usable:
            return
        columns = [name for name in table.schema_arrow.names if name in COLUMNS]
        for batch in table.iter_batches(batch_size=1000, columns=columns, use_threads=False):
            for record in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield number, _table_record(record.items())
    except (ArrowException, OSError, ValueError, KeyError) as error:
        yield number + 1, f"row: must be readable Parquet, is not ({error}); write the file again"


def _column_faults(columns: Sequence[str]) -> tuple[list[str], bool]:
    """What is wrong with a table's columns, and whether its rows can be read all the same."""
    unknown = [_unknown(name) for name in dict.fromkeys(columns) if name not in COLUMNS]
    twice = [
        f"{name}: must be one column, is {columns.count(name)}; drop the others"
        for name in COLUMNS
        if columns.count(name) > 1
    ]
    missing = [
        _missing(name) for name in REQUIRED if name not in columns and (name != "prompts" or PROMPT_SET not in columns)
    ]
    return unknown + twice + missing, not twice and not missing


def _table_record(cells: Iterable[tuple[str, Any]]) -> dict[str, Any] | str:
    """The cells that are given, in known columns: unknown ones were reported once, with the header."""
    record = {name: _table_value(name, value) for name, value in cells if value is not None and name in COLUMNS}
    try:
        _check_text(record)
    except (ValueError, TypeError, RecursionError) as error:
        return f"row: must hold UTF-8 text, numbers, lists and objects, does not ({error}); correct it"
    return record


def _csv_value(name: str, cell: str) -> Any:
    """What a cell says, None if it is empty; text that cannot be parsed is left for its field's rule to name."""
    text = cell.strip()
    if not text:
        return None
    if name in RANGES:
        return _number(text)
    if name in LISTS and not text.startswith("["):
        return [part.strip() for part in text.split(SEPARATOR)]
    return _parsed(text) if name in LISTS else cell


def _table_value(name: str, value: Any) -> Any:
    if name == "metadata" and isinstance(value, str):
        return _parsed(value)
    # Where some cells of a column are empty, tables often keep its whole numbers as floats, exact below 2**53.
    if name in WHOLE_NUMBERS and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _parsed(text: str) -> Any:
    try:
        return _loads(text)
    except (ValueError, RecursionError):
        return text


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unambiguous, parse_constant=_finite, parse_float=_finite)


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


def _check_text(record: object) -> None:
    """A lone surrogate survives decoding and would fail later, in a tokenizer or a file name."""
    json.dumps(record, ensure_ascii=False).encode()


def _faults(record: Mapping[str, Any]) -> Iterator[str]:
    """`field: rule, value, fix` for every value in `record` that breaks its field's rule."""
    for name, value in record.items():
        if value is None and name in NULLABLE:
            continue
        fault = range_fault(name, value) if name in RANGES else RULES[name](value)
        if fault:
            yield f"{name}: {fault}"
    images, masks = record.get("images"), record.get("masks")
    if isinstance(images, (list, tuple)) and isinstance(masks, (list, tuple)) and len(images) != len(masks):
        yield f"masks: must be one per image, are {len(masks)} for {len(images)}; add or drop some, or omit masks"


def _id_fault(value: object) -> str | None:
    if isinstance(value, str) and ID.fullmatch(value):
        return None
    return f"must be 1 to 128 of A-Z a-z 0-9 . _ - with no dot in front, is {_shown(value)}; rename it"


def _class_noun_fault(value: object) -> str | None:
    known = [noun for nouns in CLASS_NOUNS.values() for noun in nouns]
    if value in known:
        return None
    return f"must be a known noun, is {_shown(value)}; {did_you_mean(str(value), known)}"


def _negative_prompt_fault(value: object) -> str | None:
    if not isinstance(value, str):
        return f"must be text, is {_shown(value)}; put it in quotes"
    if SUBJECT_FIELD in value:
        return f"must not hold {SUBJECT_FIELD}, is {_shown(value)}; remove it"
    return _text_fault(value)


def _sampler_fault(value: object) -> str | None:
    if value in SAMPLERS:
        return None
    return f"must be a known sampler, is {_shown(value)}; {did_you_mean(str(value), SAMPLERS)}"


def _size_fault(value: object) -> str | None:
    if isinstance(value, str) and SIZE.fullmatch(value) and not any(side % SIZE_STEP for side in _sides(value)):
        return None
    rule = f"must be width x height in pixels, multiples of {SIZE_STEP}"
    return f"{rule}, is {_shown(value)}; write for example 512x512"


def _sides(size: str) -> list[int]:
    return [int(side) for side in size.split("x")]


def _metadata_fault(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return f"must be an object, is {_shown(value)}; write {{}} or omit it"
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        return f"must be JSON, is not ({error}); correct it"
    return None


def _uris_fault(value: object) -> str | None:
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_REFERENCES:
        found = f"{len(value)} of them" if isinstance(value, (list, tuple)) else _shown(value)
        return f"must be a list of 1 to {MAX_REFERENCES} URIs, is {found}; list them in brackets"
    for uri in value:
        try:
            check_object_uri(uri)
        except StorageError as error:
            return str(error)
    return None


def _prompts_fault(value: object) -> str | None:
    if not isinstance(value, (list, tuple)) or not value:
        return f"must be a list of at least one prompt, is {_shown(value)}; list them in brackets"
    for prompt in value:
        if not isinstance(prompt, str) or prompt.count(SUBJECT_FIELD) != 1:
            return (
                f"must each hold {SUBJECT_FIELD} exactly once, one is {_shown(prompt)}; "
                f"put {SUBJECT_FIELD} where the subject goes"
            )
        if fault := _text_fault(prompt):
            return fault
    if len(set(value)) < len(value):
        twice = next(prompt for prompt in value if value.count(prompt) > 1)
        return f"must each be given once, {_shown(twice)} is given again; drop it, or raise num_images_per_prompt"
    return None


def _text_fault(text: str) -> str | None:
    if CONTROL.search(text):
        return f"must hold no control character, one is {_shown(text)}; remove it"
    if len(text) > MAX_PROMPT_CHARS:
        return f"must have at most {MAX_PROMPT_CHARS} characters, one has {len(text)}; shorten it"
    return None


RULES: Mapping[str, Callable[[object], str | None]] = {
    "id": _id_fault,
    "images": _uris_fault,
    "masks": _uris_fault,
    "class_noun": _class_noun_fault,
    "prompts": _prompts_fault,
    "negative_prompt": _negative_prompt_fault,
    "sampler": _sampler_fault,
    "size": _size_fault,
    "metadata": _metadata_fault,
}


def _shown(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."
