"""Jobs by themselves: who waits for whom, and what becomes of those that fail, hang, or lose their client.

Only the stage that makes pictures is scripted.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from instantbooth.errors import EngineError, MissingObjectError, OverloadedError
from serve.bodies import EditForm
from serve.config import ServeConfig
from serve.errors import ApiError
from serve.jobs import MAX_FAILURES, JobRecord, JobRunner, Key, Order
from serve.limits import Turns
from serve.messages import Begun, Event, Picture, Step, Work
from serve.records import new_id
from serve.schemas import GenerationBody
from serve.stages import MAX_LOSSES
from tests.serve.scripted import BEGUN, STEPS, Diffusion, Local, Script, denoised, endless


def wanted(**changes: Any) -> GenerationBody:
    return GenerationBody(prompt="a {subject}", concept=new_id("concept"), **changes)


@pytest.fixture
def runner(tmp_path: Path) -> Callable[..., JobRunner]:
    """A replica with the scripts as its second stage; another one finds what the former left."""

    def make(*scripts: Script, **settings: Any) -> JobRunner:
        return JobRunner(ServeConfig(store=str(tmp_path), **settings), None, Local(Diffusion(*scripts)))

    return make


async def submitted(jobs: JobRunner, tenant: str = "ada", key: str | None = None, **changes: Any) -> JobRecord:
    body = wanted(**changes)
    order = Order(
        job_id=new_id("job"),
        body=body,
        key=None if key is None else Key.of(tenant, key, body),
        waited_for=key is not None,
    )
    return await jobs.submit(tenant, order)


def works(jobs: JobRunner) -> list[Work]:
    """What the second stage was asked for."""
    return jobs.stages.diffusion.deployment.works


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def test_tenants_take_turns_however_much_one_of_them_wants() -> None:
    async def run() -> list[str]:
        turns, served = Turns(1), []

        async def work(tenant: str) -> None:
            async with turns.enter(tenant):
                await asyncio.sleep(0)
                served.append(tenant)

        first = [asyncio.ensure_future(work("ada")) for _ in range(5)]
        left = asyncio.ensure_future(work("eve"))
        rest = [asyncio.ensure_future(work("bob")) for _ in range(2)]
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(*first, *rest)
        async with asyncio.timeout(1), turns.enter("ada"):
            return served

    assert asyncio.run(run()) == ["ada", "ada", "bob", "ada", "bob", "ada", "ada"]


def test_who_waits_for_an_answer_does_not_wait_for_a_strangers_jobs(runner: Callable[..., JobRunner]) -> None:
    async def run() -> None:
        jobs = runner(endless, jobs_at_once=2)
        batch = [await submitted(jobs) for _ in range(5)]
        asked = await submitted(jobs, "bob", key="k")
        await until(lambda: asked.status == "running")
        assert [job.status for job in batch] == ["running", "running", "queued", "queued", "queued"]
        # A replica that starts anew knows who was waited for.
        again = runner(endless, jobs_at_once=2)
        await again.check_health()
        recovered = await again.get("bob", asked.id)
        await until(lambda: recovered.status == "running")

    asyncio.run(run())


def test_jobs_are_let_in_by_the_number_of_replicas_which_hear_what_waits(
    runner: Callable[..., JobRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.jobs.SHARE_OUT_S", 0.01)

    async def run() -> None:
        jobs = runner(endless, jobs_at_once=2)
        diffusion = jobs.stages.diffusion
        # Three steps without guidance by the weights' own defaults, or twice that.
        batch = [await submitted(jobs, n=2, guidance_scale=7 if number == 6 else None) for number in range(7)]
        await until(lambda: diffusion.deployment.queued_jobs == 4 * 2 * STEPS + 2 * 2 * STEPS)
        diffusion.replicas = 3
        await until(lambda: sum(job.status == "running" for job in batch) == 6)
        await until(lambda: diffusion.deployment.queued_jobs == 2 * 2 * STEPS)
        # Those that run beyond the two of a single replica end before another begins.
        turns, diffusion.replicas = jobs._turns[False], 1
        await until(lambda: turns._free == -4)
        for job in batch[:4]:
            await jobs.cancel("ada", job.id)
        await until(lambda: turns._free == 0)
        assert batch[6].status == "queued"
        await jobs.cancel("ada", batch[4].id)
        await until(lambda: batch[6].status == "running")

    asyncio.run(run())


def test_only_a_call_that_is_waited_for_has_a_deadline_of_its_own_accord(runner: Callable[..., JobRunner]) -> None:
    async def run() -> None:
        jobs = runner(denoised, deadline_s=7)
        for each in (await submitted(jobs), await submitted(jobs, key="k"), await submitted(jobs, deadline_s=300)):
            await jobs.wait("ada", each.id)
        left = [work.deadline_s for work in works(jobs)]
        assert left[0] is None
        assert left[1:] == pytest.approx([7, 300], abs=1)

    asyncio.run(run())


def test_a_tenant_has_so_many_unfinished_jobs_and_no_more(runner: Callable[..., JobRunner]) -> None:
    async def run() -> None:
        jobs = runner(endless, max_jobs=2)
        first, _ = await submitted(jobs), await submitted(jobs)
        with pytest.raises(ApiError, match="2 jobs are unfinished") as refused:
            await submitted(jobs)
        assert (refused.value.status, refused.value.code) == (429, "too_many_jobs")
        assert refused.value.headers["Retry-After"]
        await submitted(jobs, "bob")
        await submitted(jobs, key="waits for its own answer")
        await jobs.cancel("ada", first.id)
        at_once = await asyncio.gather(*(submitted(jobs) for _ in range(5)), return_exceptions=True)
        assert sum(isinstance(each, JobRecord) for each in at_once) == 1

    asyncio.run(run())


def raising(error: Exception, steps: int) -> Script:
    """The error, once so many steps are done; None of them means that the work is not begun."""

    async def script(work: Work) -> AsyncIterator[Event]:
        if steps:
            async for event in denoised(work, steps):
                yield event
        raise error

    return script


def test_a_job_that_fails_whenever_it_is_begun_ends(
    runner: Callable[..., JobRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.jobs.RETRY_S", 0.001)

    async def run() -> None:
        jobs = runner(raising(EngineError("the picture is not finite"), 2))
        job = await submitted(jobs)
        events = [event async for event in followed(jobs, job)]
        assert len(works(jobs)) == MAX_FAILURES
        assert (job.status, job.error_status, job.step) == ("failed", 503, 2)
        assert [event.step for event in events if isinstance(event, Step)] == [1, 2], "each is told once"

    asyncio.run(run())


def test_a_job_that_ends_its_replicas_before_it_is_begun_ends_too(
    runner: Callable[..., JobRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.jobs.RETRY_S", 0.001)
    monkeypatch.setattr("serve.stages.PAUSE_S", 0)

    async def run() -> None:
        jobs = runner(raising(RayActorError(), 0))
        job = await jobs.wait("ada", (await submitted(jobs, deadline_s=20)).id)
        assert (job.error_status, len(works(jobs))) == (503, MAX_FAILURES * MAX_LOSSES)

    asyncio.run(run())


async def followed(jobs: JobRunner, job: JobRecord) -> AsyncIterator[Event]:
    """A job's events until it ends, well or not."""
    try:
        async for event in jobs.events("ada", job.id):
            yield event
    except ApiError:
        assert job.finished


