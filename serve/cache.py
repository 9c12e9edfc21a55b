"""The concepts that a diffusion replica holds."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from instantbooth import Concept
from serve.concepts import ConceptStore

CACHED_CONCEPTS = 512
"""Concepts kept in memory: 0.8 MB for each photo at most."""


class ConceptCache:
    """The concepts a diffusion replica used last. One that was deleted or has expired is forgotten."""

    def __init__(self, store: ConceptStore, forgotten: Callable[[str], None], capacity: int = CACHED_CONCEPTS) -> None:
        """`forgotten` is told the digest of a concept that left: it must leave the caches behind too."""
        self.store = store
        self._forgotten = forgotten
        self._capacity = capacity
        self._entries: OrderedDict[tuple[str, str], tuple[Concept, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, tenant: str, concept_id: str) -> tuple[Concept, bool]:
        """A concept, and whether it was here already. ApiError 404 where there is none."""
        key = (tenant, concept_id)
        with self._lock:
            if key in self._entries and self._entries[key][1] > time.time():
                self._entries.move_to_end(key)
                return self._entries[key][0], True
        data, expires_at = self.store.load(tenant, concept_id)
        concept = Concept.from_bytes(data, name=f"concept {concept_id}")
        pushed_out = []
        with self._lock:
            self._entries[key] = (concept, expires_at)
            while len(self._entries) > self._capacity:
                pushed_out.append(self._entries.popitem(last=False)[1][0])
        for each in pushed_out:
            self._forgotten(each.digest)
        return concept, False

    def holds(self, tenant: str, concept_id: str) -> bool:
        """Whether a concept is here."""
        with self._lock:
            return (tenant, concept_id) in self._entries

    def forget(self, tenant: str, concept_id: str) -> None:
        """Drops a concept from here and the caches behind."""
        with self._lock:
            entry = self._entries.pop((tenant, concept_id), None)
        if entry is not None:
            self._forgotten(entry[0].digest)

    def sweep(self) -> None:
        """Forgets what the store no longer has: word of a deletion may have got lost."""
        with self._lock:
            held = [(key, expires_at) for key, (_, expires_at) in self._entries.items()]
        for key, expires_at in held:
            if expires_at <= time.time() or not self.store.records.exists(*key):
                self.forget(*key)
