"""Latents become pictures beside the denoising, never in its way."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from queue import Empty, PriorityQueue
from threading import Lock, Thread

import torch
from PIL import Image
from torch import Tensor

from instantbooth.engine.turns import Turns
from instantbooth.errors import EngineError
from instantbooth.model.base import BaseModel

DECODER_PATIENCE_S = 1.0
"""For a step, where both compute on the same cores."""

logger = logging.getLogger(__name__)


@dataclass(order=True)
class _Job:
    priority: int
    number: int
    latents: Tensor | None = field(compare=False, default=None)
    deliver: Callable[[Image.Image], None] = field(compare=False, default=lambda picture: None)
    fail: Callable[[Exception], None] = field(compare=False, default=lambda error: None)
    charge: Callable[[float], None] = field(compare=False, default=lambda seconds: None)
    given_up: Callable[[], Exception | None] = field(compare=False, default=lambda: None)


_PICTURE, _PREVIEW, _STOP = 0, 1, 2


class Decoder:
    """A thread with the VAE, on a CUDA stream of the lowest priority. Pictures go before previews."""

    def __init__(self, base: BaseModel, turns: Turns, *, batch_size: int, max_previews: int, name: str) -> None:
        """It decodes a batch in each of its `turns`."""
        self._base = base
        self._turns = turns
        self._batch_size = batch_size
        self._max_previews = max_previews
        self._jobs: PriorityQueue[_Job] = PriorityQueue()
        self._number = count()
        self._pending = {_PICTURE: 0, _PREVIEW: 0}
        self._lock = Lock()
        self._broken = False
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it decodes what is put: false once it is closed or broke down."""
        return self._thread.is_alive() and not self._broken

    @property
    def backlog(self) -> int:
        """Pictures, previews apart, that are not decoded yet."""
        return self._pending[_PICTURE]

    def put(
        self,
        latents: Tensor,
        deliver: Callable[[Image.Image], None],
        fail: Callable[[Exception], None],
        charge: Callable[[float], None],
        given_up: Callable[[], Exception | None],
    ) -> None:
        """Decodes scaled latents [C, H, W] as soon as those before them are done; then calls `deliver` or `fail`.

        `charge` is told the seconds first. `given_up` is asked before: where it has a reason not to decode, that is
        what `fail` is called with.
        """
        job = _Job(_PICTURE, next(self._number), latents, deliver, fail, charge, given_up)
        with self._lock:
            self._pending[_PICTURE] += 1
            self._jobs.put(job)
            broken = self._broken
        if broken:
            self._fail_all([])

    def put_preview(
        self,
        latents: Tensor,
        deliver: Callable[[Image.Image], None],
        given_up: Callable[[], Exception | None],
    ) -> None:
        """The same for a preview, which is left out where a picture waits, or `max_previews` do."""
        if not self._pending[_PICTURE] and self._pending[_PREVIEW] < self._max_previews:
            self._count(_PREVIEW, 1)
            self._jobs.put(_Job(_PREVIEW, next(self._number), latents, deliver, given_up=given_up))

    def close(self) -> None:
        """Decodes what is there, then ends the thread."""
        self._jobs.put(_Job(_STOP, next(self._number)))
        self._thread.join()

    def _count(self, priority: int, change: int) -> None:
        with self._lock:
            self._pending[priority] += change

    def _run(self) -> None:
        with torch.cuda.stream(_stream(self._base.device)):
            while self._decode_next():
                pass

    def _decode_next(self) -> bool:
        """False where nothing more is to come. Holds no job beyond itself: an idle thread keeps nobody's picture."""
        batch = self._next_batch()
        if batch[0].latents is None:
            return False
        try:
            if wanted := [job for job in batch if self._is_wanted(job)]:
                self._decode(wanted)
        except BaseException:
            # A lost device or a listener's defect: nobody shall wait for a thread that is gone.
            logger.exception("the decoder broke down")
            with self._lock:
                self._broken = True
            self._fail_all(batch)
            return False
        return True

    def _fail_all(self, jobs: list[_Job]) -> None:
        """These and whatever waits."""
        with suppress(Empty):
            while True:
                jobs.append(self._jobs.get_nowait())
        for job in jobs:
            job.fail(EngineError("the engine broke down; start another"))

    def _next_batch(self) -> list[_Job]:
        """The next job, and those of its kind behind it with latents of the same shape."""
        batch = [self._jobs.get()]
        while batch[0].latents is not None and len(batch) < self._batch_size:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                break
            known = (batch[0].priority, batch[0].latents.shape)
            if job.latents is None or (job.priority, job.latents.shape) != known:
                self._jobs.put(job)
                break
            batch.append(job)
        return batch

    def _is_wanted(self, job: _Job) -> bool:
        reason = job.given_up()
        if reason is not None:
            self._count(job.priority, -1)
            job.fail(reason)
        return reason is None

    def _decode(self, batch: list[_Job]) -> None:
        try:
            with self._turns.turn(patience_s=DECODER_PATIENCE_S):
                started = time.perf_counter()
                pictures = self._base.decode(torch.stack([job.latents for job in batch if job.latents is not None]))
                seconds = (time.perf_counter() - started) / len(batch)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if len(batch) > 1:
                for job in batch:
                    self._decode([job])
                return
            self._count(batch[0].priority, -1)
            batch[0].fail(error)
            return
        for job, picture in zip(batch, pictures, strict=True):
            self._count(job.priority, -1)
            job.charge(seconds)
            job.deliver(picture)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device, priority=0) if device.type == "cuda" else None
