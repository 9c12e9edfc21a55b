"""Where pairs come from: files at file:// or s3://, told apart by their names, and divided into units of work.

The first of these that a folder holds, at any depth, is its kind; files of other kinds are left alone, and so are names
that start with "." or "_". A URI may also name one such file.

- an image folder: `metadata.jsonl` or `metadata.csv` (Hugging Face's convention), pictures named relative to it;
- WebDataset tars, as img2dataset writes them: `1.jpg` (png, webp), `1.txt` or `1.json`, and perhaps `1.mask.png`;
- Parquet files with pictures in a column, or URIs of them;
- lists, `.jsonl`, `.csv` or `.tsv`, of URIs.

A unit is one tar, one Parquet file, or a few lines of a list. What cannot be read becomes a pair that is dropped with
its reason: damage costs what it touches and nothing beside. A file is known by its name, size and time of change, a
list's lines by their folder and text: the pictures that a line names are taken never to change. Of a list that got more
lines at its end, the last slice that was not full is read again with them.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from instantbooth.errors import OversizedObjectError, ParameterError, StorageError
from instantbooth.ledger import digest_of
from instantbooth.storage import FileStore, S3Store, check_key, check_uri, open_store, open_uri, patiently, read_uri
from pipelines.curation.lists import Line, csv_lines, json_line, json_lines
from pipelines.curation.pairs import MAX_FILE_BYTES, Dropped, Pair, Reason, Slice, storable
from pipelines.curation.tars import STREAM_BYTES, tar_samples

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
IMAGE_COLUMNS = ("image", *IMAGE_TYPES, "image_bytes", "file_name", "image_file_name", "uri", "image_uri", "url")
MASK_COLUMNS = ("mask", "mask_file_name", "mask_uri")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "prompt")
DELIMITERS = {"csv": ",", "tsv": "\t"}

MAX_SLICE_BYTES = 64_000_000
FETCHERS = 16
"""Files that one task fetches at a time."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of a source's columns; where none is given, the usual ones are looked for.

    In a tar the ending of a file tells what it is: only the caption's name, in the JSON, is a matter of choice.
    """

    image: str | None = None
    """Bytes, URI or file name of the picture."""
    mask: str | None = None
    """The same of its mask."""
    caption: str | None = None

    def all(self) -> set[str]:
        """Every column that is looked for."""
        return {name for names in (self.of_image(), self.of_mask(), self.of_caption()) for name in names}

    def check(self, units: Sequence[Unit]) -> None:
        """Raises ParameterError for a column of pictures or masks where they come in tars."""
        for name in ("image", "mask"):
            if getattr(self, name) and any(unit.kind == "tar" for unit in units):
                raise ParameterError(
                    f"columns.{name} is {getattr(self, name)!r}, but in tars the ending tells pictures "
                    f"(.{', .'.join(IMAGE_TYPES)}) and masks (.mask.png); leave it out"
                )

    def of_image(self) -> tuple[str, ...]:
        return (self.image,) if self.image else IMAGE_COLUMNS

    def of_mask(self) -> tuple[str, ...]:
        return (self.mask,) if self.mask else MASK_COLUMNS

    def of_caption(self) -> tuple[str, ...]:
        return (self.caption,) if self.caption else CAPTION_COLUMNS


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What one task reads."""

    folder: str
    """URI of the source's folder."""
    key: str
    """The file below it."""
    kind: str
    """ "tar", "parquet" or "list"."""
    part: int = 0
    """Which part of a list."""
    stamp: str
    """Changes with the content."""
    lines: tuple[Line, ...] = ()
    """A list's."""

    def id(self, rules: str) -> str:
        """What a run under these rules (their digest) is known by."""
        # A list's lines may name files beside it: those of another folder are others.
        folder = self.folder if self.kind == "list" else None
        return digest_of(self.kind, folder, self.key, self.part, self.stamp, rules)


@dataclass(frozen=True)
class File:
    """A file below a folder."""

    key: str
    stamp: str


