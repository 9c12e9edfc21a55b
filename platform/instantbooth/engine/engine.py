"""The engine: a thread that takes every request one step further, again and again."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from threading import Condition, Thread
from types import TracebackType
from typing import Self

import torch
from PIL import Image

from instantbooth import Personalizer
from instantbooth.engine.concepts import KeysValuesCache
from instantbooth.engine.decoder import Decoder
from instantbooth.engine.knee import RowBudgets, measure_budgets, wait_for
from instantbooth.engine.scheduler import Scheduler, Size
from instantbooth.engine.shapes import Shapes, compile_unet, default_buckets
from instantbooth.engine.ticket import Progress, Ticket
from instantbooth.engine.turns import Turns
from instantbooth.errors import DeadlineError, EngineError, OverloadedError, ParameterError, PictureError
from instantbooth.model.denoise import RowBatch
from instantbooth.model.personalizer import Request

logger = logging.getLogger(__name__)

STEP_PATIENCE_S = 0.05
"""For pictures that are decoded on the same cores."""
STEPS_TO_RECOVER = 1000
"""After so many steps for which memory sufficed, twice as many rows are tried again."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much the engine takes on at once."""

    row_budget: int | None = None
    """U-Net rows of the model's own size in a step (a guided request has two), and of others in proportion to their
    pixels; None measures the knees of several sizes at start, uncompiled."""
    max_row_budget: int = 64
    """Largest number of rows tried when measuring, and of smaller pictures in a step."""
    max_requests: int = 1024
    """Requests held, waiting ones included; beyond them `submit` refuses."""
    patience_s: float = 60.0
    """A request without deadline takes its turn as if it were due this many seconds after it came."""
    concept_cache_bytes: int = 2**30
    """Keys and values of concepts that are kept."""
    decode_batch: int = 4
    """Pictures decoded together."""
    max_undecoded: int = 16
    """Finished latents that may wait for the VAE before no further request is begun, and as many previews."""
    buckets: tuple[int, ...] = ()
    """Numbers of requests that batches are padded to, rising, with two U-Net rows for each where any is guided, and
    the most reference images; a step has no more requests than the largest. Empty pads nothing that is not compiled."""
    compile: bool = False
    """Whether the U-Net is compiled at start, for pictures of the model's own size in every shape that batches are
    padded to; without `buckets`, powers of two. Other sizes are neither compiled nor, without `buckets`, padded."""
    compile_backend: str = "inductor"
    """As torch.compile knows it."""
    texts_apart: bool = False
    """Whether each prompt is embedded alone. With this, one bucket of half the row budget and a decode_batch of 1, a
    guided picture is bit for bit the same in any company; else it is the same up to rounding."""

    def __post_init__(self) -> None:
        for name in ("max_row_budget", "max_requests", "decode_batch", "max_undecoded"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} must be at least 1, is {getattr(self, name)}; raise it")
        if self.row_budget is not None and self.row_budget < 1:
            raise ParameterError(f"row_budget must be at least 1, is {self.row_budget}; raise it, or pass None")
        if list(self.buckets) != sorted(set(self.buckets)) or any(bucket < 1 for bucket in self.buckets):
            raise ParameterError(f"buckets must rise from 1 or more, are {self.buckets}; sort them")


@dataclass(kw_only=True)
class EngineStats:
    """Counts since the start, and what is there now."""

    waiting: dict[Size, int] = field(default_factory=dict)
    """U-Net rows that a step of the requests not begun has, by height and width."""
    running: dict[Size, int] = field(default_factory=dict)
    """The same of requests with at least one step taken and one to take."""
    queued_work: int = 0
    """U-Net rows still to compute for all of them: what autoscaling goes by."""
    undecoded: int = 0
    """Finished latents that wait for the VAE."""
    steps: int = 0
    """Forward passes."""
    rows: int = 0
    """U-Net rows in them that belonged to a request."""
    offered_rows: int = 0
    """U-Net rows that there was room for in them."""
    padded_rows: int = 0
    """U-Net rows in them that filled a bucket up."""
    step_seconds: float = 0.0
    """Time in them."""
    ended: dict[str, int] = field(default_factory=dict)
    """Requests by how they ended: finished, failed, cancelled, expired, refused."""
    concept_hits: int = 0
    concept_misses: int = 0


