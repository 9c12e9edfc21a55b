"""What a client gets for the stages' events: one answer, or a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import StreamingResponse

from serve.asgi import Errors
from serve.errors import ApiError
from serve.messages import Begun, Event, Picture, Step
from serve.pictures import PictureStore, base64_of
from serve.schemas import (
    CompletedEvent,
    ImageData,
    ImageParameters,
    ImagesResponse,
    PartialImageEvent,
    ProgressEvent,
    Timings,
    UsedConcept,
)


class Call:
    """One client's call, on its way out."""

    def __init__(
        self,
        pictures: PictureStore,
        errors: Errors,
        request: Request,
        body: ImageParameters,
        *,
        call_id: str,
        created: int,
        expires: int,
        concept_id: str | None = None,
        encode_s: float = 0.0,
        verb: str = "generation",
    ) -> None:
        """`expires` is when its urls do; pictures of a job, whose id is the call's, are kept already."""
        self.pictures = pictures
        self.errors = errors
        self.body = body
        self.concept_id = concept_id
        self.id = call_id
        self.created = created
        self.expires = expires
        self.encode_s = encode_s
        self.verb = verb
        self.tenant: str = request.state.tenant
        self.base_url = str(request.base_url).rstrip("/")

    async def response(self, begun: Begun, pictures: list[Picture]) -> ImagesResponse:
        """Everything at once."""
        pictures = sorted(pictures, key=lambda picture: picture.image_index)
        data = [await self._data(picture, begun) for picture in pictures]
        return ImagesResponse(
            created=self.created,
            data=data,
            output_format=self.body.output_format,
            size=begun.size,
            timings=self._timings(pictures),
            **self._provenance(begun),
        )

    def stream(self, begun: Begun | None, events: AsyncGenerator[Event, None]) -> StreamingResponse:
        """Each event as it comes."""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._sse(begun, events), media_type="text/event-stream", headers=headers)

    async def _sse(self, begun: Begun | None, events: AsyncGenerator[Event, None]) -> AsyncIterator[str]:
        shown: dict[int, int] = {}
        try:
            async for event in events:
                if isinstance(event, Begun):
                    begun = event
                    continue
                assert begun is not None
                yield _sse(await self._event(begun, event, shown))
        except Exception as error:
            yield _sse_error(self.errors.known(error))
        finally:
            await events.aclose()

    async def _event(self, begun: Begun, event: Step | Picture, shown: dict[int, int]) -> BaseModel:
        size = {"size": begun.size, "output_format": self.body.output_format, "created_at": self.created}
        if isinstance(event, Picture):
            data = await self._data(event, begun)
            return CompletedEvent(
                type=f"image_{self.verb}.completed",
                image_index=event.image_index,
                **data.model_dump(include={"b64_json", "url", "seed"}),
                **size,
                timings=self._timings([event]),
                **self._provenance(begun),
            )
        where = {"image_index": event.image_index, "step": event.step, "steps": event.steps}
        if event.preview is None:
            return ProgressEvent(type=f"image_{self.verb}.progress", **where)
        number = shown[event.image_index] = shown.get(event.image_index, -1) + 1
        return PartialImageEvent(
            type=f"image_{self.verb}.partial_image",
            b64_json=base64_of(event.preview),
            partial_image_index=number,
            **where,
            **size,
        )

    def _provenance(self, begun: Begun) -> dict[str, Any]:
        return {
            "parameters": begun.parameters,
            "weights": begun.weights,
            "concept": UsedConcept(id=self.concept_id, digest=begun.concept_digest),
            "concept_cache": "hit" if begun.cache_hit else "miss",
        }

    async def _data(self, picture: Picture, begun: Begun) -> ImageData:
        known = {"seed": picture.seed, "revised_prompt": begun.prompt}
        if self.body.response_format == "b64_json":
            return ImageData(b64_json=base64_of(picture.data), **known)
        name = f"{self.id}-{picture.image_index}.{self.body.output_format}"
        if self.id.startswith("file_"):
            await asyncio.to_thread(self.pictures.put, self.tenant, name, picture.data)
        path = self.pictures.path(self.tenant, name, self.expires)
        return ImageData(url=f"{self.base_url}{path}", **known)

    def _timings(self, pictures: list[Picture]) -> Timings:
        queue_s = max(picture.queue_s for picture in pictures)
        total_s = max(picture.queue_s + picture.generate_s for picture in pictures)
        return Timings(
            encode_s=round(self.encode_s, 4),
            queue_s=round(queue_s, 4),
            generate_s=round(total_s - queue_s, 4),
            total_s=round(self.encode_s + total_s, 4),
        )


def _sse(event: BaseModel) -> str:
    return f"event: {event.type}\ndata: {event.model_dump_json(exclude_none=True)}\n\n"


def _sse_error(error: ApiError) -> str:
    return f"event: error\ndata: {error.body.model_dump_json()}\n\n"
