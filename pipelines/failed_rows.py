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
    """A count that the output keeps: a failed row is settled, and a later run does not look at it again."""

    def __init__(self, store: ObjectStore, job: str) -> None:
        """What earlier runs of this job have counted. StorageError where that cannot be read."""
        self._store = store
        self._job = job
        self._due = 0.0
        self.count = self._read()

    def add(self) -> None:
        """Counts a row in."""
        self.count += 1
        if time.monotonic() >= self._due:
            self.save()
            self._due = time.monotonic() + EVERY_S

    def save(self) -> None:
        """Writes the count. StorageError where the store does not take it."""
        data = json.dumps({"job": self._job, "failed": self.count}).encode()
        patiently(lambda: self._store.put(FAILURES, data))

    def _read(self) -> int:
        try:
            kept = json.loads(patiently(lambda: self._store.get(FAILURES)))
            return int(kept["failed"]) if kept["job"] == self._job else 0
        except MissingObjectError:
            return 0
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(f"{self._store.uri(FAILURES)} is damaged ({error}); delete it") from error
