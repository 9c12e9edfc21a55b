"""What surrounds every route: one shape for errors, a limit on bodies, and keys."""

from __future__ import annotations

import logging
from http import HTTPStatus

from fastapi.exceptions import RequestValidationError
from prometheus_client import Counter
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError, of_exception
from serve.keys import LOCAL, Keyring, check_local
from serve.pictures import PREFIX

logger = logging.getLogger("ray.serve")


def answer(body: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A body as JSON."""
    return Response(body.model_dump_json(), status, headers, media_type="application/json")


class Errors:
    """Turns whatever was raised into an ErrorBody, counted by its code."""

    def __init__(self, rejections: Counter) -> None:
        self.rejections = rejections

    async def handle(self, request: Request, error: Exception) -> Response:
        """The answer to an error of a route, or of the framework before it."""
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            param = str(first["loc"][-1])
            error = ApiError(422, "invalid_value", f"{param}: {first['msg']}; see /openapi.json", param)
        elif isinstance(error, HTTPException):
            name = HTTPStatus(error.status_code).phrase
            message = f"{request.method} {request.url.path[:80]}: {name.lower()}; see /openapi.json"
            headers = error.headers
            error = ApiError(error.status_code, name.lower().replace(" ", "_"), message)
            return self.respond(error, dict(headers or {}))
        return self.respond(error)

    def respond(self, error: Exception, headers: dict[str, str] | None = None) -> Response:
        """The answer to any other error."""
        found = self.known(error)
        return answer(found.body, found.status, found.headers | (headers or {}))

    def known(self, error: Exception) -> ApiError:
        """An error as its client may know it; counted, and logged where it is a defect of this process."""
        found = of_exception(error)
        self.rejections.labels(found.code).inc()
        if found.status == 500 and (found is not error or error.__cause__ is not None):
            logger.error("a request failed", exc_info=error)
        return found


class Envelope:
    """ASGI middleware: what the checks before the routes raise is answered too."""

    def __init__(self, app: ASGIApp, errors: Errors) -> None:
        self.app = app
        self.errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noticed(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, noticed)
        except Exception as error:
            if scope["type"] != "http" or started:
                raise
            await self.errors.respond(error)(scope, receive, send)


class BodyLimit:
    """ASGI middleware: a body over the limit ends in 413, by its announced length or by what arrives."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self.max_bytes:
            raise self._error()
        arrived = 0

        async def counted() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > self.max_bytes:
                raise self._error()
            return message

        await self.app(scope, counted, send)

    def _error(self) -> ApiError:
        return ApiError(
            413, "body_too_large", f"a request may have {self.max_bytes} bytes; send fewer or smaller files"
        )


class Keys:
    """ASGI middleware: whoever calls /v1/ is a tenant, whose name the routes find in request.state."""

    def __init__(self, app: ASGIApp, keys: Keyring) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if self.keys.open:
                check_local((scope.get("client") or ("", 0))[0], headers.get("host"), headers.get("origin"))
            if scope["path"].startswith("/v1/") and not scope["path"].startswith(f"{PREFIX}/"):
                tenant = LOCAL if self.keys.open else self.keys.tenant(headers.get("authorization"))
                scope.setdefault("state", {})["tenant"] = tenant
        await self.app(scope, receive, send)
