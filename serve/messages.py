"""What stages tell each other: plain values that any replica can pickle."""

from __future__ import annotations

from dataclasses import dataclass

from serve.schemas import GenerationBody, ImageParameters, OutputFormat, Parameters

SETTINGS = tuple(Parameters.model_fields)
"""Parameters that go to the library as they are."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A subject's photos, as they came."""

    images: tuple[bytes, ...]
    masks: tuple[bytes, ...] | None
    class_noun: str


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What became of them."""

    data: bytes
    """Concept.to_bytes()."""
    digest: str
    num_images: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """Pictures to make: one call of a client."""

    prompt: str
    tenant: str
    concept_id: str | None
    """A stored concept of the tenant."""
    concept: bytes | None = None
    """Or one of this call alone."""
    seed: int
    """Of the first picture; each further one has one more."""
    n: int
    width: int | None
    """Pixels; None for the model's own."""
    height: int | None
    parameters: dict[str, object]
    """The library's, by name; None for the weights' default."""
    output_format: OutputFormat
    quality: int
    """Of jpeg and webp, 0 to 100."""
    previews: int = 0
    progress: bool = False
    """Whether steps are reported."""
    deadline_s: float | None = None
    """Seconds from when the replica takes it."""

    @classmethod
    def of(
        cls,
        tenant: str,
        body: ImageParameters,
        *,
        seed: int,
        deadline_s: float | None,
        concept: bytes | None = None,
        progress: bool = False,
    ) -> Work:
        """What a body asks for; `concept` where it names none."""
        width, height = body.width_height
        return cls(
            prompt=body.prompt,
            tenant=tenant,
            concept_id=body.concept if isinstance(body, GenerationBody) else None,
            concept=concept,
            seed=seed,
            n=body.n,
            width=width,
            height=height,
            parameters={name: getattr(body, name) for name in SETTINGS},
            output_format=body.output_format,
            quality=body.output_compression,
            previews=body.partial_images,
            progress=progress,
            deadline_s=deadline_s,
        )

    @property
    def affinity(self) -> str:
        """Works that gain from the same replica have the same."""
        return f"{self.tenant}/{self.concept_id}" if self.concept_id else ""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """The replica took the work on."""

    parameters: Parameters
    prompt: str
    """As the text encoder reads it."""
    size: str
    weights: str
    concept_digest: str
    cache_hit: bool


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of one picture is done; `preview` shows it where one was due."""

    image_index: int
    step: int
    steps: int
    preview: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture is there."""

    image_index: int
    seed: int
    data: bytes
    """In the wanted format."""
    queue_s: float
    generate_s: float


Event = Begun | Step | Picture


def is_news(event: Event, told: set[tuple[object, ...]]) -> bool:
    """Whether an event tells more than `told`, which grows by it: a replica that begins again repeats what was told.

    Nothing of a picture is news once the picture is there.
    """
    match event:
        case Begun():
            what: tuple[object, ...] = ()
        case Picture():
            what = (event.image_index,)
        case Step():
            what = (event.image_index, event.step, event.preview is not None)
    if what in told or what[:1] in told:
        return False
    told.add(what)
    return True
