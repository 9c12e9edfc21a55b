"""JSONL and CSV files, line by line: one that is wrong costs itself alone."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.curation.pairs import Dropped, Reason

MAX_NESTING = 32
"""Of lists and objects in a record: what is nested far deeper can be parsed, but not be handed to another process."""
MAX_RECORD_LINES = 16
"""Lines that one quoted record of a CSV file may span; a quote that is never closed must not swallow the file."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a list: its record, or why it has none."""

    number: int
    """From 1."""
    record: Mapping[str, Any] = field(default_factory=dict)
    fault: Dropped | None = None


def json_lines(data: bytes) -> Iterator[Line]:
    """Records of a JSONL file; blank lines are passed over."""
    # Not str.splitlines: it would also cut at U+2028, which JSON allows within its strings.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield json_line(number, line)


def json_line(number: int, line: bytes) -> Line:
    """One JSON object."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Line(number=number, fault=Dropped(Reason.BAD_TEXT, f"not UTF-8 ({error}); save the list as UTF-8"))
    except (ValueError, RecursionError) as error:
        return Line(number=number, fault=Dropped(Reason.BAD_METADATA, f"not JSON ({error}); correct the line"))
    if not isinstance(record, dict):
        detail = f"must be a JSON object, is {type(record).__name__}; write one object a line"
        return Line(number=number, fault=Dropped(Reason.BAD_METADATA, detail))
    if _nesting(record) > MAX_NESTING:
        detail = f"nested more than {MAX_NESTING} deep; write text or names of files"
        return Line(number=number, fault=Dropped(Reason.BAD_METADATA, detail))
    return Line(number=number, record=record)


def _nesting(record: object) -> int:
    """How deep it is, as far as it matters: a number has 0, an empty list 1."""
    depth, level = 0, [record]
    while depth <= MAX_NESTING and (level := [value for value in level if isinstance(value, dict | list)]):
        level = [child for value in level for child in (value.values() if isinstance(value, dict) else value)]
        depth += 1
    return depth


def csv_lines(data: bytes, delimiter: str) -> Iterator[Line]:
    """Records of a CSV file with a header. A record that cannot be parsed costs its own line alone."""
    # Bytes that are no UTF-8 become lone surrogates, which no caption may hold.
    lines = [line.removesuffix("\r") for line in data.decode("utf-8", "surrogateescape").split("\n")]
    header = _csv_record(lines[:1], delimiter) or []
    number = 1
    while number < len(lines):
        spans = range(1, 1 + (MAX_RECORD_LINES if '"' in lines[number] else 1))
        parsed = ((span, _csv_record(lines[number : number + span], delimiter)) for span in spans)
        span, values = next(
            ((span, values) for span, values in parsed if values and len(values) == len(header)), (1, None)
        )
        if values:
            yield Line(number=number + 1, record=dict(zip(header, values, strict=True)))
        elif lines[number].strip():
            detail = f"must have {len(header)} columns, does not: {lines[number][:80]!r}; check its quotes"
            yield Line(number=number + 1, fault=Dropped(Reason.BAD_METADATA, detail))
        number += span


def _csv_record(lines: list[str], delimiter: str) -> list[str] | None:
    try:
        records = list(csv.reader(["\n".join(lines)], delimiter=delimiter, strict=True))
    except csv.Error:
        return None
    return records[0] if len(records) == 1 else None
