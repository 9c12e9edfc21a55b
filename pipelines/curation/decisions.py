"""What became of all pairs of a data set, in columns: the last decisions, which no pair allows alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from instantbooth.errors import StorageError
from pipelines.curation.duplicates import LOOK_BYTES, find_duplicates
from pipelines.curation.pairs import Reason
from pipelines.curation.shards import FATE, TRAIN, VALIDATION, Draft, staged_key
from pipelines.curation.sources import open_filesystem

READERS = 16
"""Staged slices whose columns are read at a time."""


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A staged slice."""

    digest: str
    source: str
    """Key of the file that it was cut from."""


class Decisions:
    """Every pair of some staged slices, in their order; about 200 bytes of memory a pair."""

    def __init__(self, output: str, slices: Sequence[Staged], *, near_bits: int, validation: float) -> None:
        """Reads the slices' columns from the output and decides about duplicates and the split.

        Raises StorageError where a slice cannot be read.
        """
        self.slices = slices
        tables = _read_fates(output, slices)
        self.table = pa.concat_tables([FATE.empty_table(), *tables]).combine_chunks()
        self.starts = np.cumsum([0, *(table.num_rows for table in tables)])
        self.reasons = np.array(self.table["reason"].to_pylist(), dtype=object)
        self.original = np.full(len(self.reasons), -1)
        """For each duplicate the pair that it is one of, else −1."""
        self._find_duplicates(near_bits)
        self.kept: NDArray[np.int64] = np.flatnonzero(self.reasons == "")
        heads = [int(digest[:15] or "0", 16) / 16**15 for digest in self.table["picture"].to_pylist()]
        self.validation: NDArray[np.bool_] = np.array(heads) < validation
        """By the picture's content alone: it stays on its side in every source and whatever its caption."""

    def _find_duplicates(self, near_bits: int) -> None:
        rows = np.flatnonzero(self.reasons == "")
        if not len(rows):
            return
        table = self.table.take(rows)
        found = find_duplicates(
            np.array(table["picture"].to_pylist(), dtype="S64"),
            np.frombuffer(b"".join(table["look"].to_pylist()), dtype=np.uint8).reshape(-1, LOOK_BYTES),
            table["width"].to_numpy().astype(np.int64) * table["height"].to_numpy(),
            np.array(table["id"].to_pylist(), dtype="S64"),
            near_bits,
        )
        for reason, originals in ((Reason.EXACT_DUPLICATE, found.exact), (Reason.NEAR_DUPLICATE, found.near)):
            duplicates = originals >= 0
            self.reasons[rows[duplicates]] = reason.value
            self.original[rows[duplicates]] = rows[originals[duplicates]]

    def dropped(self) -> dict[str, int]:
        """Reason → pairs, the most frequent first."""
        counts = Counter(self.reasons[self.reasons != ""].tolist())
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def counts(self, column: str) -> dict[str, int]:
        """Value → kept pairs, the most frequent first."""
        counts = Counter(self.table[column].take(self.kept).to_pylist())
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def place(self, row: int) -> tuple[int, int]:
        """The slice of a pair, and its place there."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return number, row - int(self.starts[number])

    def name(self, row: int) -> str:
        """What a pair is called, and the file that it is of."""
        number, _ = self.place(row)
        return f"{self.table['name'][row].as_py()} of {self.slices[number].source}"

    def drafts(self, form: str) -> Iterator[Draft]:
        """The shards of every slice; `form` is the digest of whatever else decides their bytes."""
        for number, piece in enumerate(self.slices):
            start, end = self.starts[number], self.starts[number + 1]
            kept = self.reasons[start:end] == ""
            held_out = self.validation[start:end]
            yield Draft(
                slice=piece.digest,
                source=piece.source,
                splits={
                    TRAIN: tuple(np.flatnonzero(kept & ~held_out).tolist()),
                    VALIDATION: tuple(np.flatnonzero(kept & held_out).tolist()),
                },
                duplicates={
                    int(place): (self.reasons[start + place], self.likeness(start + place))
                    for place in np.flatnonzero(self.original[start:end] >= 0)
                },
                some_dropped=not kept.all(),
                format=form,
            )

    def likeness(self, row: int) -> str:
        """What a duplicate is one of, in words."""
        alike = "has the same bytes as" if self.reasons[row] == Reason.EXACT_DUPLICATE else "looks like"
        return f"{alike} {self.name(int(self.original[row]))}"


def _read_fates(output: str, slices: Sequence[Staged]) -> list[pa.Table]:
    filesystem, root = open_filesystem(output)

    def read(piece: Staged) -> pa.Table:
        try:
            with filesystem.open_input_file(f"{root}/{staged_key(piece.digest)}") as file:
                return pq.read_table(file, columns=FATE.names)
        except (OSError, pa.ArrowException) as error:
            key = staged_key(piece.digest)
            raise StorageError(f"cannot read {key} in {output}: {error}; name another output folder") from error

    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(read, slices))
