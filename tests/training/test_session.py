"""A training from step to step: resumed or computed in parts it is the same, and what would harm is skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from instantbooth.errors import TrainingError
from instantbooth.model.flops import flops_of, peak_flops
from instantbooth.model.loading import autocast
from instantbooth.model.weights import load_weights
from instantbooth.training.adapters import AdapterTrainingConfig, Draws, ExamplePreparer, unpacked
from instantbooth.training.flops import seconds_at_peak
from instantbooth.training.guard import ENOUGH, Guard
from instantbooth.training.session import ComputeConfig, TrainingSession
from tests.tiny import portrait, tiny_booth

CONFIG = AdapterTrainingConfig(adapter_learning_rate=1e-2, encoder_learning_rate=1e-2, warmup_steps=2, batch_size=4)
FP32 = ComputeConfig(precision="fp32")


@pytest.fixture(scope="module")
def batches(tiny: Path) -> list[dict[str, Tensor]]:
    preparer = ExamplePreparer.for_model(str(tiny / "base"), str(tiny / "clip"))

    def batch(step: int) -> dict[str, Tensor]:
        rows = []
        for position in range(4 * step, 4 * step + 4):
            image, mask = portrait(position)
            rng = np.random.default_rng(position)
            example = preparer(image=image, mask=mask, caption="a photo of a {subject}", noun="cat", rng=rng)
            rows.append(example | {"position": np.int64(position)})
        return unpacked({name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]})

    return [batch(step) for step in range(6)]


def session(tiny: Path, compute: ComputeConfig = FP32, **changes: float) -> TrainingSession:
    return TrainingSession(
        booth=tiny_booth(tiny), config=replace(CONFIG, **changes), compute=compute, fingerprint="seed 0"
    )


def parameters(session: TrainingSession) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in session.parameters])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_session_taken_up_again_equals_one_without_a_break(
    tiny: Path, batches: list[dict[str, Tensor]], precision: str
) -> None:
    compute = ComputeConfig(precision=precision)
    whole = session(tiny, compute)
    for batch in batches:
        whole.advance(batch)

    first = session(tiny, compute)
    for batch in batches[:3]:
        first.advance(batch)
    take = first.snapshot()
    first.advance(batches[3])
    second = session(tiny, compute)
    second.restore(take())
    assert second.step == 3
    torch.randn(100)
    for batch in batches[3:]:
        second.advance(batch)
    assert torch.equal(parameters(whole), parameters(second))
    assert all(torch.equal(one, other) for one, other in zip(whole.ema.shadow, second.ema.shadow, strict=True))


def test_the_weights_of_a_checkpoint_are_the_averaged_ones(
    tiny: Path, batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    trained = session(tiny)
    for batch in batches[:2]:
        trained.advance(batch)
    for name, data in trained.snapshot()().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    loaded = tiny_booth(tiny)
    load_weights(tmp_path / "weights", loaded.trained)
    before = parameters(trained)
    with trained.averaged() as booth:
        assert booth.weights_digest == loaded.weights_digest
    assert torch.equal(parameters(trained), before)


def test_another_order_of_samples_is_refused(tiny: Path) -> None:
    files = session(tiny).snapshot()()
    other = TrainingSession(booth=tiny_booth(tiny), config=CONFIG, compute=FP32, fingerprint="seed 1")
    with pytest.raises(TrainingError, match="seed 0, not seed 1"):
        other.restore(files)


def test_what_may_change_on_the_way_changes(tiny: Path, batches: list[dict[str, Tensor]]) -> None:
    before = session(tiny, ComputeConfig(precision="bf16"), weight_decay=0.5)
    before.advance(batches[0])
    after = session(tiny, ComputeConfig(precision="fp16"), weight_decay=0.25)
    after.restore(before.snapshot()())
    assert torch.equal(parameters(before), parameters(after))
    assert [group["weight_decay"] for group in after.optimizer.param_groups] == [0.25, 0.25]
    assert after.scaler.get_scale() > 1, "loss is scaled, as from a beginning in fp16"
    assert after.advance(batches[1]).skipped is None
    back = session(tiny, ComputeConfig(precision="bf16"))
    back.restore(after.snapshot()())
    assert back.step == 2


@pytest.mark.parametrize(
    ("capability", "precision", "computed"),
    [
        ("avx512_bf16", "bf16", torch.bfloat16),
        ("bf16", "bf16", torch.bfloat16),
        ("avx2", "bf16", torch.float32),
        ("avx512_bf16", "fp32", torch.float32),
        ("avx2", "fp16", torch.float16),
    ],
)
def test_a_cpu_that_would_emulate_bf16_computes_in_fp32(
    monkeypatch: pytest.MonkeyPatch, capability: str, precision: str, computed: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", capability: True})
    ones = torch.ones(2, 2)
    with autocast(torch.device("cpu"), precision):
        assert (ones @ ones).dtype == computed


def counted(session: TrainingSession) -> list[None]:
    """Grows with each time that a block of the U-Net behind adapters is computed."""
    times: list[None] = []
    session.booth.base.unet.up_blocks[-1].resnets[0].register_forward_pre_hook(lambda *_: times.append(None))
    return times


def test_accumulated_parts_are_one_batch_and_checkpointing_computes_the_same_twice(
    tiny: Path, batches: list[dict[str, Tensor]]
) -> None:
    sessions = [
        session(tiny, replace(FP32, **options))
        for options in ({}, {"accumulation": 2}, {"gradient_checkpointing": True})
    ]
    times = [counted(each) for each in sessions]
    outcomes = [each.advance(batches[0]) for each in sessions]
    assert [len(each) for each in times] == [1, 2, 2], "once, once a part, and again in the backward pass"
    for outcome in outcomes[1:]:
        assert outcome.loss == pytest.approx(outcomes[0].loss, rel=1e-5)
        assert outcome.gradient_norm == pytest.approx(outcomes[0].gradient_norm, rel=1e-4)


def test_a_sample_draws_the_same_numbers_in_any_company(tiny: Path) -> None:
    objective = session(tiny, text_dropout=0.5, image_dropout=0.5).objective
    together = objective.draw_at(torch.arange(20, 24))
    alone = objective.draw_at(torch.tensor([22]))
    assert torch.equal(together.noise[2:3], alone.noise)
    assert torch.equal(together.timesteps[2:3], alone.timesteps)
    assert not torch.equal(together.noise[0], together.noise[1])


def test_the_largest_seed_is_as_good_as_any(tiny: Path, batches: list[dict[str, Tensor]]) -> None:
    trained = session(tiny, seed=2**63 - 1)
    for batch in batches[:2]:
        assert trained.advance(batch).skipped is None


def test_guidance_dropout_leaves_out_text_image_and_both(tiny: Path) -> None:
    def shares(**rates: float) -> tuple[float, float, float]:
        chosen = {"text_dropout": 0.0, "image_dropout": 0.0, "both_dropout": 0.0} | rates
        draws = session(tiny, **chosen).objective.draw_at(torch.arange(2000))
        both = draws.drop_text & draws.drop_image
        return tuple(float(part.float().mean()) for part in (draws.drop_text, draws.drop_image, both))

    assert shares() == (0, 0, 0)
    assert shares(text_dropout=0.3) == (pytest.approx(0.3, abs=0.05), 0, 0)
    assert shares(image_dropout=0.3) == (0, pytest.approx(0.3, abs=0.05), 0)
    text, image, both = shares(both_dropout=0.3)
    assert text == image == both == pytest.approx(0.3, abs=0.05)


def test_latents_and_embeddings_computed_before_give_the_same_loss(
    tiny: Path, batches: list[dict[str, Tensor]]
) -> None:
    trained = session(tiny)
    base, batch = trained.booth.base, batches[0]
    nothing = torch.zeros(4, dtype=torch.bool)
    fixed = trained.objective.fixed_draws(4, 500)
    known = {name: values for name, values in batch.items() if name != "pixel_values"} | {
        "latents": base.encode_pixels(batch["pixel_values"]),
        "prompt_embeds": base.encode_text(batch["input_ids"]),
    }
    for drop_text in (nothing, torch.tensor([True, False, True, False])):
        draws = Draws(noise=fixed.noise, timesteps=fixed.timesteps, drop_text=drop_text, drop_image=nothing)
        losses = [trained.objective(each, draws).item() for each in (batch, known)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.fixture
def poisoned(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return batches[2] | {"pixel_values": torch.full_like(batches[2]["pixel_values"], torch.nan)}


def test_a_batch_that_is_no_number_changes_nothing_and_counts(
    tiny: Path, batches: list[dict[str, Tensor]], poisoned: dict[str, Tensor]
) -> None:
    trained = session(tiny, replace(FP32, max_skipped=1))
    trained.advance(batches[0])
    before, average = parameters(trained), [each.clone() for each in trained.ema.shadow]
    outcome = trained.advance(poisoned)
    assert outcome.skipped == "the loss is nan"
    assert torch.equal(before, parameters(trained))
    assert all(torch.equal(one, other) for one, other in zip(average, trained.ema.shadow, strict=True))
    assert (trained.step, trained.guard.exhausted) == (2, False)
    assert trained.advance(batches[1]).skipped is None
    trained.advance(poisoned)
    assert trained.guard.exhausted


def test_fp16_looks_for_its_scale_and_stops_where_there_is_none(tiny: Path, batches: list[dict[str, Tensor]]) -> None:
    trained = session(tiny, ComputeConfig(precision="fp16", max_skipped=1))
    trained.parameters[0].register_hook(lambda gradient: gradient * torch.inf)
    reasons = []
    while not trained.guard.exhausted:
        assert len(reasons) < 40, "it would go on to the end"
        reasons.append(trained.advance(batches[0]).skipped)
    assert reasons[0] == "fp16 overflowed"
    assert all(reason in ("the gradient's norm is nan", "the gradient's norm is inf") for reason in reasons[-2:])
    assert reasons.count("fp16 overflowed") == len(reasons) - 2


def test_a_long_gradient_is_scaled_down_before_it_counts(tiny: Path, batches: list[dict[str, Tensor]]) -> None:
    clipped, free = session(tiny, clip_norm=1e-3), session(tiny, clip_norm=1e9)
    norms = [each.advance(batches[0]).gradient_norm for each in (clipped, free)]
    assert norms[0] == norms[1] > 1e-3
    taken = [torch.cat([p.grad.flatten() for p in each.parameters]) for each in (clipped, free)]
    assert float(taken[0].norm()) == pytest.approx(1e-3, rel=1e-3)
    assert torch.allclose(taken[0] / taken[0].norm(), taken[1] / taken[1].norm(), atol=1e-5)


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_step_is_the_same_step(tiny: Path, batches: list[dict[str, Tensor]]) -> None:
    plain, compiled = session(tiny), session(tiny, replace(FP32, compile=True))
    for each in (plain, compiled):
        each.gradient(batches[0])
    for expected, found in zip(plain.parameters, compiled.parameters, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-7)


def test_the_flops_of_a_step_grow_with_its_rows_and_leave_no_trace(
    tiny: Path, batches: list[dict[str, Tensor]]
) -> None:
    trained = session(tiny)
    before = parameters(trained)
    half = {name: values[:2] for name, values in batches[0].items()}
    whole, part = (flops_of(partial(trained.gradient, batch)) for batch in (batches[0], half))
    assert whole == 2 * part > 0
    assert torch.equal(parameters(trained), before)
    assert seconds_at_peak(trained, batches[0]) is None, "a CPU's peak is nobody's to say"


def test_a_gpus_peak_is_found_by_its_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "fp16") == 756e12
    assert peak_flops("NVIDIA L40S", "bf16") == 362e12
    assert peak_flops("NVIDIA L4", "bf16") == 121e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops("a card of next year", "bf16") is None


def test_a_spike_is_told_from_the_usual() -> None:
    guard = Guard(spike_factor=10)
    assert guard.judge(1.0, 500.0) is None
    for _ in range(ENOUGH):
        assert guard.judge(1.0, 1.0) is None
    assert "times the usual" in str(guard.judge(1.0, 11.0))
    assert guard.judge(1.0, 9.0) is None
    assert guard.judge(float("inf"), 1.0) == "the loss is inf"
    assert guard.skipped == 2


def test_validation_measures_the_averaged_weights_at_fixed_noise(tiny: Path, batches: list[dict[str, Tensor]]) -> None:
    trained = session(tiny)
    first, again = (trained.validation_loss(batches[0]) for _ in range(2))
    assert first == again
    assert list(first) == ["validation/loss", *(f"validation/loss_t{t}" for t in (125, 375, 625, 875))]
    many = {name: torch.cat([batch[name] for batch in batches[:2]]) for name in batches[0]}
    in_parts = session(tiny, batch_size=1).validation_loss(many)
    assert in_parts == pytest.approx(session(tiny, batch_size=8).validation_loss(many), rel=1e-5)
    trained.advance(batches[1])
    assert trained.validation_loss(batches[0]) != first
    assert all(p.requires_grad for p in trained.parameters)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
