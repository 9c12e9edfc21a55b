"""Which pictures show the same: an exact and a perceptual comparison whose outcome no order or history changes.

Rows are ranked: the larger picture first, then the smaller digest, then the place in the source. A row is an exact
duplicate where a row of a better rank has the same bytes, and a near duplicate where one *looks* the same, kept or not.
"Kept or not" makes the rule local and monotonous: it needs no clustering, a source that grows can only take rows away,
and however the work is divided or interrupted the same rows stay. Its price: of a chain of ever so slightly different
pictures only the best stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 8
LOOK_BYTES = 2 * SIDE * SIDE // 8
COMPARISONS = 4_000_000
"""Pairs of rows compared at once: 64 MB."""


@dataclass(frozen=True)
class Duplicates:
    """For each row the row it is a duplicate of, or −1."""

    exact: NDArray[np.int64]
    near: NDArray[np.int64]


def look_of(picture: Image.Image) -> bytes:
    """A difference hash (dHash), 128 bits: whether brightness rises from cell to cell of an 8x8 grid, both ways.

    Over 400 rendered pictures, recompression to quality 50, half or double size and 10 % more light change at most 10
    bits, usually 1 or 2; the most alike of two different pictures differ in 22.
    """
    grey = picture.convert("L")
    across = np.asarray(grey.resize((SIDE + 1, SIDE), Image.Resampling.LANCZOS))
    down = np.asarray(grey.resize((SIDE, SIDE + 1), Image.Resampling.LANCZOS))
    rises = np.concatenate([(across[:, 1:] > across[:, :-1]).ravel(), (down[1:] > down[:-1]).ravel()])
    return np.packbits(rises).tobytes()


def find_duplicates(
    pictures: NDArray[np.bytes_],
    looks: NDArray[np.uint8],
    pixels: NDArray[np.int64],
    ids: NDArray[np.bytes_],
    bits: int,
) -> Duplicates:
    """Rows in the order of their source: `pictures` [N] digests, `looks` [N, LOOK_BYTES], `pixels` [N], `ids` [N].

    Looks that differ in at most `bits` bits are the same.
    """
    order = np.lexsort((np.arange(len(ids)), ids, -pixels))
    _, first, group = np.unique(pictures[order], return_index=True, return_inverse=True)
    originals = np.sort(first)
    exact, near = np.full(len(ids), -1), np.full(len(ids), -1)
    exact[order] = np.where(first[group] == np.arange(len(order)), -1, order[first[group]])
    better = _first_alike(looks[order][originals], bits)
    near[order[originals]] = np.where(better < 0, -1, order[originals][better])
    return Duplicates(exact, near)


def _first_alike(looks: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """For each row the first earlier one that differs in at most `bits` bits, or −1.

    Split into bits + 1 bands, two such rows agree in one band entirely: only rows that share a band are compared.
    """
    nobody = len(looks)
    first = np.full(nobody, nobody)
    words = looks.view(np.uint64)
    for band in np.array_split(np.unpackbits(looks, axis=1), bits + 1, axis=1):
        keys = np.ascontiguousarray(np.packbits(band, axis=1))
        _, group = np.unique(keys.view(f"V{keys.shape[1]}").ravel(), return_inverse=True)
        by_group = np.argsort(group, kind="stable")
        for members in np.split(by_group, np.flatnonzero(np.diff(group[by_group])) + 1):
            _compare(members, words, bits, first)
    return np.where(first == nobody, -1, first)


def _compare(members: NDArray[np.int64], words: NDArray[np.uint64], bits: int, first: NDArray[np.int64]) -> None:
    """Lowers `first` of each member to the earliest member before it that looks the same."""
    count = len(members)
    step = max(1, COMPARISONS // count)
    for start in range(1, count, step):
        rows = np.arange(start, min(start + step, count))
        differing = np.bitwise_count(words[members[rows], None] ^ words[None, members[: rows[-1]]]).sum(-1)
        alike = (differing <= bits) & (np.arange(rows[-1]) < rows[:, None])
        found = alike.any(axis=1)
        earliest = members[alike.argmax(axis=1)]
        first[members[rows]] = np.where(found, np.minimum(first[members[rows]], earliest), first[members[rows]])
