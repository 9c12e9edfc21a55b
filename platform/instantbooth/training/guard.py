"""What to do about a batch that would harm: one whose loss is no number, or whose gradient is far off the usual."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from instantbooth.errors import ParameterError

RECENT = 100
"""Steps whose gradients tell what is usual."""
ENOUGH = 20
"""So many of them are needed before anything is called a spike."""


@dataclass(kw_only=True)
class Guard:
    """Judges each step's loss and gradient norm; the same on every worker, since both are means over all of them."""

    spike_factor: float = 20.0
    """A gradient longer than this multiple of the recent median is a spike."""
    max_skipped: int = 20
    """Batches that may be skipped in a run."""
    recent: list[float] = field(default_factory=list)
    """Gradient norms of the last steps that counted."""
    skipped: int = 0
    """Batches skipped so far."""

    def __post_init__(self) -> None:
        if self.spike_factor <= 1 or self.max_skipped < 0:
            raise ParameterError(
                f"spike_factor must be over 1 and max_skipped at least 0, are {self.spike_factor} and "
                f"{self.max_skipped}; 20 and 20 are the defaults"
            )

    def judge(self, loss: float, norm: float) -> str | None:
        """Why the batch must be skipped, or None for one that counts."""
        reason = self._fault(loss, norm)
        if reason is None:
            self.recent = [*self.recent, norm][-RECENT:]
        else:
            self.skipped += 1
        return reason

    @property
    def exhausted(self) -> bool:
        """Whether more was skipped than may be."""
        return self.skipped > self.max_skipped

    def _fault(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}"
        if len(self.recent) >= ENOUGH and norm > self.spike_factor * (usual := statistics.median(self.recent)):
            return f"the gradient's norm is {norm:.3g}, {norm / usual:.0f} times the usual"
        return None
