"""The last stage of a row: its pictures are denoised in company, packed and committed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import ray

from instantbooth import Concept
from instantbooth.engine import Engine, EngineConfig, Ticket
from instantbooth.errors import EngineError, StorageError
from instantbooth.images import encode_image
from instantbooth.ledger import Record
from instantbooth.storage import Answer
from pipelines.failures import Failure, judged, leave_a_dead_device
from pipelines.plan import SETTINGS, Piece
from pipelines.stages import Actor, StageConfig, Work

WRITERS = 8
"""Pictures that an actor stores at once."""


class ImageGenerator(Actor):
    """With the whole model and an engine: pictures of different subjects share every forward pass."""

    def load(self, stages: StageConfig) -> None:
        self.booth = stages.model.load(device=str(self.device), precision=self.model.precision)
        self.engine = Engine(self.booth, engine_config(stages.row_budget, exact=stages.exact, compiled=stages.compile))
        self.writers = ThreadPoolExecutor(WRITERS)
        self.node = ray.get_runtime_context().get_node_id()

    def done(self, works: Iterable[Work]) -> Iterator[dict[str, Any]]:
        """A row's id; how many of its pictures succeeded, failed, or are open; and the first failure."""
        begun = [(work, [self._begin(work, piece) for piece in work.pieces]) for work in works]
        for work, futures in begun:
            outcomes = [future.result() for future in futures]
            statuses = [status for status, _ in outcomes]
            failure = next((failure for _, failure in outcomes if failure is not None), None)
            yield {
                "id": [work.row.id],
                **{name: [statuses.count(name)] for name in ("succeeded", "failed", "open")},
                "code": [failure.code if failure else ""],
                "error": [failure.message if failure else ""],
            }

    def _begin(self, work: Work, piece: Piece) -> Future[tuple[str, Failure | None]]:
        """Lets the picture be made; its record's status, or "open" where it says nothing of the picture that there is
        none.
        """
        if work.concept is None:
            assert work.failure is not None
            return self.writers.submit(self._fail, piece, work.failure)
        try:
            request = self.booth.requests(
                piece.prompt,
                work.concept,
                seed=piece.seed,
                height=work.row.height,
                width=work.row.width,
                **{name: getattr(work.row, name) for name in SETTINGS},
            )[0]
            ticket = self.engine.submit(request)
        except Exception as error:
            return self.writers.submit(self._fail, piece, self._judged(error))
        # A writer that waited for a picture would keep those waiting that are done.
        return _after(ticket.future, self.writers, partial(self._finish, work, work.concept, piece, ticket))

    def _finish(self, work: Work, concept: Concept, piece: Piece, ticket: Ticket) -> tuple[str, Failure | None]:
        try:
            data, details = self._packed(work, concept, piece, ticket)
        except Exception as error:
            return self._fail(piece, self._judged(error))
        return self._committed(lambda: self.ledger.succeed(piece.work, piece.key, data, details), None)

    def _packed(self, work: Work, concept: Concept, piece: Piece, ticket: Ticket) -> tuple[bytes, dict[str, Any]]:
        """The picture as a file, with its provenance inside; and what its record tells."""
        picture = ticket.result()
        started = time.perf_counter()
        provenance = {
            "prompt": piece.prompt,
            "class_noun": work.row.class_noun,
            "seed": str(piece.seed),
            "weights": self.model.weights,
            "concept": concept.digest,
            "work": piece.work,
        }
        data = encode_image(picture, provenance, image_format=self.model.image_format)
        seconds = {stage: each / len(work.pieces) for stage, each in work.seconds.items()}
        seconds |= {"denoise": ticket.denoise_seconds, "decode": ticket.decode_seconds}
        seconds["pack"] = time.perf_counter() - started
        rounded = {stage: round(each, 5) for stage, each in seconds.items()}
        return data, {**provenance, "node": self.node, "seconds": rounded}

    def _judged(self, error: Exception) -> Failure:
        """A picture for which the device has no room even alone has failed: it is its size, which the row asked for."""
        if isinstance(error, EngineError) and not self.engine.alive:
            # A broken engine says nothing about a picture: the job stops, and goes on when run again.
            leave_a_dead_device(self.device, error)
            raise error
        return judged(error, self.device)

    def _fail(self, piece: Piece, failure: Failure) -> tuple[str, Failure | None]:
        if failure.transient:
            return "open", failure
        details = {"prompt": piece.prompt, "code": failure.code, "error": failure.message, "node": self.node}
        return self._committed(lambda: self.ledger.fail(piece.work, details), failure)

    def _committed(self, commit: Callable[[], Record], failure: Failure | None) -> tuple[str, Failure | None]:
        try:
            return commit().status, failure
        except StorageError as error:
            return "open", Failure.of(error, transient=True)


def engine_config(row_budget: int | None, *, exact: bool, compiled: bool) -> EngineConfig:
    """How pictures are denoised. ParameterError for a row budget that cannot be."""
    apart = {"texts_apart": True, "decode_batch": 1, "buckets": (max(1, (row_budget or 1) // 2),)}
    return EngineConfig(row_budget=row_budget, max_requests=1_000_000, compile=compiled, **(apart if exact else {}))


def _after(first: Future[Any], pool: ThreadPoolExecutor, then: Callable[[], Answer]) -> Future[Answer]:
    """What `then` returns, called in the pool once `first` has ended."""
    answer: Future[Answer] = Future()

    def call() -> None:
        try:
            answer.set_result(then())
        except BaseException as error:
            answer.set_exception(error)

    first.add_done_callback(lambda _: pool.submit(call))
    return answer
