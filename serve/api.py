"""The routes: what each asks of the stages and answers. serve.schemas tells what they take and give."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, ExitStack, aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from instantbooth.images import ImageLimits
from instantbooth.parameters import MAX_REFERENCES, RANGES, SAMPLERS
from instantbooth.prompts import CLASS_NOUNS
from instantbooth.storage import open_store
from serve.asgi import BodyLimit, Envelope, Errors, Keys, answer
from serve.bodies import (
    MAX_JSON_BYTES,
    ConceptForm,
    EditForm,
    Files,
    form_of,
    idempotency_key,
    json_of,
    read_form,
    read_json,
)
from serve.calls import Call
from serve.concepts import ConceptRecord, ConceptStore
from serve.config import ServeConfig
from serve.errors import ApiError, of_exception
from serve.fetch import fetch
from serve.jobs import JobRecord, Key, Order, cancelled
from serve.keys import Keyring
from serve.limits import Gate
from serve.messages import Begun, Encoded, Event, Picture, Upload, Work, is_news
from serve.metrics import Snapshot, StageMetrics, exposition
from serve.page import add_page
from serve.pictures import PREFIX, PictureStore
from serve.records import new_id
from serve.schemas import (
    ConceptDeleted,
    ConceptList,
    ConceptObject,
    Defaults,
    ErrorBody,
    GenerationBody,
    Health,
    ImageParameters,
    ImagesResponse,
    JobList,
    JobObject,
    Limits,
    Model,
    ModelList,
)
from serve.stages import LOST, PAUSE_S, READY_S, Stages, ask_all

logger = logging.getLogger("ray.serve")

FOLLOWERS = 100
"""Calls of a tenant that an ingress replica lets wait for jobs beyond those that hold places of their own: events of a
job, and repetitions of an Idempotency-Key. Eight such replicas leave the jobs' replica room for others."""

Answer = TypeVar("Answer")
PageLimit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(max_length=64, description="last_id of the page before.")]


