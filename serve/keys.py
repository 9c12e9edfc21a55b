"""API keys: `python -m serve.keys` makes one, and the server knows only its hash.

Keys are 256 random bits, so that a plain SHA-256 of one cannot be searched.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping, Sequence
from hashlib import sha256

from serve.errors import ApiError

LOCAL = "local"
"""The only tenant of a server without keys."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Keyring:
    """Who is calling: tenants by the hashes of their keys."""

    def __init__(self, hashes: Mapping[str, Sequence[str]]) -> None:
        """`hashes` are SHA-256 in hexadecimal; a tenant may have several keys, to change them without a gap."""
        self._hashes = [(bytes.fromhex(each), tenant) for tenant, several in hashes.items() for each in several]

    @property
    def open(self) -> bool:
        """Whether there are no keys, and so only this machine is served."""
        return not self._hashes

    def tenant(self, authorization: str | None) -> str:
        """The tenant of an Authorization header, in the same time for every wrong key. ApiError 401 without one."""
        scheme, _, key = (authorization or "").partition(" ")
        digest = sha256(key.strip().encode()).digest()
        found = None
        for known, tenant in self._hashes:
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None or scheme.lower() != "bearer":
            reason = "is unknown" if key else "is missing"
            raise ApiError(401, "invalid_api_key", f"the API key {reason}; send Authorization: Bearer KEY")
        return found


def check_local(client: str | None, host: str | None, origin: str | None) -> None:
    """Lets only programs and pages of this machine in: the rule of a server without keys.

    The names in Host and Origin keep other sites' pages out, which a browser on this machine may have open.
    """
    origin_host = (origin or "").partition("://")[2]
    names = [client or "", _name(host or "")] + ([_name(origin_host)] if origin else [])
    if not all(name in LOOPBACK for name in names):
        raise ApiError(401, "local_only", "this server has no API keys and serves its own machine alone; give it keys")


def new_key() -> tuple[str, str]:
    """A key for a client, and its hash for the server."""
    key = f"ib-{secrets.token_urlsafe(32)}"
    return key, sha256(key.encode()).hexdigest()


def _name(host: str) -> str:
    """The name in name:port; [::1] has brackets and colons of its own."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


if __name__ == "__main__":
    key, digest = new_key()
    print(f"key, for the client: {key}\nSHA-256, for the server's configuration: {digest}")
