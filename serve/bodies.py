"""Reading what clients send, as JSON or as forms, and telling OpenAPI about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from serve.errors import ApiError, of_validation
from serve.schemas import ImageParameters, Strict

MAX_FIELDS = 64
MAX_KEY_CHARS = 255
MAX_JSON_BYTES = 65_536
"""Several times what the longest prompts take."""

Body = TypeVar("Body", bound=BaseModel)


class ConceptForm(Strict):
    """POST /v1/concepts, its files apart."""

    class_noun: str = Field(default="person", max_length=40)
    name: str | None = Field(default=None, max_length=100)
    consent: str | None = Field(default=None, max_length=500)
    ttl_s: int | None = Field(default=None, ge=1)


class EditForm(ImageParameters):
    """POST /v1/images/edits, its files apart."""

    class_noun: str = Field(default="person", max_length=40)


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of a form."""

    images: tuple[bytes, ...]
    masks: tuple[bytes, ...] | None
    urls: tuple[str, ...]

    @property
    def contents(self) -> tuple[bytes, ...]:
        """What tells them from others, in their order."""
        return (*self.images, *(url.encode() for url in self.urls))


async def read_json(request: Request, model: type[Body]) -> Body:
    """The body. ApiError 415 for another type, 413 for more than MAX_JSON_BYTES, 400 for text that is no JSON object,
    422 for a wrong value.
    """
    _check_type(request, "application/json")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_JSON_BYTES:
            raise ApiError(413, "body_too_large", f"a JSON body may have {MAX_JSON_BYTES} bytes; shorten it")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise ApiError(400, "invalid_json", "the body is no JSON; send one JSON object") from None
    if not isinstance(content, dict):
        raise ApiError(400, "invalid_json", f"the body is a JSON {type(content).__name__}; send one object")
    return _validated(model, content)


async def read_form(request: Request, model: type[Body], *, max_files: int, max_bytes: int) -> tuple[Body, Files]:
    """Fields and files. ApiError 415, 400 and 422 as for JSON, 413 for a file over `max_bytes`."""
    _check_type(request, "multipart/form-data")
    fields: dict[str, str] = {}
    files: dict[str, list[bytes]] = {"image": [], "mask": []}
    urls = []
    async with request.form(max_files=2 * max_files + 1, max_fields=MAX_FIELDS) as form:
        for field, value in form.multi_items():
            name = field.removesuffix("[]")
            if isinstance(value, UploadFile):
                files.setdefault(name, []).append(await _read(value, name, max_bytes))
            elif name == "image_url":
                urls.append(value)
            elif name in files:
                raise ApiError(422, "invalid_value", f"{name} is text; send a file, and urls in image_url", name)
            else:
                fields[field] = value
    if unknown := files.keys() - {"image", "mask"}:
        name = min(unknown)
        raise ApiError(422, "unknown_parameter", f"there is no file {name!r}; send image and mask", name)
    if not 1 <= (count := len(files["image"]) + len(urls)) <= max_files:
        raise ApiError(422, "invalid_value", f"image: {count} files were sent; send 1 to {max_files}", "image")
    body = _validated(model, fields)
    return body, Files(images=tuple(files["image"]), masks=tuple(files["mask"]) or None, urls=tuple(urls))


def idempotency_key(request: Request) -> str | None:
    """The header Idempotency-Key. ApiError 400 for one that is empty or too long."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= MAX_KEY_CHARS:
        raise ApiError(
            400, "invalid_idempotency_key", f"Idempotency-Key has {len(key)} characters; send 1 to {MAX_KEY_CHARS}"
        )
    return key


def json_of(model: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI's request body for `read_json`."""
    return _request_body("application/json", model.model_json_schema())


def form_of(model: type[BaseModel], *, masks: bool) -> dict[str, Any]:
    """OpenAPI's request body for `read_form`."""
    schema = model.model_json_schema()
    file = {"type": "string", "format": "binary"}
    schema["properties"]["image"] = {"type": "array", "items": file, "minItems": 1}
    if masks:
        schema["properties"]["mask"] = {"type": "array", "items": file}
    schema["required"] = [*schema.get("required", ()), "image"]
    return _request_body("multipart/form-data", schema)


def _request_body(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def _check_type(request: Request, wanted: str) -> None:
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found != wanted:
        raise ApiError(415, "unsupported_media_type", f"Content-Type is {found[:80]!r}; send {wanted}")


def _validated(model: type[Body], content: dict[str, Any]) -> Body:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise of_validation(error) from None


async def _read(file: UploadFile, name: str, max_bytes: int) -> bytes:
    if (file.size or 0) > max_bytes:
        raise ApiError(413, "file_too_large", f"{name} has {file.size} bytes, at most {max_bytes}; resize it", name)
    return await file.read()