def plan(source: str, *, lines_per_unit: int) -> list[Unit]:
    """The units of a source, sorted. Raises StorageError where there is nothing to read."""
    folder, files = _list_files(source)
    tables = {
        "list": [file for file in files if posixpath.basename(file.key) in ("metadata.jsonl", "metadata.csv")],
        "tar": [file for file in files if _suffix(file.key) == "tar"],
        "parquet": [file for file in files if _suffix(file.key) == "parquet"],
    }
    kind = next((kind for kind, found in tables.items() if found), "list")
    found = tables[kind] or [file for file in files if _suffix(file.key) in ("jsonl", *DELIMITERS)]
    if not found:
        raise StorageError(
            f"{source} holds nothing to ingest among {len(files)} files; name a folder with metadata.jsonl or .csv,"
            " WebDataset .tar files, .parquet files, or .jsonl, .csv or .tsv lists"
        )
    if kind == "list":
        units = [unit for file in found for unit in _list_units(folder, file, lines_per_unit)]
        if not units:
            raise StorageError(f"{', '.join(file.key for file in found)} in {folder}: no line; write one pair a line")
        return units
    return [Unit(folder=folder, key=file.key, kind=kind, stamp=file.stamp) for file in found]


def read_pairs(unit: Unit, columns: Columns) -> Iterator[Pair]:
    """The pairs of a unit in their order; those that cannot be had are dropped ones."""
    readers = {"tar": _tar_pairs, "parquet": _parquet_pairs, "list": _list_pairs}
    rows = itertools.count()
    try:
        yield from readers[unit.kind](unit, columns, rows)
    except (OSError, StorageError) as error:
        yield _fault(next(rows), "the rest", Reason.UNREADABLE, str(error))


def read_slices(unit: Unit, columns: Columns, *, pairs_per_slice: int, rules: str) -> Iterator[Slice]:
    """A unit's pairs in slices of at most that many, and of few enough bytes to hold in memory; at least one slice."""
    held: list[Pair] = []
    number = size = 0
    for pair in read_pairs(unit, columns):
        if held and (len(held) == pairs_per_slice or size + pair.size > MAX_SLICE_BYTES):
            yield _slice(unit, number, held, rules, last=False)
            held, number, size = [], number + 1, 0
        held.append(pair)
        size += pair.size
    yield _slice(unit, number, held, rules, last=True)


def _slice(unit: Unit, number: int, pairs: list[Pair], rules: str, *, last: bool) -> Slice:
    content = [(pair.name, pair.picture_digest, _sha(pair.given_mask), pair.text, pair.reason) for pair in pairs]
    return Slice(
        unit=unit.id(rules),
        source=unit.key,
        number=number,
        last=last,
        digest=digest_of(rules, unit.key, unit.part, number, content),
        pairs=tuple(pairs),
        settled=all(pair.reason is not Reason.UNREADABLE for pair in pairs),
    )


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _suffix(key: str) -> str:
    return posixpath.splitext(key)[1].removeprefix(".").lower()


def _fault(row: int, name: str, reason: Reason, detail: str) -> Pair:
    return Pair(row=row, name=storable(name)).dropped(reason, detail)


# Files


def open_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Arrow's file system and the path in it, for what stores do not tell: sizes and times, and columns of a table."""
    store = open_store(uri)
    if isinstance(store, FileStore):
        return pyarrow.fs.LocalFileSystem(), str(store.root)
    assert isinstance(store, S3Store)
    return pyarrow.fs.FileSystem.from_uri(f"s3://{store.bucket}")[0], f"{store.bucket}/{store.prefix}".rstrip("/")


@contextmanager
def _open(unit: Unit) -> Iterator[BinaryIO]:
    uri = open_store(unit.folder).uri(unit.key)
    with ExitStack() as stack:
        yield patiently(lambda: stack.enter_context(open_uri(uri)))


def _list_files(source: str) -> tuple[str, list[File]]:
    """The URI of a source's folder, which is the same everywhere, and its files, sorted."""
    try:
        filesystem, root = open_filesystem(source)
        (info,) = filesystem.get_file_info([root])
        infos = [info]
        if info.type == pyarrow.fs.FileType.Directory:
            infos = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    except (OSError, pyarrow.ArrowException) as error:
        raise StorageError(f"cannot list {source}: {error}; check the name, and that access is allowed") from error
    if info.type == pyarrow.fs.FileType.NotFound:
        raise StorageError(f"there is nothing at {source}; check the name")
    if info.type == pyarrow.fs.FileType.File:
        root = posixpath.dirname(root)
    files = [
        File(_path_of(info).removeprefix(root).lstrip("/"), f"{info.size}@{info.mtime_ns}")
        for info in infos
        if info.type == pyarrow.fs.FileType.File
    ]
    shown = [file for file in files if not any(part.startswith((".", "_")) for part in file.key.split("/"))]
    folder = f"s3://{root}" if check_uri(source) == "s3" else root
    return folder, sorted(shown, key=lambda file: file.key)


