"""What strangers send and what they get: OpenAI's Images conventions, with this project's own fields beside them.

    GET    /v1/models, /v1/models/{id}            Model: limits and defaults
    POST   /v1/concepts                           multipart form → ConceptObject, 201
             image      a file, 1 to max_references times ("image[]" is the same field)
             mask       optional files, one for each image, in their order ("mask[]"); 255 is the subject
             class_noun person, cat, kitten …; "person" unless given
             name       optional, for people
             consent    optional reference to the consent of who is pictured, kept with the concept
             ttl_s      seconds until the concept is deleted; the server's default and largest at /v1/models
             image_url  in place of image: only from hosts that the server allows
    GET    /v1/concepts?limit=&after=             ConceptList, the newest first
    GET    /v1/concepts/{id}                      ConceptObject
    DELETE /v1/concepts/{id}                      ConceptDeleted
    POST   /v1/images/generations                 GenerationBody → ImagesResponse, or events where stream is true
    POST   /v1/images/edits                       multipart form: image, class_noun as above, and every field of
                                                  GenerationBody but concept → the same; events start with "image_edit."
    POST   /v1/images/jobs                        GenerationBody → JobObject, 202
    GET    /v1/images/jobs?limit=&after=          JobList, the newest first
    GET    /v1/images/jobs/{id}                   JobObject
    POST   /v1/images/jobs/{id}/cancel            JobObject
    GET    /v1/images/jobs/{id}/events            the events of a streamed generation
    GET    /v1/images/files/{tenant}/{name}?…     a picture, by the signed url that a response held
    GET    /, /web/…                              the page, which is a client of the lines above
    GET    /healthz, /readyz, /metrics

Every request but those for the page, the signed urls' and the last line's carries "Authorization: Bearer KEY" where the
server has keys. POST /v1/images/generations, edits and jobs take the header Idempotency-Key: the same key with the same
body, files included, is one generation and the same bytes for as long as jobs are kept; another body is 409. A failure
of the server (5xx) is not kept: the key may be used again. POST /v1/concepts refuses the header. Every answer carries
X-Request-ID. Every error is an ErrorBody; 429 and 503 tell in Retry-After when to come back.

A stream is Server-Sent Events, `event: TYPE` and `data: JSON`, where the JSON has the same "type":

    image_generation.progress        ProgressEvent, after each step
    image_generation.partial_image   PartialImageEvent, up to partial_images for each picture
    image_generation.completed       CompletedEvent, one for each picture
    error                            ErrorBody, then the stream ends
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from instantbooth.parameters import RANGES
from instantbooth.prompts import MAX_PROMPT_CHARS, SUBJECT_FIELD

MAX_IMAGES = 10
MAX_STEPS = 200
MAX_PARTIAL_IMAGES = 3
MAX_DEADLINE_S = 600.0
SIZE = re.compile(r"auto|\d{1,5}x\d{1,5}")

OutputFormat = Literal["png", "jpeg", "webp"]
Sampler = Literal["ddim", "euler", "dpmsolver++"]


def _scale(name: str, meaning: str) -> Any:
    return Field(default=None, ge=RANGES[name].low, le=RANGES[name].high, description=meaning)


class Strict(BaseModel):
    """Unknown fields are errors: a misspelt parameter must not be silently ignored."""

    model_config = ConfigDict(extra="forbid")


def _neutral(default: str) -> Any:
    # Not kept: with or without it the request is the same.
    return Field(default=default, exclude=True, description="OpenAI's; there is nothing to choose here.")


def _or_null(schema: dict[str, Any]) -> None:
    """Tells OpenAPI that null stands for a default."""
    for name, field in schema["properties"].items():
        if field.get("default") is not None:
            beside = {word: field.pop(word) for word in ("default", "description", "title") if word in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **beside}


class ImageParameters(Strict):
    """How pictures are made, whatever of. Null stands for the default: the one told here, or the weights' own, which
    /v1/models tells."""

    model_config = ConfigDict(json_schema_extra=_or_null)

    prompt: str = Field(
        min_length=1,
        max_length=MAX_PROMPT_CHARS,
        description="Holds {subject} once, where the subject belongs.",
        examples=["a photo of a {subject} at the beach"],
    )
    model: Literal["instantbooth"] = Field(default="instantbooth", description="The one that is served.")
    n: int = Field(default=1, ge=1, le=MAX_IMAGES, description="Pictures; picture i has seed + i.")
    size: str = Field(default="auto", description="WIDTHxHEIGHT in pixels, or auto, the model's own.")
    response_format: Literal["b64_json", "url"] = Field(default="b64_json", description="Urls are short-lived.")
    output_format: OutputFormat = "png"
    output_compression: int = Field(default=95, ge=0, le=100, description="Quality of jpeg and webp.")
    seed: int | None = Field(
        default=None, ge=0, le=2**53 - 1, description="Same seed, same picture; drawn at random unless given."
    )
    stream: bool = Field(default=False, description="Answers with events.")
    partial_images: int = Field(default=0, ge=0, le=MAX_PARTIAL_IMAGES, description="Previews of each picture.")
    adapter_scale: float | None = _scale("adapter_scale", "β: identity, by the patch features.")
    concept_scale: float | None = _scale("concept_scale", "α: factor on the concept embedding.")
    num_inference_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS, description="Denoising steps.")
    guidance_scale: float | None = _scale("guidance_scale", "Classifier-free guidance; at 1 or below there is none.")
    negative_prompt: str | None = Field(
        default=None, max_length=MAX_PROMPT_CHARS, description="What to stay away from."
    )
    sampler: Sampler | None = None
    deadline_s: float | None = Field(
        default=None, gt=0, le=MAX_DEADLINE_S, description="Seconds after which the answer is 504."
    )
    user: str | None = Field(default=None, max_length=256, description="The caller's own; not looked at.")
    quality: Literal["auto", "standard"] = _neutral("auto")
    background: Literal["auto", "opaque"] = _neutral("auto")
    moderation: Literal["auto"] = _neutral("auto")
    style: Literal["vivid"] = _neutral("vivid")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: each for name, each in value.items() if each is not None or name not in cls.model_fields}

    @field_validator("size")
    @classmethod
    def _size(cls, value: str) -> str:
        if not SIZE.fullmatch(value):
            raise ValueError(f"must be auto or WIDTHxHEIGHT such as 64x64, is {value!r}")
        return value

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: str) -> str:
        if (count := value.count(SUBJECT_FIELD)) != 1:
            raise ValueError(f"must hold {SUBJECT_FIELD} exactly once, where the subject belongs, not {count} times")
        return value

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _text(cls, value: str | None) -> str | None:
        if value is not None and "\0" in value:
            raise ValueError("must hold no NUL character")
        return value

    @field_validator("negative_prompt")
    @classmethod
    def _negative_prompt(cls, value: str | None) -> str | None:
        if value is not None and SUBJECT_FIELD in value:
            raise ValueError(f"must not hold {SUBJECT_FIELD}; remove it")
        return value

    @property
    def width_height(self) -> tuple[int | None, int | None]:
        """Pixels; None for the model's own."""
        if self.size == "auto":
            return None, None
        width, _, height = self.size.partition("x")
        return int(width), int(height)


