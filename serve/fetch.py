"""Photos by url: only from hosts that the operator named, over HTTPS, without following anywhere else."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from serve.errors import ApiError

TIMEOUT_S = 10.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        """None: the redirect is an error."""


def fetch(url: str, hosts: Sequence[str], max_bytes: int) -> bytes:
    """What lies at the url. ApiError 422 where its host is not named, or it cannot be had."""
    parts = _split(url)
    if parts.scheme != "https" or parts.hostname not in hosts or parts.username is not None:
        rule = "only https from the hosts in image_hosts is fetched"
        raise _error(f"image_url {url[:80]!r} is refused: {rule}; upload the file in the field image")
    opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_S) as response:
            data: bytes = response.read(max_bytes + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _error(f"image_url {url[:80]!r} cannot be had; upload the file in the field image") from error
    if len(data) > max_bytes:
        raise ApiError(413, "file_too_large", f"image_url has over {max_bytes} bytes; resize it", "image_url")
    return data


def _split(url: str) -> Any:
    try:
        return urlsplit(url)
    except ValueError:
        raise _error(f"image_url {url[:80]!r} is no url; upload the file in the field image") from None


def _error(message: str) -> ApiError:
    return ApiError(422, "invalid_image_url", message, "image_url")
