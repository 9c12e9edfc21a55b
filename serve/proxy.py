"""Errors of Ray's own HTTP proxy, in the shape of all others.

The proxy answers by itself where no replica does: in plain text, or, where a replica died over the request, not at all.
Ray calls `middlewares` in each proxy where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.proxy:middlewares is in the
environment that Ray was started from.
"""

from __future__ import annotations

import logging

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError

logger = logging.getLogger("ray.serve")

LOST = ApiError(503, "replica_lost", "the replica that worked on this request was lost; send it again")
KNOWN = {
    408: ApiError(408, "timeout", "the request took longer than the server waits; ask for less, or submit a job"),
    429: ApiError(429, "overloaded", "too many requests are under way; try again later"),
    503: ApiError(503, "unavailable", "no replica can take the request now; try again later"),
}


def middlewares() -> list[Middleware]:
    """What Ray puts around its proxy."""
    return [Middleware(OneShape)]


class OneShape:
    """ASGI middleware: an error that is not JSON becomes an ErrorBody of the same status, and silence becomes 503."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = replaced = False

        async def shaped(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                started = True
                headers = Headers(raw=message["headers"])
                if message["status"] >= 400 and not headers.get("content-type", "").startswith("application/json"):
                    replaced = True
                    await _answer(message["status"], headers)(scope, receive, send)
            if not replaced:
                await send(message)

        try:
            await self.app(scope, receive, shaped)
        except Exception:
            if started:
                raise
            logger.exception("the proxy failed")
        if not started:
            await _respond(LOST)(scope, receive, send)


def _answer(status: int, headers: Headers) -> Response:
    """The envelope in place of a text; what Ray says of when to come back, and which request it was, stays."""
    error = KNOWN.get(status) or ApiError(status, "proxy", f"the server answers {status}; see /openapi.json")
    kept = {name: headers[name] for name in ("Retry-After", "X-Request-ID") if name in headers}
    return _respond(error, kept)


def _respond(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    return Response(
        error.body.model_dump_json(), error.status, error.headers | (headers or {}), media_type="application/json"
    )
