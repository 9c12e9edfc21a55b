"""Each piece of work is committed once, whoever tried it and how often, on plain object storage.

A piece of work has an id, a digest of all that determines its result. Whoever did it writes the result under a name of
its own, then commits a record that points there, with one conditional write: of all attempts one wins, and readers
trust records only. An answer that got lost on the way is settled by reading the record back. Nothing is ever replaced,
so that every process may be killed at any moment and started again.
"""

from __future__ import annotations

import json
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any, Literal

from instantbooth.errors import ConditionalWriteError, MissingObjectError, StorageError
from instantbooth.storage import Answer, ObjectStore, patiently

RECORDS = "records"
SELF_TEST = f"{RECORDS}/.self-test"
"""What `check_store` leaves, and every output so has."""
READERS = 16
"""Records read at once."""
RIVALS = 4
"""Writers of one object at once, by which `check_store` tests a store."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What became of a piece of work."""

    work: str
    """The work's id."""
    attempt: str
    """Who committed it."""
    status: Literal["succeeded", "failed"]
    key: str | None = None
    """Where the result is, below the same store; None for a failure."""
    sha256: str | None = None
    """Of the result's bytes."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Anything JSON can hold: parameters, timings, or a failure's code and message."""

    def to_bytes(self) -> bytes:
        """One line of JSON."""
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "a record") -> Record:
        """What `to_bytes` gave. StorageError, with `name`, for anything else."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise StorageError(f"{name} is damaged ({error}); delete it to have its work done again") from error


class Ledger:
    """The records of a store, and the writing of results that they point to."""

    def __init__(self, store: ObjectStore, *, conditional: bool = True, pause_s: float = 0.2) -> None:
        """`pause_s` is the first pause before a storage call is repeated; each further one is twice as long.

        With `conditional=False` a write first looks whether there is an object, for stores that cannot do better: of
        two attempts at the same moment the later one's record stays.
        """
        self._store = store
        self._conditional = conditional
        self._pause_s = pause_s

    def check_store(self) -> None:
        """Raises ConditionalWriteError unless the store keeps its word on conditional writes.

        Of several writers at once, in a new output, one is told that it was first; and what is there stays.
        """
        rivals = [secrets.token_bytes(8) for _ in range(RIVALS)]
        with ThreadPoolExecutor(RIVALS) as pool:
            wrote = list(pool.map(partial(self._write, SELF_TEST), rivals))
        first = [rival for rival, was_first in zip(rivals, wrote, strict=True) if was_first]
        found = self._patiently(lambda: self._store.get(SELF_TEST))
        replaced = self._write(SELF_TEST, secrets.token_bytes(8))
        # An answer may have got lost on the way: then none of them was told to be first.
        if replaced or first not in ([], [found]) or self._patiently(lambda: self._store.get(SELF_TEST)) != found:
            raise ConditionalWriteError(
                f"{self._store.uri(SELF_TEST)} was replaced by a conditional write: this store cannot commit work "
                "exactly once; use one that honours If-None-Match, in a bucket without versioning, or a file:// folder"
            )

    def succeed(self, work: str, key: str, data: bytes, details: Mapping[str, Any]) -> Record:
        """Stores a result and commits it; returns the record that counts, which may be another attempt's.

        `key` must name this work and no other: where an earlier attempt left a result there, that one is kept.
        """
        digest = sha256(self.keep(key, data)).hexdigest()
        return self._commit(_record(work, "succeeded", details, key=key, sha256=digest))

    def keep(self, key: str, data: bytes) -> bytes:
        """Stores an object unless there is one; returns the bytes that are there."""
        return data if self._write(key, data) else self._patiently(lambda: self._store.get(key))

    def fail(self, work: str, details: Mapping[str, Any]) -> Record:
        """Commits that the work cannot be done; returns the record that counts."""
        return self._commit(_record(work, "failed", details))

    def find(self, work: str) -> Record | None:
        """The work's record, or None where it is open."""
        try:
            data = self._patiently(lambda: self._store.get(_key(work)))
            return Record.from_bytes(data, name=self._store.uri(_key(work)))
        except MissingObjectError:
            return None

    def find_all(self, works: Iterable[str]) -> Iterator[Record | None]:
        """The same for many, in their order, several at once; as few are held as that takes."""
        ahead: deque[Future[Record | None]] = deque()
        with ThreadPoolExecutor(READERS) as pool:
            for work in works:
                ahead.append(pool.submit(self.find, work))
                if len(ahead) > 2 * READERS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def committed(self) -> Iterator[str]:
        """Ids of the work that is settled, from one listing: to be spared, never to be counted on."""
        prefix = f"{RECORDS}/"
        names = (key.removeprefix(prefix) for key in self._store.list(prefix))
        return (name.partition("/")[2].removesuffix(".json") for name in names if name.endswith(".json"))

    def _commit(self, record: Record) -> Record:
        if self._write(_key(record.work), record.to_bytes()) and self._conditional:
            return record
        # Another attempt was first, or this one, and its answer got lost: the record says which.
        committed = self.find(record.work)
        if committed is None:
            raise StorageError(f"{self._store.uri(_key(record.work))} exists, and cannot be read; check the store")
        return committed

    def _write(self, key: str, data: bytes) -> bool:
        if self._conditional:
            return self._patiently(lambda: self._store.put_if_absent(key, data))
        if self._patiently(lambda: self._store.exists(key)):
            return False
        self._patiently(lambda: self._store.put(key, data))
        return True

    def _patiently(self, operation: Callable[[], Answer]) -> Answer:
        return patiently(operation, pause_s=self._pause_s)


def digest_of(*parts: object) -> str:
    """128 bits of SHA-256 over what determines a result, JSON values in their order, in hexadecimal."""
    return sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]


def _record(work: str, status: Literal["succeeded", "failed"], details: Mapping[str, Any], **result: str) -> Record:
    return Record(work=work, attempt=secrets.token_hex(8), status=status, details=details, **result)


def _key(work: str) -> str:
    return f"{RECORDS}/{work[:2]}/{work}.json"
