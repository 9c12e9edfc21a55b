"""Exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class EMA:
    """Keeps shadow ← decay · shadow + (1 − decay) · parameter, in float32.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that a short run is not dominated by its start.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.shadow = [p.detach().clone().float() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average after optimizer step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [p.detach().float() for p in self.parameters]
        torch._foreach_lerp_(self.shadow, current, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges averaged and current parameters; call again to undo."""
        for parameter, shadow in zip(self.parameters, self.shadow, strict=True):
            current = parameter.detach().clone().float()
            parameter.copy_(shadow)
            shadow.copy_(current)

    def state_dict(self) -> list[Tensor]:
        """The averaged parameters, in the order given to the constructor."""
        return self.shadow

    def load_state_dict(self, shadow: list[Tensor]) -> None:
        """Restores what `state_dict` gave."""
        for mine, saved in zip(self.shadow, shadow, strict=True):
            mine.copy_(saved)
