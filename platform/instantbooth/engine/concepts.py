"""Concepts' keys and values, kept for the next step that needs them."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from instantbooth import Concept, Personalizer
from instantbooth.model.adapter import KeysValues


class KeysValuesCache:
    """The most recently used concepts' keys and values for one set of weights, up to a number of bytes.

    An entry that was pushed out is computed anew when it is next asked for; rows never notice.
    """

    def __init__(self, booth: Personalizer, capacity_bytes: int) -> None:
        self._booth = booth
        self._capacity = capacity_bytes
        self._entries: OrderedDict[str, dict[str, KeysValues]] = OrderedDict()
        self._lock = Lock()
        self.bytes = 0
        """Held now."""
        self.hits = 0
        self.misses = 0

    def get(self, concept: Concept, *, counted: bool = True) -> dict[str, KeysValues]:
        """The concept's keys and values in every adapter; `counted` among the hits or misses, or not."""
        key = concept.digest
        with self._lock:
            if key in self._entries:
                self.hits += counted
                self._entries.move_to_end(key)
                return self._entries[key]
            self.misses += counted
        entry = self._booth.keys_values(concept)
        with self._lock:
            if key not in self._entries:
                self._entries[key] = entry
                self.bytes += size_of(entry)
            while self.bytes > self._capacity and self._entries:
                self.bytes -= size_of(self._entries.popitem(last=False)[1])
        return entry

    def discard(self, concept_digest: str) -> None:
        """Forgets a concept, where it is known: it was deleted."""
        with self._lock:
            entry = self._entries.pop(concept_digest, None)
            self.bytes -= size_of(entry) if entry else 0


def size_of(keys_values: dict[str, KeysValues]) -> int:
    """Bytes of a concept's keys and values."""
    return sum(tensor.nbytes for pair in keys_values.values() for tensor in pair)
