"""Errors on their way to a client: one shape, the status that HTTP has for it, and nothing of the inside."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import ValidationError

from instantbooth.errors import (
    ConceptError,
    DeadlineError,
    EngineError,
    ImageError,
    InputError,
    InstantBoothError,
    MissingObjectError,
    OverloadedError,
    PictureError,
    StorageError,
)
from serve.schemas import ErrorBody, ErrorObject, ErrorType

TYPES: dict[int, ErrorType] = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
RETRY_AFTER_S = 2


class ApiError(InstantBoothError):
    """An answer other than success. Picklable: it crosses from replica to replica."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after_s = RETRY_AFTER_S if retry_after_s is None and status in (429, 503) else retry_after_s

    def __reduce__(self) -> tuple[Callable[..., ApiError], tuple[object, ...]]:
        return type(self), (self.status, self.code, self.message, self.param, self.retry_after_s)

    @property
    def headers(self) -> dict[str, str]:
        """What HTTP wants beside the body."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    @property
    def body(self) -> ErrorBody:
        """The envelope."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return ErrorBody(error=ErrorObject(message=self.message, type=kind, param=self.param, code=self.code))


def not_found(what: str, name: str) -> ApiError:
    """404; said of what belongs to others too."""
    return ApiError(404, "not_found", f"there is no {what} {name[:80]!r}; check the id, it may be deleted or expired")


def of_validation(error: ValidationError) -> ApiError:
    """422 for the first thing wrong with a body."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(map(str, first["loc"])) or None
    reason = first["msg"].removeprefix("Value error, ")
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return ApiError(422, "unknown_parameter", f"there is no parameter {param!r}; remove it{more}", param)
    where = f"{param}: " if param else ""
    return ApiError(422, "invalid_value", f"{where}{reason}{more}; see the limits at /v1/models", param)


def of_exception(error: BaseException) -> ApiError:
    """Whatever went wrong, as a client may know it. Unknown defects become 500 and say nothing of themselves."""
    # Ray raises a replica's error as a subclass whose text is the remote traceback; its cause is the error itself.
    error = getattr(error, "cause", error)
    if isinstance(error, ApiError):
        return error
    for kind, status, code in (
        (ImageError, 422, "invalid_image"),
        (InputError, 422, "invalid_value"),
        (ConceptError, 409, "concept_mismatch"),
        (OverloadedError, 429, "overloaded"),
        (DeadlineError, 504, "deadline_exceeded"),
        (PictureError, 500, "picture"),
    ):
        if isinstance(error, kind):
            return ApiError(status, code, str(error), _param(error))
    if isinstance(error, EngineError):
        return ApiError(503, "engine", "the replica stopped before the picture was finished; try again later")
    if isinstance(error, TimeoutError):
        return ApiError(504, "deadline_exceeded", "the request was not finished by its deadline; raise deadline_s")
    if isinstance(error, MissingObjectError):
        return ApiError(404, "not_found", "an object behind this request is gone; it was deleted or has expired")
    if isinstance(error, StorageError):
        return ApiError(503, "storage", "the object store does not answer; try again later")
    if type(error).__module__.startswith("ray."):
        # Imported where Ray is there already: who makes keys shall not wait for it.
        from ray.serve.exceptions import BackPressureError

        if isinstance(error, BackPressureError):
            return ApiError(429, "overloaded", "too many calls wait for a replica; try again later")
        return ApiError(503, "unavailable", "no replica can take the request now; try again later")
    if type(error).__module__ == "torch":
        # So is torch.
        from torch import OutOfMemoryError

        if isinstance(error, OutOfMemoryError):
            return ApiError(503, "out_of_memory", "memory does not suffice now; ask for less, or try again later")
    return ApiError(500, "internal", "the server failed; try again, and report the request id if it fails again")


def _param(error: BaseException) -> str | None:
    """The field that a library's message begins with, such as 'seed must be …'."""
    word = str(error).partition(" ")[0]
    known = ("prompt", "negative_prompt", "seed", "class_noun", "adapter_scale", "concept_scale", "guidance_scale")
    return {"width": "size", "height": "size"}.get(word, word if word in (*known, "num_inference_steps") else None)