def _path_of(info: pyarrow.fs.FileInfo) -> str:
    """A file's path; one that is not UTF-8, which no store can read, comes with its bytes escaped and is not found."""
    try:
        return info.path
    except UnicodeDecodeError as error:
        return error.object.decode("utf-8", "backslashreplace")


# Lists


def _list_units(folder: str, file: File, lines_per_unit: int) -> Iterator[Unit]:
    data = patiently(partial(open_store(folder).get, file.key)).removeprefix(codecs.BOM_UTF8)
    kind = _suffix(file.key)
    lines = list(csv_lines(data, DELIMITERS[kind]) if kind in DELIMITERS else json_lines(data))
    for part, start in enumerate(range(0, len(lines), lines_per_unit)):
        chosen = tuple(lines[start : start + lines_per_unit])
        stamp = digest_of([(line.number, line.record, line.fault and line.fault.detail) for line in chosen])
        yield Unit(folder=folder, key=file.key, kind="list", part=part, stamp=stamp, lines=chosen)


def _list_pairs(unit: Unit, columns: Columns, rows: Iterator[int]) -> Iterator[Pair]:
    def pair_of(line: Line, row: int) -> Pair:
        name = f"line {line.number}"
        if line.fault:
            return _fault(row, name, line.fault.reason, line.fault.detail)
        return _pair(line.record, row, name, columns, unit)

    with ThreadPoolExecutor(FETCHERS) as fetchers:
        yield from fetchers.map(pair_of, unit.lines, rows)


def _pair(record: Mapping[str, Any], row: int, name: str, columns: Columns, unit: Unit) -> Pair:
    """A record of a list or a Parquet file as a pair."""
    try:
        text = text_of(_value(record, columns.of_caption()))
        image = _fetch(_value(record, columns.of_image()), unit)
        if not image:
            known = ", ".join(columns.of_image())
            raise Dropped(Reason.NO_IMAGE, f"no value in any of {known}; fill in one, or name the column")
        mask = _fetch(_value(record, columns.of_mask()), unit)
        return Pair(row=row, name=name, text=text, image=image, given_mask=mask)
    except Dropped as dropped:
        return _fault(row, name, dropped.reason, dropped.detail)