class GenerationBody(ImageParameters):
    """POST /v1/images/generations and /v1/images/jobs."""

    concept: str = Field(max_length=64, description="Id from POST /v1/concepts.", examples=["concept_0f1e2d3c"])


class Parameters(BaseModel):
    """What was really used."""

    adapter_scale: float
    concept_scale: float
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str
    sampler: Sampler


class ImageData(BaseModel):
    """One picture."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    revised_prompt: str | None = Field(default=None, description="The prompt as the text encoder reads it.")


class Timings(BaseModel):
    """Seconds spent in each stage."""

    encode_s: float = Field(default=0.0, description="Reference images to concept; edits only.")
    queue_s: float = Field(description="Until the last picture took its first step.")
    generate_s: float = Field(description="From then on.")
    total_s: float


class UsedConcept(BaseModel):
    """The concept behind a picture."""

    id: str | None = Field(description="Null for edits, whose concept is not kept.")
    digest: str


class ImagesResponse(BaseModel):
    """OpenAI's ImagesResponse and more."""

    created: int = Field(description="Unix seconds.")
    data: list[ImageData]
    output_format: OutputFormat
    size: str
    parameters: Parameters
    weights: str = Field(description="SHA-256 of everything trained.")
    concept: UsedConcept
    concept_cache: Literal["hit", "miss"] = Field(description="Whether the replica held the concept already.")
    timings: Timings


