"""Turns: the budget is kept, the earliest due goes first, nobody starves, sizes share the time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from instantbooth.engine.scheduler import Scheduler

SIZES = ((64, 64), (64, 96), (96, 96))


@dataclass(eq=False)
class Waiting:
    size: tuple[int, int]
    unet_rows: int
    order: tuple[float, int]
    steps: int = 3


@st.composite
def lines(draw: st.DrawFn) -> list[Waiting]:
    rows = draw(st.lists(st.tuples(st.sampled_from(SIZES), st.integers(1, 2), st.integers(0, 5)), max_size=20))
    return [Waiting(size, cost, (due, number)) for number, (size, cost, due) in enumerate(rows)]


@given(lines(), st.integers(1, 6))
def test_everyone_is_served_within_the_budget_and_the_earliest_due_first(items: list[Waiting], budget: int) -> None:
    scheduler: Scheduler[Waiting] = Scheduler(lambda size, requests, rows: rows <= budget)
    for item in items:
        scheduler.add(item)
    turns = 0
    while len(scheduler):
        chosen = scheduler.choose()
        assert len({item.size for item in chosen}) == 1
        assert sum(item.unet_rows for item in chosen) <= budget or len(chosen) == 1
        line = [item for item in scheduler if item.size == chosen[0].size]
        assert chosen[0] is min(line, key=lambda item: item.order)
        scheduler.charge(chosen[0].size, 1.0)
        for item in chosen:
            item.steps -= 1
            if not item.steps:
                scheduler.remove(item)
        turns += 1
        assert turns <= 3 * len(items)
    assert all(item.steps == 0 for item in items)


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_sizes_share_the_time_however_long_their_steps_take(seconds: list[float]) -> None:
    scheduler: Scheduler[Waiting] = Scheduler(lambda size, requests, rows: rows <= 4)
    for number, size in enumerate(SIZES):
        scheduler.add(Waiting(size, 2, (0.0, number)))
    used: Counter[tuple[int, int]] = Counter()
    for _ in range(300):
        size = scheduler.choose()[0].size
        took = seconds[SIZES.index(size)]
        used[size] += took
        scheduler.charge(size, took)
    assert max(used.values()) - min(used.values()) <= 2 * max(seconds)


def test_a_size_that_was_absent_does_not_catch_up_at_the_others_cost() -> None:
    scheduler: Scheduler[Waiting] = Scheduler(lambda size, requests, rows: rows <= 4)
    scheduler.add(Waiting(SIZES[0], 1, (0.0, 0)))
    for _ in range(100):
        scheduler.charge(scheduler.choose()[0].size, 1.0)
    scheduler.add(Waiting(SIZES[1], 1, (0.0, 1)))
    turns = []
    for _ in range(10):
        turns.append(scheduler.choose()[0].size)
        scheduler.charge(turns[-1], 1.0)
    assert Counter(turns) == {SIZES[0]: 5, SIZES[1]: 5}


def test_what_a_size_used_before_an_idle_moment_is_forgotten() -> None:
    scheduler: Scheduler[Waiting] = Scheduler(lambda size, requests, rows: rows <= 4)
    first, second = (Waiting(size, 1, (0.0, number)) for number, size in enumerate(SIZES[:2]))
    scheduler.add(first)
    scheduler.charge(first.size, 100.0)
    scheduler.remove(first)
    scheduler.add(second)
    scheduler.add(first)
    turns = []
    for _ in range(10):
        turns.append(scheduler.choose()[0].size)
        scheduler.charge(turns[-1], 1.0)
    assert Counter(turns) == {SIZES[0]: 5, SIZES[1]: 5}


def test_who_may_not_step_is_passed_over() -> None:
    scheduler: Scheduler[Waiting] = Scheduler(lambda size, requests, rows: rows <= 4)
    first, second = Waiting(SIZES[0], 1, (0.0, 0)), Waiting(SIZES[1], 1, (1.0, 1))
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.choose(lambda item: item is second) == [second]
    assert scheduler.choose(lambda item: False) == []