def test_a_job_outlasts_any_number_of_refusals_and_counts_its_steps_once(
    runner: Callable[..., JobRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.jobs.RETRY_S", 0.001)

    async def run() -> None:
        refused = [raising(OverloadedError("full"), 0)] * (3 * MAX_FAILURES)
        jobs = runner(*refused, raising(EngineError("ended"), 2), denoised)
        job = await submitted(jobs)
        events = [event async for event in followed(jobs, job)]
        assert (job.status, job.step, job.steps) == ("succeeded", STEPS, STEPS)
        assert [type(event) for event in events] == [Begun, Step, Step, Step, Picture]

    asyncio.run(run())


@pytest.mark.parametrize("script", [endless, raising(OverloadedError("full"), 0), raising(EngineError("ended"), 1)])
def test_a_job_has_one_deadline_however_often_it_is_begun(runner: Callable[..., JobRunner], script: Script) -> None:
    async def run() -> None:
        jobs = runner(script)
        started = time.monotonic()
        job = await jobs.wait("ada", (await submitted(jobs, deadline_s=0.2)).id)
        assert time.monotonic() - started < 1
        assert (job.status, job.error_status) == ("failed", 504)

    asyncio.run(run())


def test_a_job_that_waits_for_its_turn_is_due_all_the_same(runner: Callable[..., JobRunner]) -> None:
    async def run() -> None:
        jobs = runner(endless, jobs_at_once=1)
        await submitted(jobs)
        job = await jobs.wait("ada", (await submitted(jobs, deadline_s=0.1)).id)
        assert (job.error_status, len(works(jobs))) == (504, 1)

    asyncio.run(run())


def test_a_cancelled_job_stays_cancelled_whatever_its_stage_says(runner: Callable[..., JobRunner]) -> None:
    async def stubborn(work: Work) -> AsyncIterator[Event]:
        yield BEGUN
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise EngineError("cancelled, in other words") from None

    async def run() -> None:
        jobs = runner(stubborn)
        job = await submitted(jobs)
        await until(lambda: job.begun is not None)
        await jobs.cancel("ada", job.id)
        await asyncio.sleep(0.05)
        assert (await jobs.get("ada", job.id)).status == "cancelled"
        with pytest.raises(ApiError, match="only an unfinished one can end"):
            await jobs.cancel("ada", job.id)

    asyncio.run(run())


class Slow:
    """A write that takes as long as the test likes."""

    def __init__(self, write: Callable[..., None]) -> None:
        self.write = write
        self.writing, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *arguments: object) -> None:
        self.writing.set()
        assert self.go_on.wait(5)
        self.write(*arguments)


def test_a_client_that_leaves_while_its_job_is_written_leaves_no_half_of_it(
    runner: Callable[..., JobRunner], tmp_path: Path
) -> None:
    async def leave(jobs: JobRunner, call: Coroutine[Any, Any, JobRecord]) -> None:
        """Calls, and is gone while the record is written."""
        write = jobs.records.put
        jobs.records.put = slow = Slow(write)
        task = asyncio.ensure_future(call)
        assert await asyncio.to_thread(slow.writing.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        jobs.records.put = write
        slow.go_on.set()

    async def run() -> None:
        jobs = runner(endless)
        await leave(jobs, submitted(jobs))
        await until(lambda: bool(works(jobs)))
        (job,), _ = await jobs.page("ada", 1, None)
        assert job.status == "running"
        await leave(jobs, jobs.cancel("ada", job.id))
        await until(lambda: '"cancelled"' in (tmp_path / "jobs" / "ada" / f"{job.id}.json").read_text())
        assert (await jobs.get("ada", job.id)).status == "cancelled"

    asyncio.run(run())


def test_a_replica_that_starts_reads_what_is_unfinished_and_nothing_else(
    runner: Callable[..., JobRunner], tmp_path: Path
) -> None:
    async def run() -> None:
        jobs = runner(denoised)
        for number in range(3):
            await jobs.wait("ada", (await submitted(jobs, key=str(number))).id)
        assert not [*tmp_path.glob("opens/ada/*")]
        jobs = runner(endless)
        job = await submitted(jobs)
        again, read = runner(denoised), list[str]()
        get = again.records._read
        again.records._read = lambda key: read.append(key) or get(key)
        assert (await again.wait("ada", job.id)).status == "succeeded"
        assert set(read) == {f"jobs/ada/{job.id}.json"}

    asyncio.run(run())


def test_of_two_replicas_the_first_to_end_a_job_is_right(runner: Callable[..., JobRunner]) -> None:
    async def run() -> None:
        overtaken = asyncio.Event()

        async def loses_its_concept(work: Work) -> AsyncIterator[Event]:
            yield BEGUN
            await overtaken.wait()
            raise MissingObjectError("there is no object")

        former = runner(loses_its_concept)
        job = await submitted(former)
        assert (await runner(denoised).wait("ada", job.id)).status == "succeeded"
        overtaken.set()
        assert (await former.wait("ada", job.id)).status == "succeeded"
        assert (await runner(denoised).get("ada", job.id)).pictures

    asyncio.run(run())


def test_what_has_expired_is_deleted_and_a_key_used_again_is_not(
    runner: Callable[..., JobRunner], tmp_path: Path
) -> None:
    async def run() -> None:
        jobs = runner(denoised, job_ttl_s=2, clean_up_s=0.05)
        first = await jobs.wait("ada", (await submitted(jobs, key="once")).id)
        again = await submitted(jobs, key="again")
        assert len([*tmp_path.glob("*/ada/*")]) >= 6
        await until(lambda: not [*tmp_path.glob("*/ada/*")])
        for job in (first, again):
            with pytest.raises(ApiError, match="no job"):
                await jobs.get("ada", job.id)
        # The clean-up of a job finds its key claimed by a newer one.
        old = await jobs.wait("ada", (await submitted(jobs, key="again")).id)
        jobs._delete("ada", old)
        assert [*tmp_path.glob("claims/ada/*")]

    asyncio.run(run())


def test_jobs_are_accepted_while_others_are_deleted_and_a_key_once_its_own_is(
    runner: Callable[..., JobRunner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        former = runner(denoised, job_ttl_s=60)
        for number in range(3):
            await former.wait("ada", (await submitted(former, key=str(number))).id)
        later = SimpleNamespace(time=lambda: time.time() + 120, time_ns=time.time_ns)
        monkeypatch.setattr("serve.records.time", later)
        jobs = runner(endless, job_ttl_s=60)
        jobs.records.delete = slow = Slow(jobs.records.delete)
        await jobs.check_health()
        assert await asyncio.to_thread(slow.writing.wait, 5)
        deleted = asyncio.ensure_future(submitted(jobs, key="0"))
        await submitted(jobs)
        await submitted(jobs, key="another")
        assert not deleted.done()
        slow.go_on.set()
        await until(deleted.done)
        assert [*tmp_path.glob(f"claims/ada/{deleted.result().claim_id}.json")]

    asyncio.run(run())


def test_what_a_killed_replica_left_of_an_edit_is_gone_after_the_next_start(
    runner: Callable[..., JobRunner], tmp_path: Path
) -> None:
    async def run() -> None:
        edit = Order(job_id=new_id("job"), body=EditForm(prompt="a {subject}"), concept=b"tensors")
        jobs = runner(endless)
        await jobs.submit("ada", edit)
        concept = tmp_path / "jobs" / "ada" / f"{edit.job_id}.safetensors"
        assert concept.read_bytes() == b"tensors"
        again = runner(denoised)
        assert (await again.wait("ada", edit.job_id)).status == "succeeded"
        assert works(again)[0].concept == b"tensors"
        assert not concept.exists()
        # Killed before the record was written: nobody was told of this job.
        jobs._write("ada", (await again.get("ada", edit.job_id)).model_copy(update={"id": new_id("job")}), b"tensors")
        (record,) = tmp_path.glob("jobs/ada/*.safetensors")
        record.with_suffix(".json").unlink()
        await runner(denoised).check_health()
        assert not [*tmp_path.glob("jobs/ada/*.safetensors"), *tmp_path.glob("opens/ada/*")]

    asyncio.run(run())