class ProgressEvent(BaseModel):
    """A step of one picture is done."""

    type: str = "image_generation.progress"
    image_index: int = Field(description="Which of the n pictures.")
    step: int
    steps: int


class PartialImageEvent(BaseModel):
    """A preview."""

    type: str = "image_generation.partial_image"
    b64_json: str
    partial_image_index: int
    image_index: int
    step: int
    steps: int
    created_at: int
    size: str
    output_format: OutputFormat


class CompletedEvent(BaseModel):
    """A picture is there; it holds what an ImagesResponse of this picture alone would."""

    type: str = "image_generation.completed"
    b64_json: str | None = None
    url: str | None = None
    image_index: int
    seed: int
    created_at: int
    size: str
    output_format: OutputFormat
    parameters: Parameters
    weights: str
    concept: UsedConcept
    concept_cache: Literal["hit", "miss"]
    timings: Timings


class ConceptObject(BaseModel):
    """A subject, encoded; its photos are not kept."""

    id: str
    object: Literal["concept"] = "concept"
    class_noun: str
    name: str | None
    consent: str | None
    num_images: int
    digest: str = Field(description="SHA-256 of what the model makes of the photos.")
    created_at: int
    expires_at: int = Field(description="Unix seconds; then it is deleted.")


class ConceptDeleted(BaseModel):
    """The concept is gone."""

    id: str
    object: Literal["concept.deleted"] = "concept.deleted"
    deleted: Literal[True] = True


class ConceptList(BaseModel):
    """A page of concepts."""

    object: Literal["list"] = "list"
    data: list[ConceptObject]
    has_more: bool
    last_id: str | None = Field(description="Pass it as `after` for the next page.")


ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "conflict_error",
    "rate_limit_error",
    "timeout_error",
    "server_error",
]


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str = Field(description="The value, the rule and the fix.")
    type: ErrorType
    param: str | None = Field(description="The field at fault.")
    code: str


class ErrorBody(BaseModel):
    """The shape of every error."""

    error: ErrorObject


class JobObject(BaseModel):
    """A generation that runs by itself; accepted, it is finished though replicas come and go."""

    id: str
    object: Literal["image.job"] = "image.job"
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    created_at: int
    expires_at: int = Field(description="Unix seconds; then the job and its pictures are deleted.")
    step: int = Field(description="Denoising steps taken for all pictures.")
    steps: int | None = Field(description="Denoising steps in all; null until it runs.")
    result: ImagesResponse | None = None
    error: ErrorObject | None = None


class JobList(BaseModel):
    """A page of jobs, without their results."""

    object: Literal["list"] = "list"
    data: list[JobObject]
    has_more: bool
    last_id: str | None


class Limits(BaseModel):
    """What the server enforces."""

    max_body_bytes: int
    max_json_bytes: int = Field(description="Of a body without files.")
    max_image_bytes: int
    max_image_pixels: int
    min_image_side: int
    max_references: int
    max_images: int = MAX_IMAGES
    max_steps: int = MAX_STEPS
    max_partial_images: int = MAX_PARTIAL_IMAGES
    max_prompt_chars: int = MAX_PROMPT_CHARS
    max_prompt_tokens: int = Field(description="Of a prompt, its subject written out, or a negative one.")
    max_deadline_s: float = MAX_DEADLINE_S
    max_concept_ttl_s: int
    size_step: int = Field(description="Width and height are multiples of it.")
    max_side: int
    adapter_scale: tuple[float, float]
    concept_scale: tuple[float, float]
    guidance_scale: tuple[float, float]


class Defaults(BaseModel):
    """What is used where a request says nothing."""

    size: str
    adapter_scale: float
    concept_scale: float
    num_inference_steps: int
    guidance_scale: float
    sampler: Sampler
    deadline_s: float
    concept_ttl_s: int


class Model(BaseModel):
    """The model that is served."""

    id: Literal["instantbooth"] = "instantbooth"
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["instantbooth"] = "instantbooth"
    base: str
    weights: str = Field(description="SHA-256 of everything trained.")
    class_nouns: dict[str, list[str]] = Field(description="Class → the nouns that name it.")
    samplers: list[Sampler]
    output_formats: list[OutputFormat] = ["png", "jpeg", "webp"]
    limits: Limits
    defaults: Defaults


class ModelList(BaseModel):
    """Every model: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """/healthz and /readyz."""

    status: Literal["ok"] = "ok"
