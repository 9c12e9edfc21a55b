"""Who takes the next step: the earliest due among those of the size whose turn it is."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

Size = tuple[int, int]
"""Height and width of a picture in pixels. Only pictures of one size fit into one forward pass."""


class Schedulable(Protocol):
    """What is known of a request when its turn is decided."""

    @property
    def size(self) -> Size: ...
    @property
    def unet_rows(self) -> int:
        """What one of its steps costs."""
        ...

    @property
    def order(self) -> tuple[float, int]:
        """When it is due, and its number among those due then; never equal to another's."""
        ...


Item = TypeVar("Item", bound=Schedulable)


class Scheduler(Generic[Item]):
    """A line for each size, the earliest due first; sizes share the machine's time equally.

    Turns are decided anew at every step, so that a request which is due earlier joins at once, and one that must give
    way keeps what it has reached. One thread changes it; others may look.
    """

    def __init__(self, fits: Callable[[Size, int, int], bool]) -> None:
        """`fits` tells whether so many requests of a size, with so many U-Net rows, may share a step; if they may not,
        no more of them may."""
        self._fits = fits
        self._lines: dict[Size, list[Item]] = {}
        self._seconds: dict[Size, float] = {}

    def __len__(self) -> int:
        return sum(map(len, list(self._lines.values())))

    def __iter__(self) -> Iterator[Item]:
        return (item for line in list(self._lines.values()) for item in list(line))

    def add(self, item: Item) -> None:
        """Lets it take part from the next step on."""
        if item.size not in self._lines:
            # A size that was absent has saved no time up: it starts level with the one that is furthest behind.
            behind = min((self._seconds[size] for size in self._lines), default=0.0)
            self._seconds[item.size] = max(self._seconds.get(item.size, 0.0), behind)
            self._lines[item.size] = []
        insort(self._lines[item.size], item, key=lambda each: each.order)

    def remove(self, item: Item) -> None:
        """Takes it out of its line."""
        line = self._lines[item.size]
        line.remove(item)
        if not line:
            del self._lines[item.size]
        if not self._lines:
            # Nobody waited for anybody: what a size has used is no debt to those that come after.
            self._seconds.clear()

    def choose(self, allowed: Callable[[Item], bool] = lambda item: True) -> list[Item]:
        """Those who step together now; empty where nobody may. One always may, whether it fits or not."""
        for size in sorted(self._lines, key=lambda each: self._seconds[each]):
            chosen: list[Item] = []
            rows = 0
            for item in filter(allowed, self._lines[size]):
                if not chosen or self._fits(size, len(chosen) + 1, rows + item.unet_rows):
                    chosen.append(item)
                    rows += item.unet_rows
                elif not self._fits(size, len(chosen) + 1, rows + 1):
                    break
            if chosen:
                return chosen
        return []

    def charge(self, size: Size, seconds: float) -> None:
        """Counts what a step of this size took."""
        self._seconds[size] = self._seconds.get(size, 0.0) + seconds
