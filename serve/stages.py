"""Calling the stages: with deadlines, and again where a replica is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError, WorkerCrashedError
from ray.serve.handle import DeploymentHandle

from serve.errors import ApiError
from serve.messages import Begun, Encoded, Event, Picture, Upload, Work

LOST = (RayActorError, WorkerCrashedError)
"""How a call ends whose replica died; every stage gives the same answer when asked again."""
MAX_LOSSES = 8
"""Replicas lost on one call with no picture between, after which it fails: it may be what ends them."""
REPLICA_LOST = "replica_lost"
"""The code of that failure."""
PAUSE_S = 0.25
READY_S = 2.0
"""How long replicas may take to answer what they know without work."""
GRACE_S = 2.0
"""How much longer than the deadline a caller waits for a replica to say that it passed."""


async def ask_all(handle: DeploymentHandle, method: str, *arguments: object) -> list[Any]:
    """The answers of all replicas but those that fail. Raises TimeoutError, and Ray's own where none is there."""
    broadcast = handle.broadcast(method, *arguments)
    answers = await broadcast.results_async(timeout_s=READY_S, return_exceptions=True)
    return [answer for answer in answers if not isinstance(answer, BaseException)]


class Stages:
    """Both stages, as ingress and jobs call them."""

    def __init__(self, encoder: DeploymentHandle, diffusion: DeploymentHandle) -> None:
        self.encoder = encoder
        self.diffusion = diffusion
        self._generate = diffusion.options(stream=True).generate

    async def encode(self, upload: Upload, deadline_s: float) -> Encoded:
        """The concept of an upload. Raises ImageError, ParameterError and TimeoutError.

        Raises ApiError (503) where MAX_LOSSES replicas were lost on it.
        """
        losses = 0
        async with asyncio.timeout(deadline_s):
            while True:
                try:
                    return await self.encoder.encode.remote(upload)
                except LOST as lost:
                    losses += 1
                    await _pause_after(losses, lost)

    async def generate(self, work: Work) -> AsyncIterator[Event]:
        """What DiffusionEngine.generate yields, each picture once, though replicas come and go.

        Raises ApiError (503) where MAX_LOSSES of them do without a picture.
        """
        deadline = None if work.deadline_s is None else time.monotonic() + work.deadline_s
        begun, pictures, losses = False, set(), 0
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            try:
                async with aclosing(self._attempt(work, left)) as events:
                    async for event in events:
                        if isinstance(event, Begun):
                            if begun:
                                continue
                            begun = True
                        elif event.image_index in pictures:
                            continue
                        elif isinstance(event, Picture):
                            pictures.add(event.image_index)
                            losses = 0
                        yield event
                return
            except LOST as lost:
                losses += 1
                await _pause_after(losses, lost)

    async def _attempt(self, work: Work, left: float | None) -> AsyncIterator[Event]:
        """One replica's events; it is told to stop where the caller does."""
        if left is not None and left <= 0:
            raise TimeoutError
        ends = None if left is None else asyncio.get_running_loop().time() + left + GRACE_S
        response = self._generate.remote(replace(work, deadline_s=left))
        finished = False
        try:
            while True:
                try:
                    # wait_for would return an event that is there already to a caller who was cancelled.
                    async with asyncio.timeout_at(ends):
                        event = await anext(response)
                except StopAsyncIteration:
                    finished = True
                    return
                yield event
        finally:
            if not finished:
                response.cancel()

    async def describe(self) -> dict[str, Any]:
        """The model. Raises TimeoutError where no replica is ready."""
        async with asyncio.timeout(READY_S):
            described: dict[str, Any] = await self.diffusion.describe.remote()
            return described


async def _pause_after(losses: int, lost: Exception) -> None:
    """Before a call is made again. Raises ApiError (503) after MAX_LOSSES."""
    if losses == MAX_LOSSES:
        message = f"{losses} replicas were lost while they worked on this; ask for less, or try again later"
        raise ApiError(503, REPLICA_LOST, message) from lost
    await asyncio.sleep(PAUSE_S)
