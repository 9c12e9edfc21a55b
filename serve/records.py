"""Records of tenants in the object store: JSON under `<kind>s/<tenant>/<id>.json`, with ids that sort by time."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from functools import partial
from typing import Generic, TypeVar

from pydantic import BaseModel

from instantbooth.errors import MissingObjectError
from instantbooth.storage import ObjectStore, patiently
from serve.errors import not_found

ID = re.compile(r"[a-z]+_[0-9a-f]{24}")


class Expiring(BaseModel):
    """What every record tells."""

    id: str
    expires_at: int
    """Unix seconds."""

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires_at <= time.time()


Record = TypeVar("Record", bound=Expiring)


def new_id(kind: str) -> str:
    """`kind`_ and 24 hexadecimal digits: milliseconds since 1970, then chance."""
    return f"{kind}_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(6)}"


def born_at(record_id: str) -> float:
    """When an id was made, in Unix seconds."""
    return int(record_id.rpartition("_")[2][:12], 16) / 1000


class Records(Generic[Record]):
    """Records of one kind; one that has expired is not there. Every method may raise StorageError."""

    def __init__(self, store: ObjectStore, kind: str, model: type[Record]) -> None:
        self.store = store
        self.kind = kind
        self._model = model

    def key(self, tenant: str, record_id: str, suffix: str = "json") -> str:
        """Where a record lies. ApiError 404 for text that is no id."""
        if not ID.fullmatch(record_id):
            raise not_found(self.kind, record_id)
        return f"{self.kind}s/{tenant}/{record_id}.{suffix}"

    def put(self, tenant: str, record: Record) -> None:
        """Writes or replaces a record."""
        key, data = self.key(tenant, record.id), record.model_dump_json().encode()
        patiently(lambda: self.store.put(key, data))

    def get(self, tenant: str, record_id: str) -> Record:
        """A record. ApiError 404 where there is none."""
        record = self.find(tenant, record_id)
        if record is None:
            raise not_found(self.kind, record_id)
        return record

    def find(self, tenant: str, record_id: str) -> Record | None:
        """A record, if there is one. ApiError 404 for text that is no id."""
        record = self._read(self.key(tenant, record_id))
        return None if record is None or record.expired else record

    def exists(self, tenant: str, record_id: str) -> bool:
        """Whether the store holds the record, expired or not."""
        return patiently(partial(self.store.exists, self.key(tenant, record_id)))

    def delete(self, tenant: str, record_id: str) -> None:
        """Removes a record, if it is there."""
        patiently(partial(self.store.delete, self.key(tenant, record_id)))

    def page(self, tenant: str, limit: int, after: str | None) -> tuple[list[Record], bool]:
        """The newest records older than `after`, and whether there are more."""
        keys = sorted(self._keys(f"{self.kind}s/{tenant}/"), reverse=True)
        found: list[Record] = []
        for key in keys:
            if after is not None and key >= f"{self.kind}s/{tenant}/{after}.json":
                continue
            record = self._read(key)
            if record is not None and not record.expired:
                if len(found) == limit:
                    return found, True
                found.append(record)
        return found, False

    def all(self) -> Iterator[tuple[str, Record]]:
        """Every tenant and record, expired ones included."""
        for key in self._keys(f"{self.kind}s/"):
            record = self._read(key)
            if record is not None:
                yield key.split("/")[1], record

    def expired(self, ttl_s: int) -> Iterator[tuple[str, Record]]:
        """Every tenant and record whose time is over, of records that live `ttl_s` seconds: none younger is read."""
        for key in self._keys(f"{self.kind}s/"):
            record_id = key.rpartition("/")[2].removesuffix(".json")
            if not ID.fullmatch(record_id) or born_at(record_id) + ttl_s > time.time():
                continue
            record = self._read(key)
            if record is not None and record.expired:
                yield key.split("/")[1], record

    def delete_if_expired(self, tenant: str, record_id: str) -> None:
        """Removes a record whose time is over."""
        record = self._read(self.key(tenant, record_id))
        if record is not None and record.expired:
            self.delete(tenant, record_id)

    def _keys(self, prefix: str) -> list[str]:
        return [key for key in self.store.list(prefix) if key.endswith(".json")]

    def _read(self, key: str) -> Record | None:
        try:
            return self._model.model_validate_json(patiently(partial(self.store.get, key)))
        except MissingObjectError:
            return None
