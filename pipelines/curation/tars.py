"""WebDataset tars, read as a stream; what is damaged costs what it touches, and is told."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import BinaryIO

from pipelines.curation.pairs import MAX_FILE_BYTES, Dropped, Reason

STREAM_BYTES = 1 << 20


def tar_samples(stream: BinaryIO) -> Iterator[tuple[str, dict[str, bytes | None] | Dropped]]:
    """The samples of a WebDataset tar: key, then suffix → bytes (None: too large) of neighbours that share it.

    A key is a path up to its file name's first dot. Damage comes as a sample of its own, which is a Dropped.
    """
    key, files = "", {}
    for name, data in _tar_files(stream):
        folder, _, file = name.rpartition("/")
        stem, _, suffix = file.partition(".")
        current = f"{folder}/{stem}" if folder else stem
        if isinstance(data, Dropped):
            yield name, data
        else:
            if files and current != key:
                yield key, files
                files = {}
            key, files = current, files | {suffix.lower(): data}
    if files:
        yield key, files


def _tar_files(stream: BinaryIO) -> Iterator[tuple[str, bytes | Dropped | None]]:
    """Names and bytes of a tar's regular files, and each damage once.

    tarfile can look for the next header behind a damaged one (ignore_zeros), but says nothing of it: hence `seen`.
    """
    seen = SimpleNamespace(damage="", ended=False)
    tar = tarfile.open(  # noqa: SIM115
        fileobj=_WithStart(stream), mode="r|", bufsize=STREAM_BYTES, ignore_zeros=True, tarinfo=_noting(seen)
    )
    start, position = tar.firstmember, -1
    while True:
        try:
            member = tar.next()
            if member is None:
                break
            if seen.damage:
                yield "a damaged part", Dropped(Reason.DAMAGED, f"{seen.damage} before {member.name!r}; pack it again")
                seen.damage = ""
            if member.isreg() and member is not start:
                yield member.name, _member_bytes(tar, member)
        except (tarfile.TarError, ValueError, RecursionError) as error:
            seen.damage = str(error)
            if tar.fileobj.tell() == position:
                break
            tar.offset = position = tar.fileobj.tell()
    if seen.damage or not seen.ended:
        yield "the end", Dropped(Reason.DAMAGED, f"{seen.damage or 'no end mark'}: the tar is cut short; pack it again")


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    if member.size > MAX_FILE_BYTES:
        return None
    file = tar.extractfile(member)
    return file.read() if file else b""


def _noting(seen: SimpleNamespace) -> type[tarfile.TarInfo]:
    """A header class that tells `seen` of damaged headers and of the end mark."""

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
            try:
                header = super().frombuf(buf, encoding, errors)
            except tarfile.EOFHeaderError:
                seen.ended = True
                raise
            except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
                seen.damage = f"damaged header ({error})"
                raise
            seen.ended = False
            return header

    return Header


class _WithStart:
    """A tar that starts with an empty file of its own: tarfile gives a tar up whose first header is damaged."""

    def __init__(self, stream: BinaryIO) -> None:
        self.start, self.stream = tarfile.TarInfo("start").tobuf(), stream

    def read(self, size: int) -> bytes:
        if self.start:
            start, self.start = self.start, b""
            return start
        return self.stream.read(size)
