"""A second stage that does as it is told, and Serve's handles of deployments that are in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

from serve.messages import Begun, Event, Picture, Step, Work
from serve.schemas import Parameters

STEPS = 3
PARAMETERS = Parameters(
    adapter_scale=1,
    concept_scale=1,
    num_inference_steps=STEPS,
    guidance_scale=1,
    negative_prompt="",
    sampler="ddim",
)
BEGUN = Begun(
    parameters=PARAMETERS,
    prompt="a photo of a sks person",
    size="32x32",
    weights="",
    concept_digest="",
    cache_hit=False,
)
Script = Callable[[Work], AsyncIterator[Event]]


async def denoised(work: Work, steps: int = STEPS) -> AsyncIterator[Event]:
    """Everything goes well for so many steps."""
    yield BEGUN
    for step in range(1, steps + 1):
        yield Step(image_index=0, step=step, steps=STEPS)
    if steps == STEPS:
        yield Picture(image_index=0, seed=work.seed, data=b"picture", queue_s=0, generate_s=0)


async def endless(work: Work) -> AsyncIterator[Event]:
    """It begins and never ends."""
    yield BEGUN
    await asyncio.Event().wait()


class Diffusion:
    """The second stage: its calls run the scripts, the last one again and again."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.works: list[Work] = []
        self.queued_jobs = 0

    async def generate(self, work: Work) -> AsyncIterator[Event]:
        self.works.append(work)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        async for event in script(work):
            yield event

    async def describe(self) -> dict[str, object]:
        defaults = PARAMETERS.model_dump()
        return {"weights": "", "image_size": 32, "size_step": 8, "max_prompt_tokens": 75, "defaults": defaults}

    async def expect(self, queued_jobs: int) -> None:
        self.queued_jobs = queued_jobs


class Local:
    """Serve's handle of a deployment; all its replicas are one and the same."""

    def __init__(self, deployment: Any, replicas: int = 1) -> None:
        self.deployment = deployment
        self.replicas = replicas

    def options(self, *, stream: bool) -> Local:
        return self

    def broadcast(self, name: str, *arguments: Any) -> Any:
        async def results_async(**_: Any) -> list[Any]:
            return [await getattr(self.deployment, name)(*arguments) for _ in range(self.replicas)]

        return SimpleNamespace(results_async=results_async)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.deployment, name)

        def remote(*arguments: Any) -> Any:
            answer = method(*arguments)
            return _Stream(answer) if hasattr(answer, "__anext__") else answer

        return SimpleNamespace(remote=remote)


class _Stream:
    def __init__(self, events: AsyncIterator[Event]) -> None:
        self._events = events

    def __aiter__(self) -> _Stream:
        return self

    def __anext__(self) -> Any:
        return anext(self._events)

    def cancel(self) -> None:
        """What Serve does with the replica's generator is done here by whoever drops it."""
