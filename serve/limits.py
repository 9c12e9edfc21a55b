"""How much is taken on at once: refused here, before anything is done for it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
