"""Concepts of tenants, kept in the object store."""

from __future__ import annotations

import re
import time

from instantbooth.storage import ObjectStore, patiently
from serve.errors import not_found
from serve.messages import Encoded
from serve.records import Expiring, Records, born_at, new_id
from serve.schemas import ConceptObject

BEING_ADDED_S = 3600.0
"""Tensors younger than this may still get their record."""
TENSORS = re.compile(r"concepts/([^/]+)/(concept_[0-9a-f]{24})\.safetensors")


class ConceptRecord(ConceptObject, Expiring):
    """What is kept beside the tensors."""


class ConceptStore:
    """Concepts of tenants in the object store: a record each, and a safetensors file beside it.

    The record is written last and deleted last: what a crash leaves of a concept is still known, or is found as
    tensors without a record.
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
        tensors = self.records.key(tenant, record.id, "safetensors")
        patiently(lambda: self.store.put(tensors, encoded.data))
        self.records.put(tenant, record)
        return record

    def load(self, tenant: str, concept_id: str) -> tuple[bytes, int]:
        """A concept's file, and when it expires in Unix seconds. ApiError 404 where there is none."""
        record = self.records.get(tenant, concept_id)
        tensors = self.records.key(tenant, concept_id, "safetensors")
        return patiently(lambda: self.store.get(tensors)), record.expires_at

    def delete(self, tenant: str, concept_id: str) -> None:
        """Removes a concept. ApiError 404 where there is none."""
        if not self.records.exists(tenant, concept_id):
            raise not_found("concept", concept_id)
        self._remove(tenant, concept_id)

    def delete_expired(self) -> None:
        """Removes every concept whose time is over, and tensors that a crash left without a record."""
        for tenant, record in self.records.all():
            if record.expired:
                self._remove(tenant, record.id)
        for tenant, concept_id in filter(None, map(_owner, list(self.store.list("concepts/")))):
            if born_at(concept_id) < time.time() - BEING_ADDED_S and not self.records.exists(tenant, concept_id):
                self._remove(tenant, concept_id)

    def _remove(self, tenant: str, concept_id: str) -> None:
        tensors = self.records.key(tenant, concept_id, "safetensors")
        patiently(lambda: self.store.delete(tensors))
        self.records.delete(tenant, concept_id)


def _owner(key: str) -> tuple[str, str] | None:
    """The tenant and concept whose tensors these are; None for other objects."""
    found = TENSORS.fullmatch(key)
    return (found[1], found[2]) if found else None