def _value(record: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The record's first value among these columns; None where all are empty. Raises the Dropped that a cell is."""
    value = next((record[name] for name in names if record.get(name) not in (None, "", b"")), None)
    if isinstance(value, Dropped):
        raise value
    return value


def text_of(value: object) -> str:
    """A caption. Raises Dropped for one that is no text in UTF-8."""
    try:
        text = value.decode() if isinstance(value, bytes) else value
        if text is not None and not isinstance(text, str):
            raise Dropped(Reason.BAD_METADATA, f"a caption must be text, is {type(value).__name__} {str(value)[:80]}")
        (text or "").encode()
        return text or ""
    except UnicodeError as error:
        raise Dropped(Reason.BAD_TEXT, f"caption {value!r} is not UTF-8 ({error}); save it as UTF-8") from error


def _fetch(value: object, unit: Unit) -> bytes:
    """The bytes of a cell: bytes, a URI or name, or Hugging Face's {"bytes": …, "path": …}. Empty for an empty cell."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        shown = f"{type(value).__name__} {str(value)[:80]}"
        raise Dropped(Reason.BAD_METADATA, f"a file must be named by text, is {shown}; write its name or URI")
    read = _reader(value, unit)
    try:
        return patiently(lambda: read(max_bytes=MAX_FILE_BYTES))
    except OversizedObjectError as error:
        raise Dropped(Reason.UNUSABLE_IMAGE, str(error)) from error
    except StorageError as error:
        raise Dropped(Reason.UNREADABLE, str(error)) from error


def _reader(name: str, unit: Unit) -> Callable[..., bytes]:
    """What reads a file that a unit names, by URI or relative to the unit. Raises Dropped for an impossible name."""
    try:
        if "://" not in name and not name.startswith("/"):
            key = check_key(posixpath.join(posixpath.dirname(unit.key), name))
            return partial(open_store(unit.folder).get, key)
        scheme = check_uri(name)
    except StorageError as error:
        raise Dropped(Reason.BAD_METADATA, str(error)) from error
    if scheme == "file" and check_uri(unit.folder) == "s3":
        raise Dropped(Reason.BAD_METADATA, f"{name} is a file of this machine, named by {unit.key} at S3; use s3://")
    return partial(read_uri, name)


# Parquet files


def _parquet_pairs(unit: Unit, columns: Columns, rows: Iterator[int]) -> Iterator[Pair]:
    def pair_of(record: Mapping[str, Any] | Dropped, row: int) -> Pair:
        name = f"row {row}"
        if isinstance(record, Dropped):
            return _fault(row, name, record.reason, f"{unit.key}: {record.detail}")
        return _pair(record, row, name, columns, unit)

    with _open(unit) as file, ThreadPoolExecutor(FETCHERS) as fetchers:
        try:
            parquet = pq.ParquetFile(file, buffer_size=STREAM_BYTES)
            wanted = [name for name in parquet.schema_arrow.names if name in columns.all()]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            yield _fault(next(rows), "the file", Reason.DAMAGED, f"{unit.key} is no whole Parquet file ({error})")
            return
        for group in range(parquet.num_row_groups):
            for records in _group_batches(parquet, group, wanted):
                yield from fetchers.map(pair_of, records, rows)


def _group_batches(
    parquet: pq.ParquetFile, group: int, columns: list[str]
) -> Iterator[list[Mapping[str, Any] | Dropped]]:
    """The records of a row group, a few at a time; where it is damaged, why for each record that is left."""
    left = parquet.metadata.row_group(group).num_rows
    try:
        for batch in parquet.iter_batches(batch_size=FETCHERS, row_groups=[group], columns=columns):
            named = list(zip(batch.schema.names, batch.columns, strict=True))
            yield [{name: _cell(column[row]) for name, column in named} for row in range(batch.num_rows)]
            left -= batch.num_rows
    except (pa.ArrowException, OSError) as error:
        yield [Dropped(Reason.DAMAGED, f"row group {group} cannot be read ({error})")] * left


def _cell(scalar: pa.Scalar) -> Any:
    """The value, or why it cannot be had."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return Dropped(Reason.BAD_TEXT, f"text that is not UTF-8 ({error}); save it as UTF-8")
    except (ValueError, OverflowError) as error:
        return Dropped(Reason.BAD_METADATA, f"a {scalar.type} that Python cannot hold ({error}); write text or bytes")


# Tars


def _tar_pairs(unit: Unit, columns: Columns, rows: Iterator[int]) -> Iterator[Pair]:
    with _open(unit) as file:
        for key, files in tar_samples(file):
            if isinstance(files, Dropped):
                yield _fault(next(rows), key, files.reason, f"{unit.key}: {files.detail}")
            else:
                yield _tar_pair(next(rows), key, files, columns)


def _tar_pair(row: int, key: str, files: Mapping[str, bytes | None], columns: Columns) -> Pair:
    try:
        image = next((name for name in IMAGE_TYPES if name in files), None)
        mask = next((name for name in files if name.split(".")[0] == "mask"), None)
        if image is None:
            raise Dropped(Reason.NO_IMAGE, f"none of .{', .'.join(IMAGE_TYPES)} beside .{', .'.join(files)}; add it")
        data, given_mask = files[image], files[mask] if mask else b""
        if data is None or given_mask is None:
            raise Dropped(Reason.UNUSABLE_IMAGE, f"over {MAX_FILE_BYTES / 1e6:.0f} MB; resize it")
        return Pair(row=row, name=storable(key), text=_tar_caption(files, columns), image=data, given_mask=given_mask)
    except Dropped as dropped:
        return _fault(row, key, dropped.reason, dropped.detail)


def _tar_caption(files: Mapping[str, bytes | None], columns: Columns) -> str:
    """The text file's content; where there is none, the caption of the JSON file."""
    if not columns.caption and (files.get("txt") or b"").strip():
        return text_of(files["txt"])
    if not files.get("json"):
        return ""
    line = json_line(1, files["json"] or b"")
    if line.fault:
        raise line.fault
    return text_of(_value(line.record, columns.of_caption()))
