"""How many rows of a job have failed, over all its runs."""

from __future__ import annotations

import json
import time

from instantbooth.errors import MissingObjectError, StorageError
from instantbooth.storage import ObjectStore, patiently

FAILURES = "_FAILURES.json"
EVERY_S = 5.0
"""Seconds between two writes: what a killed run did not write, the next one does not count."""


class FailedRows:
    """A count that the output keeps: what has failed is settled, and a later run does not look at it again."""

    def __init__(self, store: ObjectStore, job: str) -> None:
        """What earlier runs of this job have counted. StorageError where that cannot be read."""
        self._store = store
        self._job = job
        self._due = 0.0
        self._saved = True
        self.count, self._open = self._read()

    def add(self, row: str, *, is_open: bool) -> None:
        """Counts a row in, once: one with pictures that are still open may fail again."""
        self.count += row not in self._open
        if is_open:
            self._open.add(row)
        else:
            self._open.discard(row)
        self._saved = False
        if time.monotonic() >= self._due:
            self.save()
            self._due = time.monotonic() + EVERY_S

    def save(self) -> None:
        """Writes the count, if it is another than was written. StorageError where the store does not take it."""
        if self._saved:
            return
        data = json.dumps({"job": self._job, "failed": self.count, "open": sorted(self._open)}).encode()
        patiently(lambda: self._store.put(FAILURES, data))
        self._saved = True

    def _read(self) -> tuple[int, set[str]]:
        """The count, and the ids of those among them that a run will look at again."""
        try:
            kept = json.loads(patiently(lambda: self._store.get(FAILURES)))
            return (int(kept["failed"]), set(kept["open"])) if kept["job"] == self._job else (0, set())
        except MissingObjectError:
            return 0, set()
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(f"{self._store.uri(FAILURES)} is damaged ({error}); delete it") from error
