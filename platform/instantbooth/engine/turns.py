"""Denoising and decoding one after the other, where they share the same cores."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

import torch


class Turns:
    """On a CPU one thread at a time, in the order of their coming; on other devices, which have streams, all at once.

    Two threads that compute side by side on the same cores wait for each other's helpers at every layer.
    """

    def __init__(self, device: torch.device) -> None:
        self._needed = device.type == "cpu"
        self._line: deque[object] = deque()
        self._changed = Condition()

    @contextmanager
    def turn(self, *, patience_s: float) -> Iterator[None]:
        """Waits for those before, though not for ever: then both compute at once."""
        if not self._needed:
            yield
            return
        me = object()
        with self._changed:
            self._line.append(me)
            self._changed.wait_for(lambda: self._line[0] is me, timeout=patience_s)
        try:
            yield
        finally:
            with self._changed:
                self._line.remove(me)
                self._changed.notify_all()
