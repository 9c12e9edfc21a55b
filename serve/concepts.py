"""Concepts of tenants, kept in the object store."""

from __future__ import annotations

import re
import time

from instantbooth.storage import ObjectStore, patiently
from serve.messages import Encoded
from serve.records import Expiring, Records, new_id
from serve.schemas import ConceptObject

MARK = re.compile(r"expiries/(\d{12})/([^/]+)/(concept_[0-9a-f]{24})")


class ConceptRecord(ConceptObject, Expiring):
    """What is kept beside the tensors."""


class ConceptStore:
    """Concepts of tenants in the object store: a record each, and a safetensors file beside it.

        concepts/<tenant>/<id>.safetensors
        concepts/<tenant>/<id>.json             ConceptRecord
        expiries/<unix seconds>/<tenant>/<id>   empty, and sorted by when the concept ends

    The mark is written first and deleted last: whatever a crash leaves of a concept is found when its time is over.
    """

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.records = Records(store, "concept", ConceptRecord)

    def add(
        self, tenant: str, encoded: Encoded, *, class_noun: str, name: str | None, consent: str | None, ttl_s: int
    ) -> ConceptRecord:
        """Keeps a concept for `ttl_s` seconds."""
        now = int(time.time())
        record = ConceptRecord(
            id=new_id("concept"),
            class_noun=class_noun,
            name=name,
            consent=consent,
            num_images=encoded.num_images,
            digest=encoded.digest,
            created_at=now,
            expires_at=now + ttl_s,
        )
        mark, tensors = _mark(tenant, record), self.records.key(tenant, record.id, "safetensors")
        patiently(lambda: self.store.put(mark, b""))
        patiently(lambda: self.store.put(tensors, encoded.data))
        self.records.put(tenant, record)
        if record.expired:
            # The store took so long that the mark may be gone already.
            self._remove(tenant, record.id, mark)
        return record

    def load(self, tenant: str, concept_id: str) -> tuple[bytes, int]:
        """A concept's file, and when it expires in Unix seconds. ApiError 404 where there is none."""
        record = self.records.get(tenant, concept_id)
        tensors = self.records.key(tenant, concept_id, "safetensors")
        return patiently(lambda: self.store.get(tensors)), record.expires_at

    def delete(self, tenant: str, concept_id: str) -> None:
        """Removes a concept. ApiError 404 where there is none."""
        self._remove(tenant, concept_id, _mark(tenant, self.records.get(tenant, concept_id)))

    def delete_expired(self) -> None:
        """Removes every concept whose time is over; looks at no other."""
        for mark in self.store.list("expiries/"):
            if found := MARK.fullmatch(mark):
                if int(found[1]) > time.time():
                    return
                self._remove(found[2], found[3], mark)

    def _remove(self, tenant: str, concept_id: str, mark: str) -> None:
        tensors = self.records.key(tenant, concept_id, "safetensors")
        patiently(lambda: self.store.delete(tensors))
        self.records.delete(tenant, concept_id)
        patiently(lambda: self.store.delete(mark))


def _mark(tenant: str, record: ConceptRecord) -> str:
    return f"expiries/{record.expires_at:012d}/{tenant}/{record.id}"