class Api:
    """The ingress: checks, refuses, asks the stages, and tells what became of it."""

    def __init__(
        self, config: ServeConfig, encoder: DeploymentHandle, diffusion: DeploymentHandle, jobs: DeploymentHandle
    ) -> None:
        store = open_store(config.store)
        self.config = config
        self.keys = Keyring(config.keys)
        self.stages = Stages(encoder, diffusion)
        self.jobs = jobs
        self.concepts = ConceptStore(store)
        self.pictures = PictureStore(store, config.url_secret or secrets.token_hex(32))
        self.gate = Gate(config.max_pending_images, "pictures")
        self.uploads = Gate(config.max_pending_uploads, "uploads")
        self.followers: defaultdict[str, Gate] = defaultdict(partial(Gate, FOLLOWERS, "calls that follow jobs"))
        """By tenant."""
        self.metrics = StageMetrics("ingress")
        self.errors = Errors(self.metrics.rejections)
        self.started = int(time.time())
        self._model: Model | None = None
        if self.keys.open:
            logger.warning("there are no API keys: only this machine is served; make keys with python -m serve.keys")

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve asks an ingress for."""
        return build_app(self)

    async def models(self) -> Response:
        """The model that is served, with its limits and defaults."""
        return answer(ModelList(data=[await self._described()]))

    async def model(self, model_id: str) -> Response:
        """The same by its id."""
        if model_id != "instantbooth":
            raise ApiError(404, "not_found", f"there is no model {model_id[:80]!r}; instantbooth is served")
        return answer(await self._described())

    async def create_concept(self, request: Request) -> Response:
        """Photos of one subject become a concept; the photos are not kept."""
        if idempotency_key(request) is not None:
            message = "Idempotency-Key: a concept is made anew by each call; leave it out, and delete what is too many"
            raise ApiError(400, "invalid_idempotency_key", message)
        with self.uploads.enter(), self.metrics.timed():
            form, files = await self._form(request, ConceptForm)
            ttl_s = form.ttl_s or self.config.concept_ttl_s
            if ttl_s > self.config.max_concept_ttl_s:
                limit = self.config.max_concept_ttl_s
                raise ApiError(422, "invalid_value", f"ttl_s must be at most {limit}, is {ttl_s}; lower it", "ttl_s")
            encoded = await self._encoded(files, form.class_noun, self.config.deadline_s)
            record = await asyncio.to_thread(
                self.concepts.add,
                request.state.tenant,
                encoded,
                ttl_s=ttl_s,
                **form.model_dump(exclude={"ttl_s"}),
            )
        return answer(_concept(record), status=201)

    async def list_concepts(self, request: Request, limit: PageLimit = 20, after: After = None) -> Response:
        """The tenant's concepts, the newest first."""
        found, more = await asyncio.to_thread(self.concepts.records.page, request.state.tenant, limit, after)
        data = [_concept(record) for record in found]
        return answer(ConceptList(data=data, has_more=more, last_id=data[-1].id if data else None))

    async def get_concept(self, request: Request, concept_id: str) -> Response:
        """One of them."""
        return answer(_concept(await self._concept(request.state.tenant, concept_id)))

    async def delete_concept(self, request: Request, concept_id: str) -> Response:
        """Removes a concept from the store and from every cache."""
        tenant = request.state.tenant
        await asyncio.to_thread(self.concepts.delete, tenant, concept_id)
        try:
            await self.stages.diffusion.broadcast("forget", tenant, concept_id).results_async(timeout_s=READY_S)
        except Exception as error:
            # The store has forgotten it, and every replica looks there.
            logger.warning("not every replica heard of a deletion: %s", type(error).__name__)
        return answer(ConceptDeleted(id=concept_id))

    async def generate(self, request: Request) -> Response:
        """Pictures of a concept, in one answer or as events."""
        tenant, text = request.state.tenant, idempotency_key(request)
        async with self._arriving():
            body = await read_json(request, GenerationBody)
        if text is not None:
            return await self._generate_once(request, body, Key.of(tenant, text, body))
        # Refused before the store is asked for anything.
        self.gate.check(body.n)
        await self._concept(tenant, body.concept)
        work = Work.of(
            tenant, body, seed=_seed(body), deadline_s=body.deadline_s or self.config.deadline_s, progress=body.stream
        )
        return await self._answered(self._live_call(request, body, concept_id=body.concept), work)

    async def edit(self, request: Request) -> Response:
        """Photos and prompt in one call; the concept is not kept."""
        started = time.monotonic()
        tenant, text = request.state.tenant, idempotency_key(request)
        key, found = None, None
        if text is None:
            self.gate.check()
        with self.uploads.enter():
            body, files = await self._form(request, EditForm)
            if files.masks is not None:
                message = "mask: an edit finds the subject itself; make a concept to send masks"
                raise ApiError(422, "unknown_parameter", message, "mask")
            if text is not None:
                key = Key.of(tenant, text, body, files.contents)
                found = await self._ask(lambda: self.jobs.find.remote(tenant, key))
            if found is None:
                self.gate.check(body.n)
                deadline_s = body.deadline_s or self.config.deadline_s
                encoded = await self._encoded(files, body.class_noun, deadline_s - (time.monotonic() - started))
        if found is not None:
            return await self._finished(request, found, body)
        spent = time.monotonic() - started
        left = body.model_copy(update={"deadline_s": max(0.001, deadline_s - spent)})
        if key is not None:
            details = {"concept": encoded.data, "encode_s": spent, "key": key, "waited_for": True}
            return await self._submitted(request, Order(job_id=new_id("job"), body=left, **details))
        details = {"seed": _seed(body), "deadline_s": left.deadline_s, "concept": encoded.data}
        work = Work.of(tenant, body, progress=body.stream, **details)
        return await self._answered(self._live_call(request, body, encode_s=spent, verb="edit"), work)

    async def create_job(self, request: Request) -> Response:
        """Accepts a generation that runs by itself."""
        tenant, text = request.state.tenant, idempotency_key(request)
        async with self._arriving():
            body = await read_json(request, GenerationBody)
        if body.stream:
            raise ApiError(422, "invalid_value", "stream: a job has its own events; leave it out", "stream")
        key = None if text is None else Key.of(tenant, text, body)
        record = None if key is None else await self._ask(lambda: self.jobs.find.remote(tenant, key))
        if record is None:
            await self._check(tenant, body)
            record = await self._submit(tenant, Order(job_id=new_id("job"), body=body, key=key))
        return answer(await self._job(request, record), status=202)

    async def list_jobs(self, request: Request, limit: PageLimit = 20, after: After = None) -> Response:
        """The tenant's jobs, the newest first."""
        found, more = await self._ask(lambda: self.jobs.page.remote(request.state.tenant, limit, after))
        data = [_job(record) for record in found]
        return answer(JobList(data=data, has_more=more, last_id=data[-1].id if data else None))

    async def get_job(self, request: Request, job_id: str) -> Response:
        """One of them, with its pictures once it has succeeded."""
        return answer(await self._job(request, await self._record(request, job_id)))

    async def cancel_job(self, request: Request, job_id: str) -> Response:
        """Ends an unfinished job."""
        await self._record(request, job_id)
        return answer(_job(await self._ask(lambda: self.jobs.cancel.remote(request.state.tenant, job_id))))

    async def job_events(self, request: Request, job_id: str) -> Response:
        """What happens in a job, from its beginning, as events."""
        followers = self.followers[request.state.tenant]
        followers.check()
        record = await self._record(request, job_id)
        events = self._job_events(request.state.tenant, job_id, followers.enter())
        return self._job_call(request, record).stream(None, events)

    async def file(self, tenant: str, name: str, expires: int = 0, signature: str = "") -> Response:
        """A picture, to whoever has its signed url."""
        self.pictures.check(tenant, name, expires, signature)
        data = await asyncio.to_thread(self.pictures.get, tenant, name)
        headers = {"Cache-Control": f"private, max-age={max(0, expires - int(time.time()))}"}
        return Response(data, media_type=f"image/{name.rpartition('.')[2]}", headers=headers)

    async def healthz(self) -> Response:
        """Whether this process answers."""
        return answer(Health())

    async def readyz(self) -> Response:
        """Whether pictures can be made: a diffusion replica is warm."""
        try:
            await self.stages.describe()
        except Exception:
            raise ApiError(503, "not_ready", "no diffusion replica is warm yet; wait") from None
        return answer(Health())

    async def metrics_page(self) -> Response:
        """What all replicas counted, in Prometheus' format."""
        own = serve.get_replica_context()
        handles = [
            serve.get_deployment_handle(own.deployment, own.app_name),
            self.jobs,
            self.stages.encoder,
            self.stages.diffusion,
        ]
        found = await asyncio.gather(*(ask_all(handle, "snapshot") for handle in handles), return_exceptions=True)
        snapshots = [each for replicas in found if isinstance(replicas, list) for each in replicas]
        return Response(exposition(snapshots), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def snapshot(self) -> Snapshot:
        """This replica's metrics."""
        return self.metrics.snapshot()

    async def _described(self) -> Model:
        if self._model is None:
            try:
                self._model = _model(self.config, self.started, await self.stages.describe())
            except TimeoutError:
                raise ApiError(503, "not_ready", "no diffusion replica is warm yet; try again later") from None
        return self._model

    async def _form(self, request: Request, model: type[Any]) -> tuple[Any, Files]:
        async with self._arriving():
            return await read_form(request, model, max_files=MAX_REFERENCES, max_bytes=self.config.max_image_bytes)

    @asynccontextmanager
    async def _arriving(self) -> AsyncIterator[None]:
        """While a body is read. ApiError 408 where it does not arrive in time."""
        try:
            async with asyncio.timeout(self.config.upload_s):
                yield
        except TimeoutError:
            message = f"the body took more than {self.config.upload_s:g} s to arrive; send less of it, or faster"
            raise ApiError(408, "upload_timeout", message) from None

    async def _encoded(self, files: Files, class_noun: str, deadline_s: float) -> Encoded:
        fetched = [
            await asyncio.to_thread(fetch, url, self.config.image_hosts, self.config.max_image_bytes)
            for url in files.urls
        ]
        upload = Upload(images=(*files.images, *fetched), masks=files.masks, class_noun=class_noun)
        return await self.stages.encode(upload, deadline_s)

    async def _concept(self, tenant: str, concept_id: str) -> ConceptRecord:
        return await asyncio.to_thread(self.concepts.records.get, tenant, concept_id)

    async def _answered(self, call: Call, work: Work) -> Response:
        """The pictures of a work, in one answer or as events. What is wrong with it has its status either way."""
        events = self._events(work)
        begun = await anext(events)
        assert isinstance(begun, Begun)
        if call.body.stream:
            return call.stream(begun, events)
        async with aclosing(events):
            pictures = [event async for event in events if isinstance(event, Picture)]
        return answer(await call.response(begun, pictures))

    async def _events(self, work: Work) -> AsyncGenerator[Event, None]:
        with self.gate.enter(work.n), self.metrics.timed():
            try:
                async with aclosing(self.stages.generate(work)) as events:
                    async for event in events:
                        yield event
            except (asyncio.CancelledError, GeneratorExit):
                self.metrics.cancellations.inc()
                raise

    async def _check(self, tenant: str, body: GenerationBody) -> None:
        """What a live call learns from its replica and a job must know before it is accepted.

        ApiError 404 for a concept that is not there, 422 for a size or a prompt that the model does not take.
        """
        await self._concept(tenant, body.concept)
        limits = (await self._described()).limits
        for side in body.width_height:
            if side is not None and (side % limits.size_step or not limits.size_step <= side <= limits.max_side):
                rule = f"sides must be multiples of {limits.size_step} up to {limits.max_side}"
                raise ApiError(422, "invalid_value", f"size: {rule}, is {body.size}; see /v1/models", "size")
        # A word is a token at least; the replica counts them.
        for name, text in (("prompt", body.prompt), ("negative_prompt", body.negative_prompt or "")):
            if (words := len(text.split())) > limits.max_prompt_tokens:
                rule = f"the text encoder reads {limits.max_prompt_tokens} tokens, and this has {words} words"
                raise ApiError(422, "invalid_value", f"{name}: {rule}; shorten it", name)

    async def _generate_once(self, request: Request, body: GenerationBody, key: Key) -> Response:
        """The call with this key, made or repeated. A repeated one needs no place, and no concept either."""
        tenant = request.state.tenant
        found = await self._ask(lambda: self.jobs.find.remote(tenant, key))
        if found is not None:
            return await self._finished(request, found, body)
        self.gate.check(body.n)
        await self._check(tenant, body)
        return await self._submitted(request, Order(job_id=new_id("job"), body=body, key=key, waited_for=True))

    async def _submitted(self, request: Request, order: Order) -> Response:
        with ExitStack() as places:
            places.enter_context(self.gate.enter(order.body.n))
            record = await self._submit(request.state.tenant, order)
            return await self._finished(request, record, order.body, places)

    async def _finished(
        self, request: Request, record: JobRecord, body: ImageParameters, places: ExitStack | None = None
    ) -> Response:
        """What came of a job that this call waits for, in one answer or as events, which hold the places on.

        Without places it takes one of the tenant's followers. ApiError 429 where there is none.
        """
        tenant = request.state.tenant
        if body.stream:
            held = places.pop_all() if places else self.followers[tenant].enter()
            events = self._job_events(tenant, record.id, held)
            begun = await anext(events)
            assert isinstance(begun, Begun)
            return self._job_call(request, record).stream(begun, events)
        deadline_s = body.deadline_s or self.config.deadline_s
        with places or self.followers[tenant].enter():
            record = await self._ask(lambda: self.jobs.wait.remote(tenant, record.id), deadline_s)
        if record.error is not None:
            raise ApiError(record.error_status, record.error.code, record.error.message, record.error.param)
        if record.status == "cancelled":
            raise cancelled(record.id)
        return answer(await self._result(request, record))

    async def _submit(self, tenant: str, order: Order) -> JobRecord:
        return await self._ask(lambda: self.jobs.submit.remote(tenant, order))

    async def _record(self, request: Request, job_id: str) -> JobRecord:
        return await self._ask(lambda: self.jobs.get.remote(request.state.tenant, job_id))

    async def _ask(self, question: Callable[[], Awaitable[Answer]], within_s: float | None = None) -> Answer:
        """Asks the replica of the jobs, again where it is lost: every question may be asked twice."""
        async with asyncio.timeout(within_s or self.config.deadline_s):
            while True:
                try:
                    return await question()
                except LOST:
                    await asyncio.sleep(PAUSE_S)

    async def _job(self, request: Request, record: JobRecord) -> JobObject:
        result = await self._result(request, record) if record.status == "succeeded" else None
        return _job(record).model_copy(update={"result": result})

    async def _result(self, request: Request, record: JobRecord) -> ImagesResponse:
        """What the job was asked for, the same bytes whenever it is asked for."""
        assert record.begun is not None
        call = self._job_call(request, record)
        pictures = [
            Picture(
                data=await asyncio.to_thread(self.pictures.get, request.state.tenant, each.name),
                **each.model_dump(exclude={"name"}),
            )
            for each in record.pictures
        ]
        return await call.response(record.begun, pictures)

    def _live_call(self, request: Request, body: ImageParameters, **details: Any) -> Call:
        now = int(time.time())
        ends = now + self.config.url_ttl_s
        call_id = new_id("file")
        return Call(self.pictures, self.errors, request, body, call_id=call_id, created=now, expires=ends, **details)

    def _job_call(self, request: Request, record: JobRecord) -> Call:
        edit = isinstance(record.body, EditForm)
        return Call(
            self.pictures,
            self.errors,
            request,
            record.body,
            concept_id=None if edit else record.body.concept,
            call_id=record.id,
            created=record.created_at,
            expires=record.expires_at,
            encode_s=record.encode_s,
            verb="edit" if edit else "generation",
        )

    async def _job_events(
        self, tenant: str, job_id: str, places: AbstractContextManager[object]
    ) -> AsyncGenerator[Event, None]:
        """What happens in a job, each event once, though the replica of the jobs comes and goes."""
        told: set[tuple[object, ...]] = set()
        with places:
            while True:
                events = self.jobs.options(stream=True).events.remote(tenant, job_id)
                try:
                    async for event in events:
                        if is_news(event, told):
                            yield event
                    return
                except LOST:
                    await asyncio.sleep(PAUSE_S)
                finally:
                    events.cancel()


class _Route(APIRoute):
    """Whatever a route raises is an ApiError."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
        handler = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handler(request)
            except (HTTPException, RequestValidationError, ApiError):
                raise
            except Exception as error:
                raise of_exception(error) from error

        return handled


def build_app(api: Api) -> FastAPI:
    """The ASGI application: every route, within the checks that come before any of them."""
    app = FastAPI(title="InstantBooth", version="1", docs_url=None, redoc_url=None)
    app.router.route_class = _Route
    concept = "/v1/concepts/{concept_id}"
    job = "/v1/images/jobs/{job_id}"
    routes: list[tuple[str, str, Callable[..., Any], type[BaseModel] | None, dict[str, Any]]] = [
        ("GET", "/v1/models", api.models, ModelList, {}),
        ("GET", "/v1/models/{model_id}", api.model, Model, {}),
        ("POST", "/v1/concepts", api.create_concept, ConceptObject, form_of(ConceptForm, masks=True)),
        ("GET", "/v1/concepts", api.list_concepts, ConceptList, {}),
        ("GET", concept, api.get_concept, ConceptObject, {}),
        ("DELETE", concept, api.delete_concept, ConceptDeleted, {}),
        ("POST", "/v1/images/generations", api.generate, ImagesResponse, json_of(GenerationBody)),
        ("POST", "/v1/images/edits", api.edit, ImagesResponse, form_of(EditForm, masks=False)),
        ("POST", "/v1/images/jobs", api.create_job, JobObject, json_of(GenerationBody)),
        ("GET", "/v1/images/jobs", api.list_jobs, JobList, {}),
        ("GET", job, api.get_job, JobObject, {}),
        ("POST", f"{job}/cancel", api.cancel_job, JobObject, {}),
        ("GET", f"{job}/events", api.job_events, None, {}),
        ("GET", f"{PREFIX}/{{tenant}}/{{name}}", api.file, None, {}),
        ("GET", "/healthz", api.healthz, Health, {}),
        ("GET", "/readyz", api.readyz, Health, {}),
        ("GET", "/metrics", api.metrics_page, None, {}),
    ]
    for method, path, endpoint, model, extra in routes:
        app.add_api_route(
            path,
            endpoint,
            methods=[method],
            response_model=model,
            status_code={"/v1/concepts": 201, "/v1/images/jobs": 202}.get(path, 200) if method == "POST" else 200,
            openapi_extra=extra,
            responses={"default": {"model": ErrorBody}},
        )
    add_page(app)
    app.add_middleware(Keys, keys=api.keys)
    app.add_middleware(BodyLimit, max_bytes=api.config.max_body_bytes)
    app.add_middleware(Envelope, errors=api.errors)
    for kind in (HTTPException, RequestValidationError, ApiError):
        app.add_exception_handler(kind, api.errors.handle)
    return app


def _seed(body: ImageParameters) -> int:
    return secrets.randbelow(2**31) if body.seed is None else body.seed


def _concept(record: ConceptRecord) -> ConceptObject:
    return ConceptObject(**record.model_dump())


def _job(record: JobRecord) -> JobObject:
    return JobObject(
        **record.model_dump(include={"id", "status", "created_at", "expires_at", "error", "step", "steps"})
    )


def _model(config: ServeConfig, created: int, described: dict[str, Any]) -> Model:
    native = described["image_size"]
    ranges = {name: (RANGES[name].low, RANGES[name].high) for name in ("adapter_scale", "concept_scale")}
    return Model(
        created=created,
        base=Path(config.base).name,
        weights=described["weights"],
        class_nouns={name: list(nouns) for name, nouns in CLASS_NOUNS.items()},
        samplers=list(SAMPLERS),
        limits=Limits(
            max_body_bytes=config.max_body_bytes,
            max_json_bytes=MAX_JSON_BYTES,
            max_image_bytes=config.max_image_bytes,
            max_image_pixels=config.max_image_pixels,
            min_image_side=ImageLimits.min_side,
            max_references=MAX_REFERENCES,
            max_prompt_tokens=described["max_prompt_tokens"],
            max_concept_ttl_s=config.max_concept_ttl_s,
            size_step=described["size_step"],
            max_side=2 * native,
            guidance_scale=(RANGES["guidance_scale"].low, RANGES["guidance_scale"].high),
            **ranges,
        ),
        defaults=Defaults(
            size=f"{native}x{native}",
            deadline_s=config.deadline_s,
            concept_ttl_s=config.concept_ttl_s,
            **described["defaults"],
        ),
    )
