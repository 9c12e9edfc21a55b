"""The second stage: an engine in its own thread, and the calls that wait for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from functools import partial
from threading import Event as Flag
from threading import Thread

from PIL import Image

from instantbooth import Concept
from instantbooth.engine import Engine, EngineConfig, Progress, Ticket
from instantbooth.errors import EngineError
from instantbooth.images import encode_image
from instantbooth.model.personalizer import Request
from instantbooth.prompts import SUBJECT_FIELD
from instantbooth.storage import open_store
from serve.cache import ConceptCache
from serve.concepts import ConceptStore
from serve.config import ServeConfig
from serve.errors import ApiError
from serve.messages import Begun, Event, Picture, Step, Work
from serve.metrics import Snapshot, StageMetrics, engine_metrics
from serve.model import load, warm_up
from serve.schemas import MAX_DEADLINE_S, Parameters

logger = logging.getLogger("ray.serve")


class DiffusionEngine:
    """Makes pictures of any tenant's concepts in one batch."""

    def __init__(self, config: ServeConfig) -> None:
        """Loads the model, measures and compiles it, makes a picture: a replica that is ready is warm."""
        self.booth = load(config)
        self.weights = self.booth.weights_digest
        self.engine = Engine(
            self.booth,
            EngineConfig(
                row_budget=config.row_budget,
                max_row_budget=config.max_row_budget,
                compile=config.compile,
                max_requests=config.max_requests,
                # Only jobs have no deadline: whoever waits goes before them.
                patience_s=MAX_DEADLINE_S,
            ),
        )
        self.concepts = ConceptCache(ConceptStore(open_store(config.store)), self.engine.forget)
        self.metrics = StageMetrics("generate")
        self.queued_jobs = 0
        """U-Net rows of jobs that no replica has yet."""
        self._warm_up()
        self._stopped = Flag()
        self._sweeper = Thread(target=self._sweep, args=(config.sweep_s,), name="concept-sweeper", daemon=True)
        self._sweeper.start()

    async def generate(self, work: Work) -> AsyncIterator[Event]:
        """Begun, then steps where they are wanted, and pictures in the order they are finished.

        Raises ApiError 404 for a concept that is gone and 422 for a text that the text encoder does not read to its
        end, InputError and ConceptError before anything is denoised, OverloadedError and DeadlineError. A caller that
        leaves takes its rows out of the next step.
        """
        concept, hit = await asyncio.to_thread(self._concept, work)
        requests = await asyncio.to_thread(self._requests, work, concept)
        with self.metrics.timed():
            line = _Line(self.engine, requests, work)
            try:
                yield self._begun(work, requests[0], hit)
                async for event in line.events():
                    yield event
            except (asyncio.CancelledError, GeneratorExit):
                if line.cancel():
                    self.metrics.cancellations.inc()
                raise
            finally:
                line.cancel()
                # It was this call's alone, or was deleted meanwhile.
                if work.concept_id is None or not self.concepts.holds(work.tenant, work.concept_id):
                    self.engine.forget(concept.digest)

    async def describe(self) -> dict[str, object]:
        """The model, as /v1/models tells it: what ImageParameters cannot know."""
        base, defaults = self.booth.base, self.booth.defaults
        return {
            "weights": self.weights,
            "image_size": base.image_size,
            "size_step": base.size_step,
            "max_prompt_tokens": self._max_prompt_tokens,
            "defaults": {name: getattr(defaults, name) for name in Parameters.model_fields if hasattr(defaults, name)},
        }

    async def forget(self, tenant: str, concept_id: str) -> None:
        """A concept was deleted."""
        self.concepts.forget(tenant, concept_id)

    async def expect(self, queued_jobs: int) -> None:
        """So many U-Net rows of jobs wait for their turn."""
        self.queued_jobs = queued_jobs

    async def snapshot(self) -> Snapshot:
        """This replica's metrics."""
        engine = self.engine
        return self.metrics.snapshot(engine_metrics(engine.stats(), engine.row_budget, engine.concepts.bytes))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What serve.scaling goes by."""
        return {"queued_work": float(self.engine.stats().queued_work), "queued_jobs": float(self.queued_jobs)}

    def check_health(self) -> None:
        """Serve replaces a replica whose engine broke down."""
        if not self.engine.alive:
            raise EngineError("the engine has ended; the replica must be replaced")

    def __del__(self) -> None:
        if hasattr(self, "_stopped"):
            self._stopped.set()
            self.engine.close(drain=False)

    def _concept(self, work: Work) -> tuple[Concept, bool]:
        if work.concept is not None:
            return Concept.from_bytes(work.concept), False
        assert work.concept_id is not None
        return self.concepts.get(work.tenant, work.concept_id)

    @property
    def _max_prompt_tokens(self) -> int:
        # Two more mark a text's beginning and end.
        return self.booth.base.tokenizer.model_max_length - 2

    def _requests(self, work: Work, concept: Concept) -> list[Request]:
        requests = self.booth.requests(
            work.prompt,
            concept,
            num_images_per_prompt=work.n,
            width=work.width,
            height=work.height,
            seed=work.seed,
            **work.parameters,
        )
        for name in ("prompt", "negative_prompt"):
            self._check_length(name, getattr(requests[0], name))
        return requests

    def _check_length(self, name: str, text: str) -> None:
        tokens = len(self.booth.base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if tokens > self._max_prompt_tokens:
            rule = f"the text encoder reads {self._max_prompt_tokens} tokens, and this has {tokens}; shorten it"
            raise ApiError(422, "invalid_value", f"{name}: {rule}", name)

    def _begun(self, work: Work, request: Request, hit: bool) -> Begun:
        return Begun(
            parameters=Parameters(
                adapter_scale=request.adapter_scale,
                concept_scale=request.concept_scale,
                num_inference_steps=request.table.num_steps,
                guidance_scale=request.guidance_scale,
                negative_prompt=request.negative_prompt,
                sampler=str(work.parameters["sampler"] or self.booth.defaults.sampler),
            ),
            prompt=request.prompt,
            size=f"{request.width}x{request.height}",
            weights=self.weights,
            concept_digest=request.concept.digest,
            cache_hit=hit,
        )

    def _warm_up(self) -> None:
        concept = warm_up(self.booth.subject_encoder)
        [request] = self.booth.requests(SUBJECT_FIELD, concept, num_inference_steps=2)
        self.engine.submit(request).result()

    def _sweep(self, every_s: float) -> None:
        while not self._stopped.wait(every_s):
            try:
                self.concepts.sweep()
            except Exception as error:
                logger.warning("deleted concepts cannot be looked for: %s", error)


class _Line:
    """The tickets of one work: what the engine's threads report becomes events in this call's loop."""

    def __init__(self, engine: Engine, requests: list[Request], work: Work) -> None:
        """Submits all of them or, where the engine refuses one, none."""
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Progress | Future[Image.Image]]] = asyncio.Queue()
        self._work = work
        self._submitted = time.monotonic()
        self._first_step: dict[int, float] = {}
        self.tickets: list[Ticket] = []
        try:
            for index, request in enumerate(requests):
                ticket = engine.submit(
                    request,
                    deadline_s=work.deadline_s,
                    previews=work.previews,
                    listener=partial(self._report, index),
                )
                self.tickets.append(ticket)
                ticket.future.add_done_callback(partial(self._put, index))
        except EngineError:
            self.cancel()
            raise

    async def events(self) -> AsyncIterator[Event]:
        """Ends with the last picture. Raises what a ticket ended in."""
        left = len(self.tickets)
        while left:
            index, news = await self._queue.get()
            if isinstance(news, Progress):
                preview = None if news.preview is None else await asyncio.to_thread(self._encode, news.preview)
                yield Step(image_index=index, step=news.step, steps=news.steps, preview=preview)
            else:
                left -= 1
                yield await self._finish(index, news.result())

    def cancel(self) -> bool:
        """Gives up what is not finished; whether there was any."""
        cancelled = [ticket.cancel() for ticket in self.tickets]
        return any(cancelled)

    async def _finish(self, index: int, picture: Image.Image) -> Picture:
        now, request = time.monotonic(), self.tickets[index].request
        begun = self._first_step.get(index, now)
        text = {
            "prompt": request.prompt,
            "seed": str(request.seed),
            "concept": request.concept.digest,
        }
        data = await asyncio.to_thread(self._encode, picture, text)
        return Picture(
            image_index=index,
            seed=request.seed,
            data=data,
            queue_s=begun - self._submitted,
            generate_s=now - begun,
        )

    def _encode(self, picture: Image.Image, text: dict[str, str] | None = None) -> bytes:
        return encode_image(picture, text or {}, image_format=self._work.output_format, quality=self._work.quality)

    def _report(self, index: int, progress: Progress) -> None:
        self._first_step.setdefault(index, time.monotonic())
        if self._work.progress:
            self._put(index, progress)

    def _put(self, index: int, news: Progress | Future[Image.Image]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, news))
