"""What curation works on: a pair of picture and caption on its way, and why one is dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from instantbooth.images import ImageLimits

MAX_FILE_BYTES = ImageLimits.max_bytes
"""Of one picture or mask."""
MAX_DETAIL_CHARS = 600
"""Of why a pair is dropped: its caption or name may be of any length."""


class Reason(StrEnum):
    """Why a pair is not kept."""

    UNREADABLE = "unreadable file"
    """The bytes could not be had. It may come back: the next run tries again."""
    DAMAGED = "damaged source"
    """A part of a tar, Parquet file or list that cannot be read; counted once, however many pairs it held."""
    BAD_METADATA = "bad metadata"
    BAD_TEXT = "bad text"
    NO_IMAGE = "no image"
    NO_CAPTION = "no caption"
    NO_NOUN = "no class noun"
    SEVERAL_NAMED = "several subjects named"
    UNUSABLE_CAPTION = "unusable caption"
    UNUSABLE_IMAGE = "unusable image"
    IMAGE_TOO_SMALL = "image too small"
    UNUSABLE_MASK = "unusable mask"
    NO_MASK = "no mask"
    NO_SUBJECT = "no subject found"
    SUBJECT_TOO_SMALL = "subject too small"
    SUBJECT_TOO_LARGE = "subject too large"
    SEVERAL_PICTURED = "several subjects pictured"
    EXACT_DUPLICATE = "exact duplicate"
    NEAR_DUPLICATE = "near duplicate"


class Dropped(Exception):
    """A pair that is not kept: the reason to count, and the detail."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One pair; once `reason` is set, later steps hand it on untouched."""

    row: int
    """Its number within its unit, from 0."""
    name: str
    """What people find it by: a line, a tar's sample, a Parquet file's row."""
    image: bytes = b""
    """As it came."""
    given_mask: bytes = b""
    """As it came; empty where the source has none."""
    text: str = ""
    """The caption as it came."""
    reason: Reason | None = None
    detail: str = ""

    caption: str = ""
    """With {subject} in the noun's place."""
    noun: str = ""
    subject: str = ""
    """The noun's class."""
    width: int = 0
    height: int = 0
    look: bytes = b""
    """The picture's perceptual hash."""
    mask: bytes = b""
    """PNG, "L", of the picture's size; empty until the subject is found."""
    coverage: float = 0.0
    """Share of the picture that the mask covers."""

    def dropped(self, reason: Reason, detail: str) -> Pair:
        """The same pair, not kept. Of a long detail the middle is left out; its lone surrogates are escaped."""
        if len(detail) > MAX_DETAIL_CHARS:
            half = MAX_DETAIL_CHARS // 2
            detail = f"{detail[:half]} … {detail[-half:]}"
        return replace(self, reason=reason, detail=storable(detail))

    @property
    def picture_digest(self) -> str:
        """SHA-256 of the picture's bytes, in hexadecimal."""
        return hashlib.sha256(self.image).hexdigest()

    @property
    def id(self) -> str:
        """SHA-256 of picture and caption, in hexadecimal."""
        return hashlib.sha256(self.image + b"\0" + self.text.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes it holds as it came."""
        return len(self.image) + len(self.given_mask)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The pairs that go through the pipeline, and later into a shard, together."""

    unit: str
    """Id of the unit that it is cut from."""
    source: str
    """The unit's key below the source."""
    number: int
    """Which slice of its unit, from 0."""
    last: bool
    """Whether its unit has no more."""
    digest: str
    """Of everything that decides what becomes of its pairs: their content and the rules. Names what is written."""
    pairs: tuple[Pair, ...]
    """Empty where an earlier run staged the slice."""
    settled: bool
    """Whether every byte of it could be had: a unit with a slice that is not settled is read again by the next run."""
    staged: bool = False
    """Whether an earlier run staged it."""


@dataclass(frozen=True, kw_only=True)
class OnPairs:
    """A step on pairs as a step on slices: a pair for which it raises Dropped keeps the reason."""

    step: Callable[[Pair], Pair]

    def __call__(self, item: dict[str, Slice]) -> dict[str, Slice]:
        pairs = tuple(pair if pair.reason else self._try(pair) for pair in item["slice"].pairs)
        return {"slice": replace(item["slice"], pairs=pairs)}

    def _try(self, pair: Pair) -> Pair:
        try:
            return self.step(pair)
        except Dropped as dropped:
            return pair.dropped(dropped.reason, dropped.detail)


def storable(text: str) -> str:
    """Text with its lone surrogates escaped: they come from bytes that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
