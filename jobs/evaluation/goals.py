"""What InstantBooth is to reach beside the other methods, and whether it does."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from instantbooth.evaluation.methods.registry import MASKED, METHODS
from jobs.goals import Goal, at_least

REFERENCE = "instantbooth"
"""Times are also given as multiples of this method's."""
OWN = (REFERENCE, MASKED)
"""Both of the paper's rows, inputs as they are and masked as in training: every row is compared with each of them,
subject by subject, and goals are asked of each."""
FASTER = {"textual-inversion": 250.0, "dreambooth": 100.0}
"""Methods that are to be beaten on alignment and face distance, and by how many times in speed."""
PEERS = ("ip-adapter", "ip-adapter-plus")
"""Methods that are to be beaten in identification at equal alignment."""
EQUAL_ALIGNMENT = 0.01
"""An alignment so much lower than another still counts as equal."""
SURE = "95 % sure"


def goals_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Goal]:
    """The goals that a table's rows decide; none without InstantBooth among them.

    A lead counts where the 95 % interval of the difference, subject by subject, holds nothing else; its lower end is
    what the goal shows. Times of another machine than InstantBooth's reach no goal.
    """
    goals: dict[str, Goal] = {}
    for own in OWN:
        rivals = {name: rows[name]["leads"][own] for name in (*FASTER, *PEERS) if own in rows and name in rows}
        for name, lead in rivals.items():
            mine, title = METHODS[own].title, METHODS[name].title
            if name in FASTER:
                goals[f"{mine}: alignment above {title}'s, {SURE}"] = _above(lead["alignment"]["low"])
                goals[f"{mine}: face distance below {title}'s, {SURE}"] = _above(-lead["face_distance"]["high"])
                goals[f"{mine}: times as fast as {title}"] = at_least(lead.get("times_as_fast", 0.0), FASTER[name])
            else:
                goals[f"{mine}: identification above {title}'s, {SURE}"] = _above(lead["identification"]["low"])
                goals[f"{mine}: alignment not below {title}'s"] = at_least(lead["alignment"]["mean"], -EQUAL_ALIGNMENT)
    return goals


def goals_at_equal_alignment(
    own: Mapping[str, Any], curves: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Goal]:
    """Whether a method's row is above its peers' best identification at its own alignment or a higher one."""
    goals = {}
    for name, rows in curves.items():
        curve = [(row["alignment"]["mean"], row["identification"]["mean"]) for row in rows]
        lead = own["identification"]["mean"] - _best_at(own["alignment"]["mean"], curve)
        goals[f"{own['title']}: identification above {METHODS[name].title}'s at equal alignment"] = _above(lead)
    return goals


def _best_at(alignment: float, curve: Sequence[tuple[float, float]]) -> float:
    """The best identification of a curve at this alignment or above; at the highest that it has, where that is less.

    `curve` is in the order of its scales, and straight between two of them.
    """
    reached = [identification for x, identification in curve if x >= alignment]
    for (x, y), (other_x, other_y) in itertools.pairwise(curve):
        if min(x, other_x) < alignment < max(x, other_x):
            reached.append(y + (other_y - y) * (alignment - x) / (other_x - x))
    return max(reached) if reached else max(curve)[1]


def _above(lead: float) -> Goal:
    return lead, 0.0, lead > 0
