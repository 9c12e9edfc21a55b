"""Generations that run by themselves. A job that was accepted is finished, whatever is restarted meanwhile.

One replica runs all of them and is the only writer of their records. What it accepts is in the object store before it
says so; after a restart it goes on with whatever has no end yet. Seeds are drawn when a job is accepted, so that what
is made again is the same. Should a replica outlive its successor's start, the end that is written first counts.

An idempotency key is a claim on a job: the first call with a key makes the job, every further one finds it.

    jobs/<tenant>/<job id>.json         JobRecord, for job_ttl_s
    jobs/<tenant>/<job id>.safetensors  an edit's concept, until the job has ended
    opens/<tenant>/<job id>.json        there until then too: what a restart reads, whatever the number of jobs
    claims/<tenant>/<hash>.json         Claim, deleted with its job
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, Literal
from weakref import WeakValueDictionary

from pydantic import BaseModel, Field
from ray.serve.handle import DeploymentHandle

from instantbooth.errors import StorageError
from instantbooth.storage import open_store, patiently
from serve.bodies import EditForm
from serve.concepts import ConceptStore
from serve.config import ServeConfig
from serve.errors import ApiError, of_exception
from serve.limits import Turns
from serve.messages import Begun, Event, Picture, Step, Work, is_news
from serve.metrics import Snapshot, StageMetrics, queue_metrics
from serve.pictures import PictureStore
from serve.records import Expiring, Records
from serve.schemas import ErrorObject, GenerationBody, ImageParameters
from serve.stages import REPLICA_LOST, Stages, ask_all

logger = logging.getLogger("ray.serve")

RETRIED = (429, 503)
"""Answers of a stage that may be another the next time."""
MAX_FAILURES = 5
"""So often is a job begun that fails with one of them, or that its replicas are lost on; before it is begun it may be
refused as often as it takes."""
RETRY_S = 1.0
SHARE_OUT_S = 2.0
"""How often the diffusion replicas are counted, and told what waits."""
FINISHED = ("succeeded", "failed", "cancelled")


class JobPicture(BaseModel):
    """A finished picture of a job."""

    image_index: int
    seed: int
    name: str
    """In the PictureStore."""
    queue_s: float
    generate_s: float


class JobRecord(Expiring):
    """A job, as it is kept."""

    status: Literal["queued", "running", "succeeded", "failed", "cancelled"] = "queued"
    created_at: int
    body: GenerationBody | EditForm
    seed: int
    encode_s: float = 0.0
    """What the concept of an edit took."""
    waited_for: bool = False
    """Whether somebody waits for the answer, with an idempotency key."""
    due_at: float | None = None
    """When it has failed unless it has ended, in Unix seconds."""
    claim_id: str | None = None
    """The claim that was made with it."""
    begun: Begun | None = None
    pictures: list[JobPicture] = Field(default_factory=list)
    error: ErrorObject | None = None
    error_status: int = 0
    seconds: float = 0.0
    """From acceptance to the end."""
    step: int = 0
    steps: int | None = None

    @property
    def finished(self) -> bool:
        """Whether it has ended, one way or another."""
        return self.status in FINISHED

    def unet_rows(self, defaults: Mapping[str, float]) -> int:
        """U-Net rows of all its steps, where the weights have these defaults."""
        body = self.body
        steps = int(body.num_inference_steps or defaults["num_inference_steps"])
        guidance = defaults["guidance_scale"] if body.guidance_scale is None else body.guidance_scale
        return body.n * steps * (2 if guidance > 1 else 1)

    @property
    def left_s(self) -> float | None:
        """Seconds until its deadline; None where it has none."""
        return None if self.due_at is None else self.due_at - time.time()


class Claim(Expiring):
    """An idempotency key, used."""

    job_id: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Key:
    """A client's Idempotency-Key, with what it stands for."""

    id: str
    """A claim's."""
    digest: str
    """SHA-256 of body and files."""

    @classmethod
    def of(cls, tenant: str, text: str, body: ImageParameters, files: Sequence[bytes] = ()) -> Key:
        """The key that a tenant sent with a body."""
        parts = [body.model_dump_json().encode(), *files]
        return cls(
            id=f"claim_{sha256(f'{tenant}/{text}'.encode()).hexdigest()[:24]}",
            digest=sha256(b"".join(sha256(part).digest() for part in parts)).hexdigest(),
        )


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a job is to be made of."""

    job_id: str
    body: GenerationBody | EditForm
    concept: bytes | None = None
    """Of an edit, Concept.to_bytes(); kept until the job has ended."""
    encode_s: float = 0.0
    key: Key | None = None
    waited_for: bool = False


class _Running:
    """A job in memory: its events so far, for those who follow it."""

    def __init__(self, tenant: str, record: JobRecord) -> None:
        self.tenant = tenant
        self.record = record
        self.events: list[Event] = []
        self.told: set[tuple[object, ...]] = set()
        """Every Step among them, as is_news knows it."""
        self.task: asyncio.Task[None] | None = None
        self.over = False
        """Whether its end is in the store."""
        self._changed = asyncio.Event()

    def tell(self, event: Event | None = None) -> None:
        """Wakes the followers, with an event or because the record changed."""
        if event is not None:
            self.events.append(event)
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self) -> AsyncIterator[Event]:
        """Every event from the first on, until the job has ended."""
        seen = 0
        while True:
            changed = self._changed
            while seen < len(self.events):
                seen += 1
                yield self.events[seen - 1]
            if self.over:
                return
            await changed.wait()


class JobRunner:
    """Accepts, runs and remembers jobs; there is one of it."""

    def __init__(self, config: ServeConfig, encoder: DeploymentHandle, diffusion: DeploymentHandle) -> None:
        self.store = store = open_store(config.store)
        self.config = config
        self.stages = Stages(encoder, diffusion)
        self.records = Records(store, "job", JobRecord)
        self.open = Records(store, "open", Expiring)
        self.claims = Records(store, "claim", Claim)
        self.pictures = PictureStore(store, "")
        self.concepts = ConceptStore(store)
        self.metrics = StageMetrics("job")
        self._running: dict[str, _Running] = {}
        self._turns = {False: Turns(config.jobs_at_once), True: Turns(config.max_pending_images)}
        """By whether somebody waits."""
        self._queued_rows = 0
        self._defaults: dict[str, float] | None = None
        self._recovered: asyncio.Task[None] | None = None
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By claim, or by job where there is none: nothing is accepted twice, or while it is deleted."""
        self._accepting: Counter[tuple[str, bool]] = Counter()
        """Jobs that are being accepted, by tenant and whether somebody waits."""
        self._kept: set[asyncio.Task[JobRecord]] = set()

    async def submit(self, tenant: str, order: Order) -> JobRecord:
        """Accepts a job under a new id, or finds the one that has the id, or the one that the key stands for.

        Its deadline counts from here; one that nobody waits for has none unless the body names it. ApiError 409 where
        the found one had another body, 429 where the tenant has too many unfinished ones.
        """
        return await self._whole(self._submit(tenant, order))

    async def find(self, tenant: str, key: Key) -> JobRecord | None:
        """The job that a key stands for; a key whose job failed by no fault of the client's stands for none.

        ApiError 409 where it was used with another body.
        """
        await self._recover()
        claim = await asyncio.to_thread(self.claims.find, tenant, key.id)
        if claim is None:
            return None
        try:
            record = await self.get(tenant, claim.job_id)
        except ApiError:
            # A replica was killed between the two.
            return None
        if record.error_status >= 500:
            return None
        if claim.digest != key.digest:
            raise ApiError(
                409,
                "idempotency_mismatch",
                "this Idempotency-Key was used with another body; use a new key for a new request",
            )
        return record

    async def get(self, tenant: str, job_id: str) -> JobRecord:
        """A job as it is now. ApiError 404 where there is none."""
        if (running := self._mine(tenant, job_id)) is not None:
            return running.record
        return await asyncio.to_thread(self.records.get, tenant, job_id)

    async def page(self, tenant: str, limit: int, after: str | None) -> tuple[list[JobRecord], bool]:
        """The newest jobs older than `after`, and whether there are more."""
        found, more = await asyncio.to_thread(self.records.page, tenant, limit, after)
        return [self._running[each.id].record if each.id in self._running else each for each in found], more

    async def wait(self, tenant: str, job_id: str) -> JobRecord:
        """A job once it has ended."""
        await self._recover()
        if (running := self._mine(tenant, job_id)) is not None:
            async for _ in running.follow():
                pass
            return running.record
        return await self.get(tenant, job_id)

    async def events(self, tenant: str, job_id: str) -> AsyncIterator[Event]:
        """What DiffusionEngine.generate yields, from the job's beginning; of a job that has ended its pictures."""
        await self._recover()
        running = self._mine(tenant, job_id)
        if running is not None:
            async for event in running.follow():
                yield event
        record = await self.get(tenant, job_id)
        if running is None and record.begun is not None:
            yield record.begun
            for picture in record.pictures:
                data = await asyncio.to_thread(self.pictures.get, tenant, picture.name)
                yield Picture(data=data, **picture.model_dump(exclude={"name"}))
        if record.error is not None:
            raise ApiError(record.error_status, record.error.code, record.error.message, record.error.param)
        if record.status == "cancelled":
            raise cancelled(job_id)

    async def cancel(self, tenant: str, job_id: str) -> JobRecord:
        """Ends a job; its rows leave the next step. ApiError 409 where it has ended already."""
        return await self._whole(self._cancel(tenant, job_id))

    async def snapshot(self) -> Snapshot:
        """This replica's metrics."""
        return self.metrics.snapshot(queue_metrics(self._queued_rows))

    async def _recover(self) -> None:
        """Once, before anything else: goes on with what a former replica left."""
        if self._recovered is None:
            self._recovered = asyncio.ensure_future(self._read_unfinished())
        await asyncio.shield(self._recovered)

    async def check_health(self) -> None:
        """Serve's own call soon after the start; recovery shall not wait for a client."""
        await self._recover()

    async def _read_unfinished(self) -> None:
        for tenant, record in await asyncio.to_thread(lambda: list(self._unfinished())):
            self._start(tenant, record.model_copy(update={"status": "queued", "step": 0}))
        self._cleaner = asyncio.ensure_future(self._clean_up())
        self._sharer = asyncio.ensure_future(self._share_out())

    def _unfinished(self) -> Iterator[tuple[str, JobRecord]]:
        for tenant, mark in self.open.all():
            record = self.records.find(tenant, mark.id)
            if record is None or record.finished:
                # A replica was killed before it wrote the one, or after it wrote the other.
                self._forget(tenant, mark.id)
            else:
                yield tenant, record

    async def _whole(self, work: Coroutine[Any, Any, JobRecord]) -> JobRecord:
        """Does work to its end though whoever asked for it has left: half of it would be a job that nobody runs."""
        task = asyncio.ensure_future(work)
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)
        return await asyncio.shield(task)

    async def _submit(self, tenant: str, order: Order) -> JobRecord:
        await self._recover()
        async with self._lock(order.key.id if order.key else order.job_id):
            if order.key is not None:
                return await self.find(tenant, order.key) or await self._claim(tenant, order, order.key)
            try:
                return await self.get(tenant, order.job_id)
            except ApiError:
                return await self._accept(tenant, order)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _claim(self, tenant: str, order: Order, key: Key) -> JobRecord:
        expires_at = int(time.time()) + self.config.job_ttl_s
        claim = Claim(id=key.id, expires_at=expires_at, job_id=order.job_id, digest=key.digest)
        await asyncio.to_thread(self.claims.put, tenant, claim)
        try:
            return await self._accept(tenant, order)
        except BaseException:
            await asyncio.to_thread(self.claims.delete, tenant, claim.id)
            raise

    async def _cancel(self, tenant: str, job_id: str) -> JobRecord:
        await self._recover()
        running = self._mine(tenant, job_id)
        record = await self.get(tenant, job_id)
        if running is None or running.task is None or record.finished:
            raise ApiError(409, "job_finished", f"job {job_id} has {record.status}; only an unfinished one can end")
        record.status = "cancelled"
        running.task.cancel()
        await self._end(running)
        return running.record

    async def _accept(self, tenant: str, order: Order) -> JobRecord:
        body, waited_for = order.body, order.waited_for
        kind = (tenant, waited_for)
        unfinished = self._accepting[kind] + sum(
            kind == (running.tenant, running.record.waited_for) for running in self._running.values()
        )
        if unfinished >= self.config.max_jobs:
            raise ApiError(429, "too_many_jobs", f"{unfinished} jobs are unfinished, the limit; wait for some to end")
        now = time.time()
        deadline_s = body.deadline_s or (self.config.deadline_s if waited_for else None)
        record = JobRecord(
            id=order.job_id,
            created_at=int(now),
            expires_at=int(now) + self.config.job_ttl_s,
            body=body,
            seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
            encode_s=order.encode_s,
            waited_for=waited_for,
            due_at=None if deadline_s is None else now + deadline_s,
            claim_id=order.key and order.key.id,
        )
        self._accepting[kind] += 1
        try:
            await asyncio.to_thread(self._write, tenant, record, order.concept)
        finally:
            self._accepting[kind] -= 1
        self._start(tenant, record)
        return record

    def _write(self, tenant: str, record: JobRecord, concept: bytes | None) -> None:
        """The record last: a job is there once it is."""
        self.open.put(tenant, Expiring(id=record.id, expires_at=record.expires_at))
        if concept is not None:
            key = self._concept_key(tenant, record.id)
            patiently(lambda: self.store.put(key, concept))
        self.records.put(tenant, record)

    def _forget(self, tenant: str, job_id: str) -> None:
        """Removes what a job needs until it has ended, the mark last."""
        key = self._concept_key(tenant, job_id)
        patiently(lambda: self.store.delete(key))
        self.open.delete(tenant, job_id)

    def _concept_key(self, tenant: str, job_id: str) -> str:
        return self.records.key(tenant, job_id, "safetensors")

    def _start(self, tenant: str, record: JobRecord) -> None:
        running = _Running(tenant, record)
        self._running[record.id] = running
        running.task = asyncio.ensure_future(self._run(running))

    def _mine(self, tenant: str, job_id: str) -> _Running | None:
        running = self._running.get(job_id)
        return running if running is not None and running.tenant == tenant else None

    async def _run(self, running: _Running) -> None:
        record, failure = running.record, None
        try:
            async with asyncio.timeout(record.left_s), self._turns[record.waited_for].enter(running.tenant):
                record.status = "running"
                running.tell()
                with self.metrics.timed():
                    await self._generate(running)
        except Exception as error:
            failure = of_exception(error)
            if failure.status == 500:
                logger.exception("job %s failed", record.id)
        if record.finished:
            # It was cancelled, and what tells so may not reach here as CancelledError.
            return
        if failure is None:
            record.status = "succeeded"
        else:
            record.status, record.error, record.error_status = "failed", failure.body.error, failure.status
        await self._end(running)

    async def _generate(self, running: _Running) -> None:
        failures = 0
        while True:
            begun = False
            try:
                work = await self._work(running)
                async with aclosing(self.stages.generate(work)) as events:
                    async for event in events:
                        begun = True
                        await self._take(running, event)
                return
            except Exception as error:
                failure = of_exception(error)
                failures += begun or failure.code == REPLICA_LOST
                if failure.status not in RETRIED or failures == MAX_FAILURES:
                    raise
                await asyncio.sleep(RETRY_S)

    async def _work(self, running: _Running) -> Work:
        record, concept = running.record, None
        if isinstance(record.body, EditForm):
            concept = await asyncio.to_thread(self.store.get, self._concept_key(running.tenant, record.id))
        details = {"seed": record.seed, "deadline_s": record.left_s, "progress": True}
        return Work.of(running.tenant, record.body, concept=concept, **details)

    async def _take(self, running: _Running, event: Event) -> None:
        """Keeps what is new: whatever is begun again tells the same once more."""
        record = running.record
        if isinstance(event, Begun):
            if record.begun is not None:
                return
            record.begun, record.steps = event, event.parameters.num_inference_steps * record.body.n
        elif isinstance(event, Step):
            if not is_news(event, running.told):
                return
            record.step += event.preview is None
        elif any(event.image_index == each.image_index for each in record.pictures):
            return
        else:
            name = f"{record.id}-{event.image_index}.{record.body.output_format}"
            await self._stored(running, partial(self.pictures.put, running.tenant, name, event.data))
            known = {"image_index": event.image_index, "seed": event.seed, "name": name}
            record.pictures.append(JobPicture(**known, queue_s=event.queue_s, generate_s=event.generate_s))
        running.tell(event)

    async def _end(self, running: _Running) -> None:
        record = running.record
        record.seconds = time.time() - record.created_at
        record.pictures.sort(key=lambda each: each.image_index)
        await self._stored(running, partial(self._write_end, running))
        await self._stored(running, partial(self._forget, running.tenant, record.id))
        self._running.pop(record.id, None)
        running.over = True
        running.tell()

    def _write_end(self, running: _Running) -> None:
        """Writes the record, or takes over the end that another replica has written."""
        known = self.records.find(running.tenant, running.record.id)
        if known is not None and known.finished:
            running.record = known
        else:
            self.records.put(running.tenant, running.record)

    async def _stored(self, running: _Running, write: Callable[[], None]) -> None:
        """Writes, however long the store takes to come back: until then the job is not over."""
        while True:
            try:
                return await asyncio.to_thread(write)
            except StorageError as error:
                logger.warning("job %s cannot be written now: %s", running.record.id, error)
                await asyncio.sleep(RETRY_S)

    async def _share_out(self) -> None:
        """Tells the diffusion replicas what waits, again and again, and makes room for jobs on each that hears."""
        while True:
            try:
                if self._defaults is None:
                    self._defaults = (await self.stages.describe())["defaults"]
                waiting = [each.record for each in self._running.values() if each.record.status == "queued"]
                self._queued_rows = sum(record.unet_rows(self._defaults) for record in waiting)
                replicas = await ask_all(self.stages.diffusion, "expect", self._queued_rows)
                self._turns[False].resize(self.config.jobs_at_once * max(1, len(replicas)))
            except Exception as error:
                logger.warning("the diffusion replicas do not hear what waits: %s", type(error).__name__)
            await asyncio.sleep(SHARE_OUT_S)

    async def _clean_up(self) -> None:
        """Deletes what has expired, again and again."""
        while True:
            try:
                await asyncio.to_thread(self.concepts.delete_expired)
                ended = await asyncio.to_thread(lambda: list(self.records.expired(self.config.job_ttl_s)))
                for tenant, job in ended:
                    async with self._lock(job.claim_id or job.id):
                        await asyncio.to_thread(self._delete, tenant, job)
                ages = {"file": self.config.url_ttl_s, "job": self.config.job_ttl_s}
                await asyncio.to_thread(self.pictures.delete_older, ages)
            except Exception as error:
                logger.warning("the expired cannot be deleted now: %s", error)
            await asyncio.sleep(self.config.clean_up_s)

    def _delete(self, tenant: str, job: JobRecord) -> None:
        if job.claim_id is not None:
            # Not where the key was used again since.
            self.claims.delete_if_expired(tenant, job.claim_id)
        self.records.delete(tenant, job.id)


def cancelled(job_id: str) -> ApiError:
    """What those learn who wait for a cancelled job."""
    message = f"job {job_id} was cancelled; submit it again, with a new Idempotency-Key where it had one"
    return ApiError(409, "cancelled", message)
