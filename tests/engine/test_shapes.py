"""Few shapes, whoever joins and leaves, and none that was not compiled before the first request."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instantbooth import Concept, Personalizer
from instantbooth.engine import Engine, EngineConfig
from instantbooth.engine.shapes import Shapes, default_buckets
from instantbooth.errors import EngineError
from instantbooth.model.personalizer import Request
from instantbooth.parameters import MAX_REFERENCES, SAMPLERS
from tests.tiny import portrait


@given(st.integers(1, 70), st.sampled_from([None, (1, 2), (3,)]), st.data())
def test_every_batch_within_the_budget_has_one_of_few_shapes(
    budget: int, buckets: tuple[int, ...] | None, data: st.DataObject
) -> None:
    shapes = Shapes(buckets=buckets or default_buckets(budget), tokens_per_image=5)
    few = shapes.within(budget)
    assert len(few) == len(set(few)) <= 2 * budget.bit_length() + 3
    requests = data.draw(st.integers(1, budget))
    guided = data.draw(st.integers(0, requests))
    rows = [SimpleNamespace(guided=number < guided, keys_values=None) for number in range(requests)]
    padded = shapes.padded_rows(requests, requests + guided)
    if padded <= budget or requests == 1:
        shape = shapes.of(rows)  # type: ignore[arg-type]
        assert shape in few
        assert shape.conditional + shape.unconditional == padded >= requests + guided


def test_a_concept_of_more_pictures_than_any_shape_keeps_all_its_tokens() -> None:
    shapes = Shapes(buckets=(2,), tokens_per_image=5)
    keys = torch.zeros(1, 1, (MAX_REFERENCES + 1) * 5, 8)
    row = SimpleNamespace(guided=False, keys_values={"layer": (keys, keys)})
    shape = shapes.of([row])  # type: ignore[list-item]
    assert shape is not None
    assert shape.reference_tokens == (MAX_REFERENCES + 1) * 5


def test_without_padding_the_budget_is_filled_and_with_it_no_batch_is_larger() -> None:
    assert default_buckets(12) == (1, 2, 4, 6, 8, 12)
    for budget in (1, 2, 5, 8, 12):
        shapes = Shapes(buckets=default_buckets(budget), tokens_per_image=1)
        assert shapes.padded_rows(budget, budget) == budget
        assert shapes.padded_rows(max(1, budget // 2), 2 * max(1, budget // 2)) <= max(2, budget)


class Compiler:
    """torch.compile's backend that leaves the graph as it is, and counts graphs and their calls."""

    def __init__(self) -> None:
        self.graphs = 0
        self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        self.graphs += 1

        def run(*args: object) -> object:
            self.calls += 1
            return graph(*args)

        return run


def test_a_compiled_engine_makes_the_same_pictures_in_the_shapes_of_its_start(booth: Personalizer) -> None:
    compiler = Compiler()
    torch._dynamo.register_backend(compiler, name="counting")
    config = EngineConfig(row_budget=4, buckets=(2,), compile=True, compile_backend="counting")
    requests = _mixture(booth)
    with Engine(booth, config) as engine:
        assert (compiler.graphs, compiler.calls) == (2, 2)
        tickets = [engine.submit(request) for request in requests]
        for request, ticket in zip(requests, tickets, strict=True):
            ticket.result(60)
            assert ticket.row is not None
            assert (ticket.row.latents - booth.sample([request])[0]).abs().max() <= 1e-4
        stats = engine.stats()
        assert compiler.graphs == 2
        assert compiler.calls == 2 + stats.steps
        assert stats.padded_rows > 0
        assert stats.rows + stats.padded_rows <= stats.offered_rows
        other_size = _mixture(booth, height=16)[0]
        assert engine.submit(other_size).result(20).size == (32, 16)
        assert compiler.calls == 2 + stats.steps


def _mixture(booth: Personalizer, **size: int) -> list[Request]:
    """Of 1, 2 and 3 reference images, with guidance and without, that end at different steps."""
    concepts: list[Concept] = []
    for images in (1, 2, 3):
        pictures, masks = zip(*(portrait(10 * images + n) for n in range(images)), strict=True)
        concepts.append(booth.encode(list(pictures), "person", list(masks)))
    settings = zip(itertools.cycle(concepts), itertools.cycle((3.0, 1.0, 5.0, 3.0)), range(12), strict=False)
    return [
        booth.requests(
            "a photo of a {subject}",
            concept,
            guidance_scale=guidance,
            num_inference_steps=1 + seed % 5,
            seed=seed,
            sampler=SAMPLERS[seed % len(SAMPLERS)],
            negative_prompt="a cat" if seed % 2 else None,
            adapter_scale=0.9 - 0.1 * seed / 2,
            concept_scale=None,
            **size,
        )[0]
        for concept, guidance, seed in settings
    ]


def test_a_compiler_that_is_not_there_is_named(booth: Personalizer) -> None:
    config = EngineConfig(row_budget=1, compile=True, compile_backend="nobody's")
    with pytest.raises(EngineError, match="cannot be compiled by nobody's"):
        Engine(booth, config)
