"""The engine's promises, on the tiny model: any company, the same picture; every request ends, and ends alone."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from threading import Event

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instantbooth import Concept, Personalizer
from instantbooth.engine import Engine, EngineConfig, Progress
from instantbooth.engine.concepts import KeysValuesCache, size_of
from instantbooth.engine.knee import RowBudgets, measure_budgets
from instantbooth.errors import DeadlineError, EngineError, OverloadedError, ParameterError, PictureError
from instantbooth.model.personalizer import Request
from instantbooth.parameters import SAMPLERS
from jobs.benchmarks.delays import delays
from tests.tiny import portrait

SMALL = EngineConfig(row_budget=6)
LONG = 400
"""Steps of a request that is still running when a test looks at it."""


@pytest.fixture(scope="module")
def concepts(booth: Personalizer) -> list[Concept]:
    """Identities with 1, 2 and 3 reference images."""
    concepts = []
    for count in (1, 2, 3):
        images, masks = zip(*(portrait(10 * count + n) for n in range(count)), strict=True)
        concepts.append(booth.encode(list(images), "person", list(masks)))
    return concepts


@pytest.fixture
def engine(booth: Personalizer) -> Iterator[Engine]:
    with Engine(booth, SMALL) as engine:
        yield engine
        engine.close(drain=False)


def request(booth: Personalizer, concept: Concept, **changes: object) -> Request:
    chosen: dict[str, object] = {"num_inference_steps": 4, "guidance_scale": 3.0, "seed": 1}
    return booth.requests("a photo of a {subject}", concept, **(chosen | changes))[0]


def wait_until(condition: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


@pytest.mark.parametrize("side", [32, 16])
def test_with_batches_of_one_shape_a_picture_is_the_same_to_the_last_bit(
    booth: Personalizer, concepts: list[Concept], side: int
) -> None:
    exact = EngineConfig(row_budget=8, buckets=(4,), texts_apart=True, decode_batch=1)
    shape = {"height": side, "width": side}
    requests = [request(booth, concepts[n % 3], seed=n, num_inference_steps=2 + n % 3, **shape) for n in range(30)]
    images, masks = zip(*(portrait(n) for n in range(6)), strict=True)
    unguided = request(booth, booth.encode(list(images), "person", list(masks)), guidance_scale=1.0, **shape)

    def pictures(order: list[int]) -> dict[int, bytes]:
        with Engine(booth, exact) as engine:
            tickets = {n: engine.submit(requests[n]) for n in order}
            company = [engine.submit(unguided) for _ in range(len(order) // 6)]
            made = {n: ticket.result().tobytes() for n, ticket in tickets.items()}
            for ticket in company:
                ticket.result()
            stats = engine.stats()
            assert stats.rows + stats.padded_rows <= 8 * stats.steps
            return made

    together = pictures(list(range(30)))
    assert pictures(list(reversed(range(30)))) == together
    for few in ([0], [5, 7], [29, 1, 16]):
        assert pictures(few) == {n: together[n] for n in few}


MIXTURE = st.lists(
    st.fixed_dictionaries(
        {
            "concept": st.integers(0, 2),
            "prompt": st.sampled_from(["a {subject} at the beach", "watercolor of a {subject}", "{subject}"]),
            "num_inference_steps": st.integers(1, 7),
            "guidance_scale": st.sampled_from([0.0, 1.0, 2.5, 7.5]),
            "negative_prompt": st.sampled_from([None, "a cat"]),
            "adapter_scale": st.floats(0, 1),
            "concept_scale": st.floats(0, 1),
            "sampler": st.sampled_from(SAMPLERS),
            "seed": st.integers(0, 99),
            "height": st.sampled_from([None, None, 16]),
            "deadline_s": st.sampled_from([None, 30.0, 60.0]),
        }
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=25)
@given(mixture=MIXTURE, budget=st.integers(1, 9), buckets=st.sampled_from([(), (1, 2, 4, 8)]))
def test_any_company_the_same_picture(
    booth: Personalizer, concepts: list[Concept], mixture: list[dict[str, object]], budget: int, buckets: tuple[int]
) -> None:
    pairs = []
    with Engine(booth, EngineConfig(row_budget=budget, buckets=buckets, decode_batch=2)) as engine:
        for row in mixture:
            row = dict(row)
            deadline_s, concept, prompt = row.pop("deadline_s"), concepts[row.pop("concept")], row.pop("prompt")
            wanted = booth.requests(prompt, concept, **row)[0]
            pairs.append((wanted, engine.submit(wanted, deadline_s=deadline_s)))
        for wanted, ticket in pairs:
            picture = ticket.result(60)
            alone = booth.sample([wanted])
            assert ticket.row is not None
            assert (ticket.row.latents - alone[0]).abs().max() <= 1e-4
            difference = np.asarray(picture, int) - np.asarray(booth.base.decode(alone)[0], int)
            assert abs(difference).max() <= 1


def test_a_request_joins_while_others_are_running(booth: Personalizer, concepts: list[Concept], engine: Engine) -> None:
    long = engine.submit(request(booth, concepts[0], num_inference_steps=LONG))
    wait_until(lambda: long.row is not None and long.row.step >= 2)
    assert engine.submit(request(booth, concepts[1], num_inference_steps=2)).result(20).size == (32, 32)
    assert not long.future.done()


def test_an_earlier_deadline_goes_first_and_the_other_keeps_its_steps(
    booth: Personalizer, concepts: list[Concept]
) -> None:
    with Engine(booth, EngineConfig(row_budget=2)) as engine:
        patient = engine.submit(request(booth, concepts[0], num_inference_steps=LONG))
        wait_until(lambda: patient.row is not None and patient.row.step >= 2)
        urgent = engine.submit(request(booth, concepts[1], num_inference_steps=200), deadline_s=30)
        wait_until(lambda: urgent.row is not None)
        assert patient.row is not None
        reached = patient.row.step
        urgent.result(20)
        assert reached <= patient.row.step < reached + 100
        assert not patient.future.done()
        patient.cancel()


def test_cancelling_frees_the_row_within_a_step(booth: Personalizer, concepts: list[Concept], engine: Engine) -> None:
    ticket = engine.submit(request(booth, concepts[0], num_inference_steps=LONG))
    wait_until(lambda: ticket.row is not None and ticket.row.step >= 2)
    assert engine.stats().running == {(32, 32): 2}
    assert ticket.cancel()
    assert ticket.row is not None
    reached = ticket.row.step
    with pytest.raises(CancelledError):
        ticket.result(1)
    wait_until(lambda: engine.stats().queued_work == 0)
    assert ticket.row.step <= reached + 1
    assert engine.stats().ended == {"cancelled": 1}


def test_a_deadline_ends_a_request(booth: Personalizer, concepts: list[Concept], engine: Engine) -> None:
    ticket = engine.submit(request(booth, concepts[0], num_inference_steps=LONG), deadline_s=0.1)
    with pytest.raises(DeadlineError):
        ticket.result(20)
    assert ticket.row is not None
    assert ticket.row.step < LONG


def test_a_full_engine_refuses_at_once(booth: Personalizer, concepts: list[Concept]) -> None:
    with Engine(booth, EngineConfig(row_budget=2, max_requests=2)) as engine:
        held = [engine.submit(request(booth, concepts[0], num_inference_steps=LONG)) for _ in range(2)]
        with pytest.raises(OverloadedError, match="holds 2 requests"):
            engine.submit(request(booth, concepts[0]))
        for ticket in held:
            ticket.cancel()


def test_who_is_at_fault_fails_alone(booth: Personalizer, concepts: list[Concept], engine: Engine) -> None:
    good = request(booth, concepts[0], num_inference_steps=6)
    narrow = replace(concepts[1], patch_features=concepts[1].patch_features[:, :5])
    infinite = replace(concepts[2], concept_embedding=torch.full_like(concepts[2].concept_embedding, torch.inf))
    tickets = [engine.submit(replace(good, concept=concept)) for concept in (concepts[0], narrow, infinite)]
    picture = tickets[0].result(20)
    assert np.asarray(picture).std() > 0
    with pytest.raises(RuntimeError, match="shape"):
        tickets[1].result(20)
    with pytest.raises(PictureError, match="not finite"):
        tickets[2].result(20)
    assert engine.stats().ended == {"finished": 1, "failed": 2}


def test_keys_and_values_pushed_out_of_the_cache_change_nothing(booth: Personalizer, concepts: list[Concept]) -> None:
    entry = size_of(booth.keys_values(concepts[0]))
    cache = KeysValuesCache(booth, capacity_bytes=2 * entry)
    for concept in (concepts[0], concepts[1], concepts[0]):
        cache.get(concept)
    assert cache.bytes <= 2 * entry
    assert (cache.hits, cache.misses) == (0, 3)
    cache.discard(concepts[1].digest)
    cache.discard(concepts[0].digest)
    cache.discard(concepts[0].digest)
    assert cache.bytes == 0
    with Engine(booth, EngineConfig(row_budget=2, concept_cache_bytes=1)) as engine:
        picture = engine.submit(request(booth, concepts[2], seed=8)).result(20)
    difference = np.asarray(picture, int) - np.asarray(_alone(booth, concepts[2], seed=8), int)
    assert abs(difference).max() <= 1


def _alone(booth: Personalizer, concept: Concept, seed: int) -> object:
    return booth.base.decode(booth.sample([request(booth, concept, seed=seed)]))[0]


def test_a_request_without_guidance_costs_one_row_a_step_and_a_concept_is_looked_up_once(
    booth: Personalizer, concepts: list[Concept], engine: Engine
) -> None:
    engine.submit(request(booth, concepts[0], guidance_scale=1.0, num_inference_steps=5)).result(20)
    assert engine.stats().rows == 5
    tickets = [engine.submit(request(booth, concepts[0], num_inference_steps=2 + n)) for n in range(3)]
    for ticket in tickets:
        ticket.result(20)
    stats = engine.stats()
    assert stats.rows == 5 + 2 * (2 + 3 + 4)
    assert (stats.concept_hits, stats.concept_misses) == (3, 1)


def test_small_pictures_do_not_bring_more_rows_than_memory_was_measured_for(
    booth: Personalizer, concepts: list[Concept]
) -> None:
    small = request(booth, concepts[0], num_inference_steps=3, height=8, width=8)
    with Engine(booth, EngineConfig(row_budget=2, max_row_budget=4)) as engine:
        for ticket in [engine.submit(small) for _ in range(12)]:
            ticket.result(20)
        stats = engine.stats()
        assert stats.rows <= stats.offered_rows == 4 * stats.steps


def test_joining_and_cancelling_wait_at_most_for_the_step_in_progress(
    booth: Personalizer, concepts: list[Concept]
) -> None:
    measured = delays(booth, request(booth, concepts[1], num_inference_steps=LONG), row_budget=6, trials=5)
    assert measured["join"]["most_steps"] <= 1
    assert measured["cancel"]["most_steps"] <= 1


def test_progress_and_previews_arrive_in_order(booth: Personalizer, concepts: list[Concept], engine: Engine) -> None:
    ticket = engine.submit(request(booth, concepts[0], num_inference_steps=60), previews=2)
    updates = list(ticket.updates())
    steps = [update.step for update in updates if update.preview is None]
    assert steps == list(range(1, 61))
    previews = {update.step: update.preview for update in updates if update.preview}
    assert list(previews) == [20, 40]
    assert all(preview.size == (32, 32) for preview in previews.values())
    assert previews[20].tobytes() != previews[40].tobytes()
    assert ticket.result(0).size == (32, 32)


def test_pictures_that_step_together_each_have_their_previews(
    booth: Personalizer, concepts: list[Concept], engine: Engine
) -> None:
    previews: list[list[int]] = [[], [], []]

    def listen(number: int, progress: Progress) -> None:
        if progress.preview is not None:
            previews[number].append(progress.step)

    for number in range(3):
        long = request(booth, concepts[number], num_inference_steps=LONG)
        engine.submit(long, previews=9, listener=partial(listen, number))
    wait_until(lambda: all(len(seen) >= 2 for seen in previews))
    assert [seen[:2] for seen in previews] == [[40, 80]] * 3


def test_a_picture_goes_before_previews_and_those_of_a_cancelled_one_are_not_made(
    booth: Personalizer, concepts: list[Concept]
) -> None:
    released, decoding, decoded, seen = Event(), Event(), [], []

    def wait(rows: int) -> None:
        decoded.append(rows)
        decoding.set()
        assert released.wait(20)

    def listen(progress: Progress) -> None:
        if progress.preview is not None:
            seen.append(progress.step)

    half = 100
    long = request(booth, concepts[0], num_inference_steps=2 * half, guidance_scale=1.0)
    with before(booth.base.vae.decoder, wait), Engine(booth, EngineConfig(row_budget=8)) as engine:
        first = engine.submit(long, previews=9)
        assert decoding.wait(20)
        first.cancel()
        unwanted, shown = engine.submit(long, previews=1), engine.submit(long, previews=1, listener=listen)
        wait_until(lambda: all(each.row and each.row.step > half for each in (unwanted, shown)))
        picture = engine.submit(request(booth, concepts[1], num_inference_steps=1))
        wait_until(lambda: engine.stats().undecoded == 1)
        unwanted.cancel()
        released.set()
        assert picture.result(20)
        wait_until(lambda: bool(seen))
        shown.cancel()
    assert (decoded, seen) == ([1, 1, 1], [half])


def test_a_listener_is_told_instead(booth: Personalizer, concepts: list[Concept], engine: Engine) -> None:
    heard: list[int] = []
    ticket = engine.submit(request(booth, concepts[0]), listener=lambda progress: heard.append(progress.step))
    ticket.result(20)
    assert heard == [1, 2, 3, 4]
    assert list(ticket.updates()) == []
    assert engine.alive
    engine.close()
    assert not engine.alive


def test_closing_finishes_what_was_taken_or_says_that_it_does_not(booth: Personalizer, concepts: list[Concept]) -> None:
    engine = Engine(booth, SMALL)
    tickets = [engine.submit(request(booth, concepts[0], seed=seed)) for seed in range(5)]
    engine.close()
    assert all(ticket.future.done() and ticket.result(0) for ticket in tickets)
    with pytest.raises(EngineError, match="closed"):
        engine.submit(request(booth, concepts[0]))

    engine = Engine(booth, SMALL)
    ticket = engine.submit(request(booth, concepts[0], num_inference_steps=LONG))
    engine.close(drain=False)
    with pytest.raises(EngineError, match="closed"):
        ticket.result(0)


def test_the_row_budget_is_measured_where_none_is_given(booth: Personalizer, concepts: list[Concept]) -> None:
    with Engine(booth, EngineConfig(max_row_budget=4)) as engine:
        assert engine.row_budget in (1, 2, 4)
        assert engine.submit(request(booth, concepts[0])).result(20)


def test_each_size_has_the_budget_that_was_measured_for_it(booth: Personalizer, concepts: list[Concept]) -> None:
    def at_most_two_of_16_pixels(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[-1] == 8 and len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("no memory for so many rows")

    handle = booth.base.unet.register_forward_pre_hook(at_most_two_of_16_pixels)
    try:
        with Engine(booth, EngineConfig(max_row_budget=4)) as engine:
            tickets = [engine.submit(request(booth, concepts[0], height=16, width=16, seed=seed)) for seed in range(3)]
            for ticket in tickets:
                ticket.result(20)
            stats = engine.stats()
            # In proportion to the pixels it would be four, and the first step with more than two would have failed.
            assert engine._budget_share == 1
            assert stats.steps == 3 * 4
            assert stats.rows == stats.offered_rows == 2 * stats.steps
    finally:
        handle.remove()


def test_budgets_lie_between_those_measured_and_beyond_them_go_by_the_pixels() -> None:
    measured = RowBudgets({16: 12, 32: 8, 64: 2}, most=16)
    assert [measured.of((side, side)) for side in (16, 32, 64)] == [12, 8, 2]
    assert measured.of((16, 64)) == 8
    assert [measured.of((32, width)) for width in (48, 64, 96)] == [5, 4, 2]
    assert [measured.of(size) for size in ((8, 16), (8, 8), (128, 64), (128, 128))] == [16, 16, 1, 1]
    given = RowBudgets({32: 6}, most=20)
    assert [given.of(size) for size in ((32, 32), (16, 32), (16, 16), (40, 32), (64, 64))] == [6, 12, 20, 4, 1]


def test_sizes_are_measured_from_the_smallest_to_the_double_as_far_as_patience_goes(booth: Personalizer) -> None:
    assert measure_budgets(booth, max_rows=1) == {32: 1, 16: 1, 8: 1, 4: 1, 64: 1}
    assert measure_budgets(booth, max_rows=1, patience_s=0) == {32: 1}


def test_negative_prompts_of_requests_without_guidance_are_not_embedded(
    booth: Personalizer, concepts: list[Concept], engine: Engine
) -> None:
    embedded: list[int] = []

    def count(module: torch.nn.Module, inputs: object, options: dict[str, torch.Tensor]) -> None:
        embedded.append(len(inputs[0] if inputs else options["input_ids"]))  # type: ignore[index]

    handle = booth.base.text_encoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        requests = [request(booth, concepts[0], guidance_scale=scale) for scale in (1.0, 3.0, 0.0)]
        rows = booth.rows(requests)
        assert embedded == [3, 1]
        assert [row.negative_embeds is None for row in rows] == [True, False, True]
        assert booth.rows(requests[:1])[0].negative_embeds is None
        assert embedded == [3, 1, 1]
    finally:
        handle.remove()


@contextmanager
def before(module: torch.nn.Module, act: Callable[[int], object]) -> Iterator[None]:
    """Lets something happen before each forward pass, which is told its number of rows."""

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        act(len(inputs[0]))

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_a_forgotten_concept_leaves_with_the_last_request_that_needs_it(
    booth: Personalizer, concepts: list[Concept], engine: Engine
) -> None:
    held = [engine.submit(request(booth, concepts[0], num_inference_steps=LONG)) for _ in range(2)]
    wait_until(lambda: all(ticket.row is not None for ticket in held))
    needed = size_of(booth.keys_values(concepts[0]))
    engine.forget(concepts[0].digest)
    for ticket in held:
        # Once the batch has changed, it has asked for its keys and values anew.
        wait_until(lambda: engine.concepts.bytes == needed)
        ticket.cancel()
        wait_until(lambda ticket=ticket: ticket not in engine._scheduler)
    wait_until(lambda: engine.concepts.bytes == 0)
    wait_until(lambda: engine._batch is None)
    engine.submit(request(booth, concepts[1])).result(20)
    engine.forget(concepts[1].digest)
    assert engine.concepts.bytes == 0


def test_an_idle_engine_holds_nobody(booth: Personalizer, concepts: list[Concept], engine: Engine) -> None:
    concept = copy(concepts[0])
    held = weakref.ref(concept)
    engine.submit(request(booth, concept)).result(20)
    del concept
    wait_until(lambda: gc.collect() >= 0 and held() is None)


def test_a_step_that_does_not_fit_into_memory_is_taken_in_parts(booth: Personalizer, concepts: list[Concept]) -> None:
    def at_most_two(rows: int) -> None:
        if rows > 2:
            raise torch.OutOfMemoryError("no memory for so many rows")

    with before(booth.base.unet, at_most_two), Engine(booth, EngineConfig(row_budget=8)) as engine:
        tickets = [engine.submit(request(booth, concepts[0], seed=seed)) for seed in range(4)]
        pictures = [np.asarray(ticket.result(20), int) for ticket in tickets]
        assert engine.row_budget < 8
        assert engine.stats().ended == {"finished": 4}
    for seed, picture in enumerate(pictures):
        assert abs(picture - np.asarray(_alone(booth, concepts[0], seed), int)).max() <= 1


def test_a_request_that_does_not_fit_into_memory_alone_costs_the_others_no_room(
    booth: Personalizer, concepts: list[Concept], engine: Engine
) -> None:
    def never(rows: int) -> None:
        raise torch.OutOfMemoryError("no memory")

    with before(booth.base.unet, never), pytest.raises(torch.OutOfMemoryError):
        engine.submit(request(booth, concepts[0])).result(20)
    assert engine.row_budget == SMALL.row_budget


def test_rows_that_did_not_fit_into_memory_once_are_tried_again_later(
    booth: Personalizer, concepts: list[Concept], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instantbooth.engine.engine.STEPS_TO_RECOVER", 5)
    full = Event()

    def once(rows: int) -> None:
        if rows > 2 and not full.is_set():
            full.set()
            raise torch.OutOfMemoryError("somebody else has the memory now")

    with before(booth.base.unet, once), Engine(booth, EngineConfig(row_budget=8)) as engine:
        tickets = [engine.submit(request(booth, concepts[0], num_inference_steps=LONG)) for _ in range(4)]
        wait_until(full.is_set)
        wait_until(lambda: engine.row_budget == 8)
        assert not any(ticket.future.done() for ticket in tickets)
        engine.close(drain=False)


def test_decoding_does_not_hold_denoising_up_and_holds_new_requests_back(
    booth: Personalizer, concepts: list[Concept]
) -> None:
    released, decoded = Event(), []

    def wait(rows: int) -> None:
        decoded.append(rows)
        assert released.wait(20)

    config = EngineConfig(row_budget=6, max_undecoded=2, decode_batch=1)
    with before(booth.base.vae.decoder, wait), Engine(booth, config) as engine:
        long = engine.submit(request(booth, concepts[0], num_inference_steps=LONG))
        first, unwanted = (engine.submit(request(booth, concepts[1], num_inference_steps=2)) for _ in range(2))
        wait_until(lambda: engine.stats().undecoded == 2)
        assert unwanted.cancel()
        second = engine.submit(request(booth, concepts[1], num_inference_steps=2))
        late = engine.submit(request(booth, concepts[1], num_inference_steps=2), deadline_s=0.01)
        assert long.row is not None
        reached = long.row.step
        wait_until(lambda: long.row.step >= reached + 10)
        assert second.row is None
        assert not first.future.done()
        long.cancel()
        with pytest.raises(DeadlineError):
            late.result(20)
        released.set()
        assert first.result(20)
        assert second.result(20)
        assert decoded == [1, 1]


@pytest.mark.parametrize("part", ["unet", "decoder"])
def test_a_lost_device_ends_the_engine_and_every_request(
    booth: Personalizer, concepts: list[Concept], part: str, caplog: pytest.LogCaptureFixture
) -> None:
    submitted = Event()

    def lose(rows: int) -> None:
        assert submitted.wait(20)
        raise torch.AcceleratorError("an illegal memory access at 0xsecret")

    module = booth.base.unet if part == "unet" else booth.base.vae.decoder
    with before(module, lose), Engine(booth, EngineConfig(row_budget=2, max_undecoded=1)) as engine:
        tickets = [engine.submit(request(booth, concepts[0], seed=seed)) for seed in range(4)]
        submitted.set()
        for ticket in tickets:
            with pytest.raises(EngineError, match=r"^the engine broke down; start another$"):
                ticket.result(20)
        wait_until(lambda: not engine.alive)
        with pytest.raises(EngineError, match="closed"):
            engine.submit(request(booth, concepts[0]))
    assert "0xsecret" in caplog.text


@pytest.mark.parametrize("fault", [{"row_budget": 0}, {"max_requests": 0}, {"buckets": (4, 2)}, {"buckets": (0, 2)}])
def test_settings_out_of_range_are_refused(fault: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=next(iter(fault))):
        EngineConfig(**fault)
