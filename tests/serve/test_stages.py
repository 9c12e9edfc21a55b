"""Callers of the stages: what they are told, and when they are let go."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from serve import stages as module
from serve.errors import ApiError
from serve.messages import Picture, Step, Upload
from serve.stages import MAX_LOSSES, Stages, ask_all
from tests.serve.works import a_work


def test_who_was_cancelled_gets_no_event_that_came_meanwhile() -> None:
    class Response:
        """A replica's events: one, whenever the test says so, and then none for ever."""

        def __init__(self) -> None:
            self.events = [asyncio.get_running_loop().create_future() for _ in range(2)]
            self.left = iter(self.events)
            self.cancelled = False

        async def __anext__(self) -> Step:
            return await next(self.left)

        def cancel(self) -> None:
            self.cancelled = True

    async def cancelled_with_an_event_there() -> bool:
        response = Response()
        handle = SimpleNamespace(generate=SimpleNamespace(remote=lambda work: response))
        handle.options = lambda stream: handle
        stages = Stages(None, handle)

        async def consume() -> None:
            async for _ in stages.generate(a_work(deadline_s=60.0)):
                pass

        task = asyncio.ensure_future(consume())
        await asyncio.sleep(0.01)
        response.events[0].set_result(Step(image_index=0, step=1, steps=2))
        await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=5)
        return bool(done) and task.cancelled() and response.cancelled

    assert asyncio.run(cancelled_with_an_event_there())


@pytest.mark.parametrize("pictures", [0, 2])
def test_work_that_ends_every_replica_is_given_up_and_work_that_goes_on_is_not(
    pictures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the first replicas makes one picture more than the last; those after them make none."""
    monkeypatch.setattr(module, "PAUSE_S", 0)
    calls = 0

    class Response:
        def __init__(self) -> None:
            nonlocal calls
            calls += 1
            self.left = iter(range(min(calls, pictures)))

        async def __anext__(self) -> Picture:
            for index in self.left:
                return Picture(image_index=index, seed=0, data=b"", queue_s=0, generate_s=0)
            raise RayActorError

        def cancel(self) -> None:
            pass

    got = []

    async def generate() -> None:
        handle = SimpleNamespace(generate=SimpleNamespace(remote=lambda work: Response()))
        handle.options = lambda stream: handle
        async for event in Stages(None, handle).generate(a_work()):
            got.append(event.image_index)

    with pytest.raises(ApiError, match="replicas were lost") as error:
        asyncio.run(generate())
    assert error.value.status == 503
    assert got == list(range(pictures))
    # A picture clears what was lost before it, and the replica that made it is lost too.
    assert calls == MAX_LOSSES + max(pictures - 1, 0)


def test_photos_that_end_every_encoder_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0)
    calls = 0

    async def lost(upload: Upload) -> None:
        nonlocal calls
        calls += 1
        raise RayActorError

    encoder = SimpleNamespace(encode=SimpleNamespace(remote=lost))
    stages = Stages(encoder, SimpleNamespace(options=lambda stream: SimpleNamespace(generate=None)))
    with pytest.raises(ApiError, match="replicas were lost") as error:
        asyncio.run(stages.encode(Upload(images=(b"",), masks=None, class_noun="person"), 20))
    assert (error.value.status, calls) == (503, MAX_LOSSES)


def test_a_replica_that_dies_does_not_silence_the_others() -> None:
    async def answer(replica: int) -> int:
        if replica == 1:
            raise RayActorError
        return replica

    class Broadcast:
        """As Serve's own: without `return_exceptions` one failure is the answer of all."""

        async def results_async(self, *, timeout_s: float, return_exceptions: bool = False) -> list[object]:
            return await asyncio.gather(*map(answer, range(3)), return_exceptions=return_exceptions)

    handle = SimpleNamespace(broadcast=lambda method: Broadcast())
    assert asyncio.run(ask_all(handle, "snapshot")) == [0, 2]
