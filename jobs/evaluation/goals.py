"""What InstantBooth is to reach beside the other methods, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instantbooth.evaluation.methods.registry import METHODS
from jobs.benchmarks.goals import Goal, at_least

REFERENCE = "instantbooth"
"""Every row is also compared with this method's: times as multiples, figures subject by subject."""
FASTER = {"textual-inversion": 250.0, "dreambooth": 100.0}
"""Methods that are to be beaten on alignment and face distance, and by how many times in speed."""
PEERS = ("ip-adapter", "ip-adapter-plus")
"""Methods that are to be beaten in identification at equal alignment."""


def goals_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Goal]:
    """The goals that a table's rows decide; none without InstantBooth among them.

    Alignment counts as not below a peer's where the 95 % interval of the difference, subject by subject, reaches 0.
    Times of other machines than InstantBooth's reach no goal.
    """
    goals: dict[str, Goal] = {}
    if REFERENCE not in rows:
        return goals
    for name, times in FASTER.items():
        if name in rows:
            title, more = METHODS[name].title, rows[name]["instantbooth_more"]
            goals[f"alignment above {title}'s"] = _above(more["alignment"]["mean"])
            goals[f"face distance below {title}'s"] = _above(-more["face_distance"]["mean"])
            goals[f"times as fast as {title}"] = at_least(rows[name].get("seconds_ratio", 0.0), times)
    for name in PEERS:
        if name in rows:
            title, more = METHODS[name].title, rows[name]["instantbooth_more"]
            goals[f"identification above {title}'s"] = _above(more["identification"]["mean"])
            goals[f"alignment not below {title}'s"] = at_least(more["alignment"]["high"], 0.0)
    return goals


def goals_at_equal_alignment(
    own: Mapping[str, Any], curves: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Goal]:
    """Whether a method's row is above its peers' identification where their scales give its own alignment.

    Between two scales a peer's curve is taken for straight. Beyond its ends it stays what it is there.
    """
    goals = {}
    for name, rows in curves.items():
        curve = sorted((row["alignment"]["mean"], row["identification"]["mean"]) for row in rows)
        peer = np.interp(own["alignment"]["mean"], *zip(*curve, strict=True))
        lead = own["identification"]["mean"] - float(peer)
        goals[f"identification above {METHODS[name].title}'s at equal alignment"] = _above(lead)
    return goals


def _above(lead: float) -> Goal:
    return lead, 0.0, lead > 0
