"""What a command is measured by: a value, its bar, and whether it is met."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

Goal = tuple[float, float, bool]
"""The value, the bar, and whether the value meets it."""


def at_least(value: float, bar: float) -> Goal:
    """Met by the bar and above."""
    return value, bar, value >= bar


def at_most(value: float, bar: float) -> Goal:
    """Met by the bar and below."""
    return value, bar, value <= bar


def conclude(result: Mapping[str, object], goals: Mapping[str, Goal]) -> None:
    """Prints the result and its goals as JSON, and ends the program with status 1 where one is missed."""
    print(json.dumps({**result, "goals": goals}, indent=2))
    if not all(met for _, _, met in goals.values()):
        sys.exit(1)
