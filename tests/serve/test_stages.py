"""Callers of the stages: what they are told, and when they are let go."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from serve.messages import Step
from serve.stages import Stages
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
