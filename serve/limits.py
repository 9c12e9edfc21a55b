"""How much is taken on at once: the rest is refused before anything is done for it, or waits for its turn."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from serve.errors import ApiError

MAX_RETRY_AFTER_S = 30


class Gate:
    """A number of places. Whoever finds too few is told at once when to come back."""

    def __init__(self, places: int, what: str) -> None:
        self.places = places
        self.taken = 0
        self._what = what
        self._seconds = 1.0
        """What a call took, on average, the recent ones above all."""

    def check(self, places: int = 1) -> None:
        """ApiError 429 where there are too few places; one call may always have all of them."""
        if self.taken and self.taken + places > self.places:
            wait = min(MAX_RETRY_AFTER_S, math.ceil(self._seconds))
            raise ApiError(
                429,
                "overloaded",
                f"{self.taken} {self._what} are under way and at most {self.places} may be; try again in {wait} s",
                retry_after_s=wait,
            )

    @contextmanager
    def enter(self, places: int = 1) -> Iterator[None]:
        """Takes places for as long as the call lasts. ApiError 429 where there are too few."""
        self.check(places)
        self.taken += places
        started = time.monotonic()
        try:
            yield
        finally:
            self.taken -= places
            self._seconds += 0.1 * (time.monotonic() - started - self._seconds)


class Turns:
    """A number of places. Whoever finds none waits, and tenants who wait take turns, however long their queues."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._free = places
        """Below zero where there are fewer places than were taken."""
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Tenants in the order of their turns."""

    def resize(self, places: int) -> None:
        """Changes the number of places; whoever has one keeps it."""
        self._free += places - self._places
        self._places = places
        self._hand_out()

    @asynccontextmanager
    async def enter(self, tenant: str) -> AsyncIterator[None]:
        """A place, for as long as the block lasts."""
        await self._take(tenant)
        try:
            yield
        finally:
            self._give()

    async def _take(self, tenant: str) -> None:
        if self._free > 0:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._give()
            raise

    def _give(self) -> None:
        self._free += 1
        self._hand_out()

    def _hand_out(self) -> None:
        """Gives free places to the tenants in turn, to the first of each that still waits."""
        while self._free > 0 and self._waiting:
            tenant = next(iter(self._waiting))
            queue = self._waiting.pop(tenant)
            turn = queue.popleft()
            if queue:
                self._waiting[tenant] = queue
            if not turn.done():
                self._free -= 1
                turn.set_result(None)