class Engine:
    """Denoises what is submitted, rows of any identity in one batch, until it is closed.

    >>> with Engine(booth) as engine:                                              # doctest: +SKIP
    ...     tickets = [engine.submit(request) for request in booth.requests(prompts, concepts, seed=7)]
    ...     pictures = [ticket.result() for ticket in tickets]

    A picture does not depend on its company: it equals `booth.generate` with the same seed, up to rounding.
    """

    def __init__(self, booth: Personalizer, config: EngineConfig = EngineConfig()) -> None:
        """Measures the row budgets where none is given, which takes seconds, and compiles the U-Net if it is to.

        `booth` must not be trained meanwhile. Raises EngineError where the U-Net cannot be compiled.
        """
        self.booth = booth
        self.config = config
        self.concepts = KeysValuesCache(booth, config.concept_cache_bytes)
        self._native: Size = (booth.base.image_size, booth.base.image_size)
        self._budgets = _row_budgets(booth, config)
        self._budget_share = 1.0
        """Lowered for a while where memory does not suffice."""
        self._steps_that_fit = 0
        self._shapes = self._native_shapes = Shapes(
            buckets=config.buckets, tokens_per_image=booth.image_encoder.num_tokens
        )
        self._native_unet = booth.base.unet
        if config.compile:
            self._native_shapes = replace(self._shapes, buckets=config.buckets or default_buckets(self.row_budget))
            with _denoising_stream(booth.base.device):
                self._native_unet = compile_unet(
                    booth, self._native_shapes.within(self.row_budget), backend=config.compile_backend
                )
        self._scheduler: Scheduler[Ticket] = Scheduler(self._fits)
        self._batch: RowBatch | None = None
        self._arrivals: list[Ticket] = []
        self._forgotten: set[str] = set()
        self._wake = Condition()
        self._closing = False
        self._numbers = count()
        self._totals = EngineStats()
        self._ended: Counter[str] = Counter()
        self._turns = Turns(booth.base.device)
        self._decoder = Decoder(
            booth.base,
            self._turns,
            batch_size=config.decode_batch,
            max_previews=config.max_undecoded,
            name="instantbooth-decoder",
        )
        self._thread = Thread(target=self._run, name="instantbooth-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: Request,
        *,
        deadline_s: float | None = None,
        previews: int = 0,
        listener: Callable[[Progress], None] | None = None,
    ) -> Ticket:
        """Takes a request on; it joins at the next step that has room for it.

        Where it is not finished `deadline_s` seconds from now it ends in DeadlineError. `previews` is how many pictures
        of its progress `Ticket.updates` shows; a `listener` is told instead, by the engine's own threads, which it
        must not keep. Raises OverloadedError where the engine is full, EngineError where it is closed.
        """
        now = time.monotonic()
        deadline = None if deadline_s is None else now + deadline_s
        due = now + self.config.patience_s if deadline is None else deadline
        ticket = Ticket(
            request, number=next(self._numbers), due=due, deadline=deadline, previews=previews, listener=listener
        )
        with self._wake:
            if self._closing or not self._decoder.alive:
                raise EngineError("the engine is closed; start another")
            if (held := len(self._arrivals) + len(self._scheduler)) >= self.config.max_requests:
                self._ended["refused"] += 1
                raise OverloadedError(f"the engine holds {held} requests, its limit; try again later")
            self._arrivals.append(ticket)
            self._wake.notify()
        return ticket

    @property
    def row_budget(self) -> int:
        """U-Net rows of the model's own size in a step, now."""
        return self._budget(self._native)

    @property
    def alive(self) -> bool:
        """Whether it makes what is submitted: false once it is closed or one of its threads broke down."""
        return self._thread.is_alive() and self._decoder.alive and not self._closing

    def forget(self, concept_digest: str) -> None:
        """Drops a deleted concept's keys and values: now, or with the last request that still needs them."""
        with self._wake:
            self._forgotten.add(concept_digest)
            self._discard_forgotten()

    def stats(self) -> EngineStats:
        """A snapshot."""
        tickets = [*self._scheduler, *self._arrivals]
        waiting: Counter[Size] = Counter()
        running: Counter[Size] = Counter()
        for ticket in tickets:
            (waiting if ticket.row is None else running)[ticket.size] += ticket.unet_rows
        return EngineStats(
            waiting=waiting,
            running=running,
            queued_work=sum(ticket.remaining_work for ticket in tickets),
            undecoded=self._decoder.backlog,
            steps=self._totals.steps,
            rows=self._totals.rows,
            offered_rows=self._totals.offered_rows,
            padded_rows=self._totals.padded_rows,
            step_seconds=self._totals.step_seconds,
            ended=dict(self._ended),
            concept_hits=self.concepts.hits,
            concept_misses=self.concepts.misses,
        )

    def close(self, *, drain: bool = True) -> None:
        """Takes nothing more and ends: after everything taken is finished, or with `drain=False` at once."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if not drain:
            self._fail_all(EngineError("the engine was closed; submit the request to another"))
        self._thread.join()
        self._decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def _run(self) -> None:
        try:
            with _denoising_stream(self.booth.base.device):
                while self._gather():
                    if not self._decoder.alive:
                        raise EngineError("the decoder is gone")
                    self._drop_ended()
                    self._step(self._scheduler.choose(self._may_step))
        except BaseException:
            # A defect of the engine itself or a lost device: nobody shall wait for a thread that is gone.
            logger.exception("the engine broke down")
            self._fail_all(EngineError("the engine broke down; start another"))

    def _fail_all(self, error: EngineError) -> None:
        with self._wake:
            self._closing = True
            for ticket in [*self._scheduler, *self._arrivals]:
                ticket.fail(error)

    def _gather(self) -> bool:
        """Lets arrivals in, and sleeps a while where nobody can step; False once closed and empty."""
        with self._wake:
            self._discard_forgotten()
            if not (self._arrivals or self._closing or any(map(self._may_step, self._scheduler))):
                # The last batch is done: its keys and values shall not outlast the cache's.
                self._batch = None
                # The decoder does not wake this thread: look now and then whether it has caught up.
                self._wake.wait(timeout=0.01 if len(self._scheduler) else None)
            for ticket in self._arrivals:
                self._scheduler.add(ticket)
            self._arrivals = []
        return bool(len(self._scheduler)) or not self._closing

    def _discard_forgotten(self) -> None:
        needed = {ticket.request.concept.digest for ticket in [*self._scheduler, *self._arrivals]}
        for digest in self._forgotten - needed:
            self.concepts.discard(digest)
        self._forgotten &= needed

    def _drop_ended(self) -> None:
        for ticket in self._scheduler:
            if (reason := ticket.given_up()) is not None:
                self._scheduler.remove(ticket)
                self._settle(ticket, reason)

    def _may_step(self, ticket: Ticket) -> bool:
        return ticket.row is not None or self._decoder.backlog < self.config.max_undecoded

    def _budget(self, size: Size) -> int:
        return max(1, int(self._budgets.of(size) * self._budget_share))

    def _fits(self, size: Size, requests: int, rows: int) -> bool:
        return self._shapes_of(size).padded_rows(requests, rows) <= self._budget(size)

    def _shapes_of(self, size: Size) -> Shapes:
        return self._native_shapes if size == self._native else self._shapes

    def _step(self, tickets: Sequence[Ticket]) -> None:
        """One step of these; where it fails, of each half, until the one at fault is alone and fails alone.

        Raises torch.AcceleratorError: after one, no call to the device succeeds in this process.
        """
        if not tickets:
            return
        try:
            with self._turns.turn(patience_s=STEP_PATIENCE_S):
                started = time.perf_counter()
                batch = self._assemble(tickets)
                batch.step()
                wait_for(self.booth.base.device)
                seconds = time.perf_counter() - started
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._batch = None
            # Where one alone does not fit, it is not their number.
            if isinstance(error, torch.OutOfMemoryError) and len(tickets) > 1:
                self._budget_share /= 2 if self._budget(tickets[0].size) > 1 else 1
                self._steps_that_fit = 0
            if len(tickets) == 1:
                self._scheduler.remove(tickets[0])
                self._settle(tickets[0], error)
                return
            half = len(tickets) // 2
            self._step(tickets[:half])
            self._step(tickets[half:])
            return
        self._steps_that_fit += 1
        if self._steps_that_fit % STEPS_TO_RECOVER == 0:
            self._budget_share = min(1.0, 2 * self._budget_share)
        self._scheduler.charge(tickets[0].size, seconds)
        rows = sum(ticket.unet_rows for ticket in tickets)
        self._totals.steps += 1
        self._totals.rows += rows
        # A single guided request has two rows, whatever the budget.
        self._totals.offered_rows += max(rows, self._budget(tickets[0].size))
        self._totals.padded_rows += len(batch.order) - rows
        self._totals.step_seconds += seconds
        for ticket in tickets:
            ticket.denoise_seconds += seconds * ticket.unet_rows / rows
            self._after_step(ticket)

    def _assemble(self, tickets: Sequence[Ticket]) -> RowBatch:
        """The batch of these rows: the last one where nobody joined or left."""
        new = [ticket for ticket in tickets if ticket.row is None]
        if new:
            for group in [[ticket] for ticket in new] if self.config.texts_apart else [new]:
                for ticket, row in zip(group, self.booth.rows([each.request for each in group]), strict=True):
                    ticket.row = row
        rows = [ticket.row for ticket in tickets if ticket.row is not None]
        if self._batch is None or self._batch.rows != rows:
            for ticket, row in zip(tickets, rows, strict=True):
                row.keys_values = self.concepts.get(ticket.request.concept, counted=row.step == 0)
            size = tickets[0].size
            unet = self._native_unet if size == self._native else self.booth.base.unet
            self._batch = RowBatch(unet, rows, self._shapes_of(size).of(rows))
            for row in rows:
                # The batch has its copy: what a waiting row held would escape the cache's bound.
                row.keys_values = None
        return self._batch

    def _after_step(self, ticket: Ticket) -> None:
        row = ticket.row
        assert row is not None
        progress = Progress(step=row.step, steps=row.table.num_steps)
        ticket.report(progress)
        if row.done:
            self._scheduler.remove(ticket)
            if not torch.isfinite(row.latents).all():
                self._settle(ticket, PictureError("the picture is not finite; use weights or a precision that fit"))
                return
            settle = partial(self._settle, ticket)
            self._decoder.put(row.latents, settle, settle, ticket.charge_decoding, ticket.given_up)
        elif row.step in ticket.preview_steps and row.previous_x0 is not None:
            self._decoder.put_preview(row.previous_x0, partial(_show, ticket, progress), ticket.given_up)

    def _settle(self, ticket: Ticket, outcome: Image.Image | Exception) -> None:
        """Ends a request that needs no further step."""
        if isinstance(outcome, Exception):
            settled, how = ticket.fail(outcome), "expired" if isinstance(outcome, DeadlineError) else "failed"
        else:
            settled, how = ticket.deliver(outcome), "finished"
        self._ended[how if settled else "cancelled"] += 1


def _row_budgets(booth: Personalizer, config: EngineConfig) -> RowBudgets:
    if config.row_budget is None:
        by_side = measure_budgets(booth, max_rows=config.max_row_budget)
    else:
        by_side = {booth.base.image_size: config.row_budget}
    return RowBudgets(by_side, most=max(by_side[booth.base.image_size], config.max_row_budget))


def _show(ticket: Ticket, progress: Progress, preview: Image.Image) -> None:
    ticket.report(Progress(step=progress.step, steps=progress.steps, preview=preview))


@contextmanager
def _denoising_stream(device: torch.device) -> Iterator[None]:
    """A CUDA stream that goes before the decoder's."""
    stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
    with torch.cuda.stream(stream):
        yield
