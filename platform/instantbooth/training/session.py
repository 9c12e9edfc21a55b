"""One training, from step to step: what it computes, what it keeps, and what it goes on from. Plain torch."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from instantbooth.errors import ParameterError, TrainingError
from instantbooth.model.loading import Precision, autocast
from instantbooth.model.personalizer import Personalizer
from instantbooth.model.weights import weights_files
from instantbooth.training.adapters import AdapterObjective, AdapterTrainingConfig, optimizer_for, seed_of
from instantbooth.training.ema import EMA
from instantbooth.training.guard import Guard

NO_GRADIENT_ROWS = 4
"""Rows without gradients that take no more memory than one with them: no activation outlives its layer."""
COMPILE_OPTIONS = {"reorder_for_peak_memory": False}
"""With the reordering, torch 2.13's compiled backward pass loses the gradients of the middle block, silently."""
STATE = "state.pt"
ORDER = "order.txt"
WEIGHTS = "weights"


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a step is computed; the method is the same."""

    precision: Precision = "bf16"
    """Autocast: bf16 is twice as fast as fp32 on GPUs and on CPUs with AVX512-BF16, and is fp32 on CPUs without such
    arithmetic; fp16 scales its loss."""
    accumulation: int = 1
    """Parts into which each worker cuts its share of a batch, to hold fewer rows in memory at once."""
    gradient_checkpointing: bool = False
    """Computes the U-Net's activations again in the backward pass, to hold fewer."""
    compile: bool = False
    """torch.compile on the U-Net: a minute or more at the start, then faster steps on a GPU."""
    spike_factor: float = 20.0
    """A batch is skipped whose gradient is longer than this multiple of the recent median."""
    max_skipped: int = 20
    """Training stops after skipping more batches than this: spikes, and losses or gradients that are no numbers."""

    def __post_init__(self) -> None:
        if self.accumulation < 1:
            raise ParameterError(f"accumulation must be at least 1, is {self.accumulation}; 1 is the default")
        Guard(spike_factor=self.spike_factor, max_skipped=self.max_skipped)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a step, the same on every worker."""

    loss: float
    """Mean over the batch."""
    gradient_norm: float
    """Before clipping."""
    skipped: str | None
    """Why the batch changed nothing, if it did not."""
    stop: bool
    """Whether a worker was asked to stop."""


@dataclass(kw_only=True)
class TrainingSession:
    """The objective with all that a training carries from one step to the next.

    Every random number follows from seed, step and sample; so the step's number is all the random state there is.
    """

    booth: Personalizer
    config: AdapterTrainingConfig
    compute: ComputeConfig
    fingerprint: str = ""
    """Names what a run keeps to its end, as "name value, name value"; a checkpoint of another one is refused."""
    step: int = field(default=0, init=False)
    """Steps done, skipped ones among them."""

    def __post_init__(self) -> None:
        unet = self.booth.base.unet
        if self.compute.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if self.compute.compile:
            unet.compile(options=COMPILE_OPTIONS)
        self.objective = AdapterObjective(self.booth, self.config)
        self.parameters = list(self.booth.trained.parameters())
        self.optimizer = optimizer_for(self.objective, self.config)
        self.ema = EMA(self.parameters, self.config.ema_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.compute.precision == "fp16")
        self.guard = Guard(spike_factor=self.compute.spike_factor, max_skipped=self.compute.max_skipped)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.booth.base.device

    def advance(self, batch: Mapping[str, Tensor], *, stop: bool = False) -> Outcome:
        """One optimizer step on this worker's share of a batch; `batch` has `position` [b] beside the examples.

        `stop` is this worker's wish to stop, which `Outcome.stop` tells everyone.
        """
        torch.manual_seed(seed_of(self.config.seed, self.step))
        self._set_learning_rates()
        own = self.gradient(batch)
        loss, wishes = self._average(own, stop)
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm))
        # fp16 finds its scale by overflowing now and then; the batch is lost, but nothing is wrong with it. At a scale
        # of 1 nothing is left to find.
        scaled = self.compute.precision == "fp16" and self.scaler.get_scale() > 1
        overflow = scaled and math.isfinite(loss) and not math.isfinite(norm)
        skipped = "fp16 overflowed" if overflow else self.guard.judge(loss, norm)
        if skipped is None:
            self.scaler.step(self.optimizer)
            self.ema.update(self.step)
        self.scaler.update()
        self.step += 1
        return Outcome(loss=loss, gradient_norm=norm, skipped=skipped, stop=wishes > 0)

    @contextmanager
    def averaged(self) -> Iterator[Personalizer]:
        """The model with the averaged weights, not learning: as training would hand it over now."""
        self.ema.swap()
        self.booth.trained.requires_grad_(False).eval()
        try:
            yield self.booth
        finally:
            self.booth.trained.requires_grad_(True).train()
            self.ema.swap()

    @torch.no_grad()
    def validation_loss(self, batch: Mapping[str, Tensor], *, buckets: int = 4) -> dict[str, float]:
        """Loss at fixed noise and at one fixed timestep in each of equal buckets, of the averaged weights.

        Rows go through the model in parts that fit where training does. Keys: validation/loss, and
        validation/loss_t125 … for each bucket's timestep.
        """
        steps = self.booth.base.schedule.num_train_timesteps
        losses = {}
        with self.averaged(), autocast(self.device, self.compute.precision):
            for bucket in range(buckets):
                timestep = (2 * bucket + 1) * steps // (2 * buckets)
                losses[f"validation/loss_t{timestep:03d}"] = self._loss_at(timestep, batch)
        return {"validation/loss": sum(losses.values()) / len(losses), **losses}

    def _loss_at(self, timestep: int, batch: Mapping[str, Tensor]) -> float:
        rows = len(batch["placeholder_position"])
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        at_once = max(1, NO_GRADIENT_ROWS * self.config.batch_size // (world * self.compute.accumulation))
        draws = self.objective.fixed_draws(rows, timestep)
        total = 0.0
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)
            examples = {name: values[part] for name, values in batch.items()}
            total += len(examples["placeholder_position"]) * float(self.objective(examples, draws[part]))
        return total / rows

    def snapshot(self) -> Callable[[], dict[str, bytes]]:
        """Copies the state now; what it returns makes files of the copy, at leisure and in any thread."""
        state = _copied(
            {
                "step": self.step,
                "trained": self.booth.trained.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict(),
                "scaler": self.scaler.state_dict(),
                "guard": asdict(self.guard),
            }
        )
        with self.averaged():
            weights = _copied(self.booth.trained.state_dict())
        config = self.booth.config

        def files() -> dict[str, bytes]:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            named = weights_files(config, weights).items()
            order = {ORDER: self.fingerprint.encode()}
            return order | {STATE: buffer.getvalue()} | {f"{WEIGHTS}/{name}": data for name, data in named}

        return files

    def restore(self, files: Mapping[str, bytes]) -> None:
        """Takes up a checkpoint, with this session's hyperparameters. TrainingError for one of another run."""
        check_run(files, self.fingerprint)
        state = torch.load(io.BytesIO(files[STATE]), map_location="cpu", weights_only=True)
        self.booth.trained.load_state_dict(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.config.weight_decay
        self.ema.load_state_dict(state["ema"])
        if state["scaler"]:
            # Only fp16 has one; coming from another precision it finds its own.
            self.scaler.load_state_dict(state["scaler"])
        self.guard.recent, self.guard.skipped = state["guard"]["recent"], state["guard"]["skipped"]
        self.step = state["step"]

    def _set_learning_rates(self) -> None:
        rise = min(1.0, (self.step + 1) / max(self.config.warmup_steps, 1))
        peaks = (self.config.adapter_learning_rate, self.config.encoder_learning_rate)
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rise

    def gradient(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Leaves the gradient of this worker's rows in the parameters; returns their mean loss."""
        self.optimizer.zero_grad()
        parts = self.compute.accumulation
        total = torch.zeros((), device=self.device)
        rows = {name: values.chunk(parts) for name, values in batch.items()}
        for part in range(parts):
            examples = {name: chunks[part] for name, chunks in rows.items()}
            with autocast(self.device, self.compute.precision):
                loss = self.objective(examples, self.objective.draw_at(examples["position"])) / parts
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _average(self, loss: Tensor, stop: bool) -> tuple[float, float]:
        """Averages gradients and loss over all workers; the loss, and how many of them wish to stop.

        Everything travels in one tensor, always laid out alike: a resumed run adds in the same order.
        DistributedDataParallel lays out its buckets anew after its first step.
        """
        if not torch.distributed.is_initialized():
            return float(loss), float(stop)
        wish = loss.new_tensor(float(stop))
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = torch.cat([torch.stack([loss, wish]), *(gradient.flatten().float() for gradient in gradients)])
        torch.distributed.all_reduce(flat)
        wishes = float(flat[1])
        flat /= torch.distributed.get_world_size()
        parts = flat[2:].split([gradient.numel() for gradient in gradients])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        return float(flat[0]), wishes


def check_run(files: Mapping[str, bytes], fingerprint: str) -> None:
    """TrainingError for a checkpoint of a run with another fingerprint."""
    found, asked = files[ORDER].decode().split(", "), fingerprint.split(", ")
    if found != asked:
        theirs = ", ".join(part for part in found if part not in asked)
        ours = ", ".join(part for part in asked if part not in found)
        raise TrainingError(
            f"the output holds a run with {theirs}, not {ours}; a run keeps its data, seed, batch size, base and image "
            "encoder: give it its own, or name a new output"
        )


def _copied(value: Any) -> Any:
    """The same with its tensors copied to main memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(each) for each in value)
    return value
