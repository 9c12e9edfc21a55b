"""What a caller holds while a picture is being made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

from PIL import Image

from instantbooth.engine.scheduler import Size
from instantbooth.errors import DeadlineError, EngineError
from instantbooth.model.denoise import Row
from instantbooth.model.personalizer import Request


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a picture is."""

    step: int
    """Steps taken."""
    steps: int
    """Steps in all."""
    preview: Image.Image | None = None
    """What the picture looks like so far, where previews were asked for."""


class Ticket:
    """A picture being made; `future` is the same for callers that wait in other ways."""

    def __init__(
        self,
        request: Request,
        *,
        number: int,
        due: float,
        deadline: float | None,
        previews: int,
        listener: Callable[[Progress], None] | None = None,
    ) -> None:
        self.request = request
        self.deadline = deadline
        self.order = (due, number)
        self.future: Future[Image.Image] = Future()
        self.row: Row | None = None
        """None until its first step."""
        self.denoise_seconds = 0.0
        """Its share of the time of its steps."""
        self.decode_seconds = 0.0
        steps = request.table.num_steps
        self.preview_steps = {round(steps * n / (previews + 1)) for n in range(1, previews + 1)} - {0, steps}
        self._updates: SimpleQueue[Progress | None] = SimpleQueue()
        self.report = listener or self._updates.put
        """Called by the engine after a step, and when a preview is there."""
        self.future.add_done_callback(lambda _: self._updates.put(None))

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return self.request.height, self.request.width

    @property
    def unet_rows(self) -> int:
        """What one of its steps costs."""
        return 2 if self.request.guided else 1

    @property
    def remaining_work(self) -> int:
        """U-Net rows still to compute."""
        taken = self.row.step if self.row else 0
        return self.unet_rows * (self.request.table.num_steps - taken)

    def given_up(self) -> Exception | None:
        """Why nothing more shall be done for it; None while it is wanted."""
        if self.future.done():
            return EngineError("the request has ended")
        if self.deadline is not None and time.monotonic() > self.deadline:
            return DeadlineError("the picture was not finished by its deadline")
        return None

    def charge_decoding(self, seconds: float) -> None:
        """Called by the decoder with the picture's share of its batch, before it is delivered."""
        self.decode_seconds += seconds

    def result(self, timeout: float | None = None) -> Image.Image:
        """The picture. Raises DeadlineError, EngineError, CancelledError, or TimeoutError after `timeout` seconds."""
        return self.future.result(timeout)

    def cancel(self) -> bool:
        """Gives its place up within one step; False where the picture is made already."""
        return self.future.cancel()

    def updates(self) -> Iterator[Progress]:
        """Its progress as it happens, each step once, until it ends; for one reader, where nobody else listens."""
        while (update := self._updates.get()) is not None:
            yield update

    def deliver(self, picture: Image.Image) -> bool:
        """Ends it with its picture; False where it has ended otherwise."""
        return self._end(partial(self.future.set_result, picture))

    def fail(self, error: BaseException) -> bool:
        """Ends it with an error; False where it has ended otherwise."""
        return self._end(partial(self.future.set_exception, error))

    def _end(self, settle: Callable[[], None]) -> bool:
        try:
            settle()
        except InvalidStateError:
            return False
        return True
