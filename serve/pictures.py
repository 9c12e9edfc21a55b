"""Pictures on their way out: in the answer as base64, or kept for a while behind a signed url."""

from __future__ import annotations

import base64
import hmac
import re
import time
from hashlib import sha256

from instantbooth.errors import MissingObjectError
from instantbooth.storage import ObjectStore, patiently
from serve.errors import ApiError, not_found
from serve.records import born_at

NAME = re.compile(r"(?P<id>(?:file|job)_[0-9a-f]{24})-\d{1,2}\.(?P<format>png|jpeg|webp)")
PREFIX = "/v1/images/files"


class PictureStore:
    """Finished pictures of tenants, under names that tell their age: `files/<tenant>/<id>-<index>.<format>`."""

    def __init__(self, store: ObjectStore, secret: str) -> None:
        self.store = store
        self._secret = secret.encode()

    def put(self, tenant: str, name: str, data: bytes) -> None:
        """Keeps a picture."""
        patiently(lambda: self.store.put(f"files/{tenant}/{name}", data))

    def get(self, tenant: str, name: str) -> bytes:
        """A picture's bytes. ApiError 404 where there is none."""
        if not NAME.fullmatch(name):
            raise not_found("picture", name)
        try:
            return patiently(lambda: self.store.get(f"files/{tenant}/{name}"))
        except MissingObjectError:
            raise not_found("picture", name) from None

    def path(self, tenant: str, name: str, expires: int) -> str:
        """A path of this server that shows the picture to whoever has it, until `expires`."""
        return f"{PREFIX}/{tenant}/{name}?expires={expires}&signature={self._signature(tenant, name, expires)}"

    def check(self, tenant: str, name: str, expires: int, signature: str) -> None:
        """ApiError 401 for a path that was not signed here, 404 for one that has expired."""
        if not hmac.compare_digest(signature.encode(), self._signature(tenant, name, expires).encode()):
            raise ApiError(401, "invalid_signature", "the url's signature is wrong; use the url as it was given")
        if expires <= time.time():
            raise not_found("picture", name)

    def delete_older(self, ttl_s: dict[str, int]) -> None:
        """Removes pictures of each kind that are older than its time to live."""
        for key in list(self.store.list("files/")):
            parts = NAME.fullmatch(key.rpartition("/")[2])
            if parts and born_at(parts["id"]) + ttl_s[parts["id"].partition("_")[0]] <= time.time():
                patiently(lambda key=key: self.store.delete(key))

    def _signature(self, tenant: str, name: str, expires: int) -> str:
        return hmac.new(self._secret, f"{tenant}/{name}?{expires}".encode(), sha256).hexdigest()


def base64_of(data: bytes) -> str:
    """As JSON carries it."""
    return base64.b64encode(data).decode()
