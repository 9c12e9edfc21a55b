"""A training on any number of Ray Train workers: what it is told, and what each worker does.

The run's folder, at file:// or s3://, holds all there is to go on from:

    checkpoints/<step>/    see instantbooth.training.checkpoints
    log/<first>-<last>.jsonl   what was trained on and what came of it, one line a step, beside each checkpoint
    pictures/<step>.png    validation subjects at fixed seeds
    weights/               the averaged weights at the end
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import math
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
import ray.train
import torch
import torch.distributed
from ray.train import PreemptionInfo
from torch import Tensor

from instantbooth import Personalizer
from instantbooth.errors import InstantBoothError, ParameterError, StorageError, TrainingError
from instantbooth.evaluation.miniature import judges_of
from instantbooth.images import Augmentation, encode_png
from instantbooth.ledger import digest_of
from instantbooth.machine import machine
from instantbooth.model.base import PARTS, locate
from instantbooth.model.weights import folder_digest
from instantbooth.presets import model_parts
from instantbooth.storage import ObjectStore, absolute_uri, open_store, patiently
from instantbooth.tracking import Delivery
from instantbooth.training.adapters import AdapterTrainingConfig, ExamplePreparer
from instantbooth.training.checkpoints import Checkpoints, Saver, log_bytes
from instantbooth.training.flops import seconds_at_peak
from instantbooth.training.session import ComputeConfig, Outcome, TrainingSession
from pipelines.feed import Shards, TrainingFeed, finished_manifest, first_examples, rows_per_task, sample_name
from pipelines.model import ModelConfig
from pipelines.pace import Pace
from pipelines.probe import judged, validation_pictures

LOG = "log/"
DATA = "data.json"
"""The data's manifest as the run found it."""
PICTURES = "pictures"
REPORT_EVERY_S = 0.5
ASK_EVERY = 5
"""Steps after which it is asked whether a machine is about to be taken away: the workers wait for each other then."""
LEAST = {"workers": 1, "gpus_per_worker": 0, "checkpoint_every": 1, "keep_last": 1, "keep_best": 0}
"""Of fields of TrainConfig."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """How often, and on how much, a training is asked whether it is learning."""

    every: int = 0
    """Steps between validations, each of which is saved as a checkpoint; 0 for none."""
    pairs: int = 32
    """Text-image pairs of the validation split whose loss is measured at fixed noise and timesteps."""
    pictures: int = 0
    """Of so many of them, pictures at fixed seeds are made each time: <output>/pictures."""
    identities: int = 0
    """So many of the miniature's validation identities are generated and judged each time; 0 for other bases."""

    def __post_init__(self) -> None:
        if min(self.every, self.pictures, self.identities) < 0 or self.pairs < 1:
            raise ParameterError(
                f"validation needs pairs ≥ 1 and nothing negative, has every {self.every}, pairs {self.pairs}, "
                f"pictures {self.pictures}, identities {self.identities}; every 0 turns it off"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    data: str
    """URI of an ingestion's output folder."""
    output: str
    """URI of the run's folder, which every worker must reach. The same folder continues the run that it holds."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Base model, weights to start from, and MLflow."""
    fresh: bool = False
    """Start with closed gates and adapters that only copy the base, whatever weights the preset has."""
    workers: int = 2
    """Training processes; each takes batch_size / workers examples of a step."""
    gpus_per_worker: int = 0
    """GPUs of each worker; with 0 it computes on the CPU."""
    precomputed: bool = False
    """Take latents and caption embeddings from the shards, where ingestion put them."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """Precision, memory, and when a batch is skipped."""
    checkpoint_every: int = 30
    """Steps between checkpoints."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Checkpoints of the lowest validation loss (without validation, mean training loss) that are kept beside them."""
    max_failures: int = 3
    """Times that all workers are restarted from the last checkpoint after one of them failed."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Whether it is learning."""
    artifacts: str | None = None
    """URI for the artifacts of a new MLflow experiment; by default MLflow's choice."""
    adapters: AdapterTrainingConfig = field(default_factory=AdapterTrainingConfig)
    """Steps, batch, learning rates."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """How the conditioning picture is varied."""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ParameterError(f"{name} must be at least {least}, is {getattr(self, name)}; raise it")
        parts = self.workers * self.compute.accumulation
        if self.adapters.batch_size % parts:
            raise ParameterError(
                f"batch_size {self.adapters.batch_size} must be a multiple of workers × accumulation, {parts}; "
                "change one of them"
            )

    @property
    def run(self) -> str:
        """The run's folder as the same URI however it is written; by it MLflow finds the run again."""
        return open_store(self.output).uri(LOG.rstrip("/")).rpartition("/")[0]

    def absolute(self) -> TrainConfig:
        """The same from any working directory: Ray Train moves each of its workers into a folder of its own."""
        artifacts = self.artifacts
        if artifacts is not None and not urlsplit(artifacts).scheme:
            artifacts = str(Path(artifacts).absolute())
        places = {name: absolute_uri(getattr(self, name)) for name in ("data", "output")}
        return replace(self, model=self.model.absolute(), artifacts=artifacts, **places)

    def checkpoints(self) -> Checkpoints:
        """Those of the run."""
        return Checkpoints(store=open_store(self.output), keep_last=self.keep_last, keep_best=self.keep_best)

    def manifest(self) -> dict[str, Any]:
        """The data's, as it was when the run began, whatever is ingested since. Raises StorageError."""
        store = open_store(self.output)
        kept = json.loads(store.get(DATA)) if store.exists(DATA) else {}
        found: dict[str, Any] = kept["manifest"] if kept.get("data") == self.data else finished_manifest(self.data)
        return found

    def keep(self, manifest: dict[str, Any]) -> None:
        """Has `manifest` find this one ever after."""
        open_store(self.output).put(DATA, json.dumps({"data": self.data, "manifest": manifest}).encode())

    def fingerprint(self, shards: Shards, booth: Personalizer) -> str:
        """What a run keeps to its end: which sample comes when, and the content of the models that stay frozen."""
        base = locate(model_parts(self.model.base, None, self.model.image_encoder, None).base)
        frozen = digest_of(*(folder_digest(base / part) for part in PARTS))
        return (
            f"data {shards.digest[:16]}, seed {self.adapters.seed}, batch size {self.adapters.batch_size}, "
            f"base {frozen[:16]}, image encoder {booth.image_encoder.digest[:16]}"
        )

    def start(self, *, device: str) -> Personalizer:
        """The model before its first step; the same on every worker."""
        if not self.fresh:
            return self.model.load(device=device)
        torch.manual_seed(self.adapters.seed)
        return self.model.untrained(device=device)


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What every worker is handed."""

    config: TrainConfig
    shards: Shards
    held_out: Shards
    """For validation."""
    prepare: ExamplePreparer
    fingerprint: str
    """TrainConfig's."""


class Monitor:
    """An actor between the driver and its workers: how far they are, and whether they shall stop."""

    def __init__(self, done: int) -> None:
        self._stop = asyncio.Event()
        self._progress = (done, "starting workers")
        self._failure = ""

    async def report(self, step: int, word: str) -> None:
        """A worker's news."""
        self._progress = (step, word)

    async def progress(self) -> tuple[int, str]:
        """The latest news."""
        return self._progress

    async def fail(self, reason: str) -> None:
        """Notes what no restart will mend."""
        self._failure = reason

    async def failure(self) -> str:
        """Why the training cannot go on; empty as long as it can."""
        return self._failure

    async def stop(self) -> None:
        """Asks the workers to save and stop."""
        self._stop.set()

    async def stopping(self) -> None:
        """Returns when they are asked to."""
        await self._stop.wait()


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a training ended."""

    step: int
    stopped: bool = False
    """Because it was asked to."""
    failure: str = ""
    """Why it could not go on."""


def train_worker(settings: dict[str, Any]) -> Ending:
    """One of the workers: its share of every batch, gradients averaged over all of them.

    What a restart cannot mend is noted before it is raised: the others wait for this worker, and only an error ends
    them. When all are started again, they learn it and end.
    """
    _die_at_sigterm()
    monitor: ray.actor.ActorHandle = settings["monitor"]
    if failure := ray.get(monitor.failure.remote()):
        return Ending(step=0, failure=failure)
    try:
        return _trained(settings["job"], monitor)
    except StorageError:
        raise
    except InstantBoothError as error:
        # Ray raises a task's error as a subclass whose text is the remote traceback; its cause is the error itself.
        ray.get(monitor.fail.remote(str(getattr(error, "cause", error))))
        raise


def _die_at_sigterm() -> None:
    """Has SIGTERM end this process at once, so that Ray Train starts it again from the last checkpoint.

    Ray's own handler begins an exit that never comes while a training is under way: Ray Train would wait ten minutes.
    Python sets handlers from the main thread alone, and that one is Ray's.
    """
    default = ctypes.c_void_p(int(signal.SIG_DFL))
    ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGTERM), default)


def _trained(job: TrainingJob, monitor: ray.actor.ActorHandle) -> Ending:
    # By it a base at models:/ is found; the default is relative, and this process is elsewhere.
    os.environ["MLFLOW_TRACKING_URI"] = job.config.model.tracking_uri
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    session = TrainingSession(
        booth=job.config.start(device=str(device)),
        config=job.config.adapters,
        compute=job.config.compute,
        fingerprint=job.fingerprint,
    )
    restore(session, job.config.checkpoints())
    worker = Worker(job, session, monitor, rank=context.get_world_rank(), world=context.get_world_size())
    return worker.run()


def restore(session: TrainingSession, checkpoints: Checkpoints) -> None:
    """Takes up the newest whole checkpoint, if there is one. The first worker searches, the others read what it found.

    TrainingError where another worker cannot: workers at different steps would train apart.
    """
    together = torch.distributed.is_initialized()
    found = checkpoints.latest() if not together or torch.distributed.get_rank() == 0 else None
    chosen = [found[0].step if found else None]
    if together:
        torch.distributed.broadcast_object_list(chosen)
    if chosen[0] is None:
        return
    files = found[1] if found else checkpoints.read(chosen[0])
    if files is None:
        raise TrainingError(
            f"the checkpoint of step {chosen[0]} is whole for the first worker and damaged for another; give all of "
            "them the same output, and run the same command again"
        )
    session.restore(files)


class Worker:
    """The loop of one worker. The first of them also saves, validates and tells."""

    def __init__(
        self, job: TrainingJob, session: TrainingSession, monitor: ray.actor.ActorHandle, *, rank: int, world: int
    ) -> None:
        self.job = job
        self.config = job.config
        self.session = session
        self.monitor = monitor
        self.rank = rank
        self.world = world
        self.machine = f"{world} × {machine_of(session.device)}"
        self.store: ObjectStore = open_store(job.config.output)
        self.checkpoints = job.config.checkpoints()
        self.saver = Saver()
        self.lines: list[dict[str, Any]] = []
        self.pace = Pace(batch_size=job.config.adapters.batch_size, device=session.device)
        self.reported = 0.0
        self.counted = False
        self.validation: dict[str, Tensor] | None = None
        self.preemption: PreemptionInfo | None = None

    def run(self) -> Ending:
        """Trains to the last step, until it is asked to stop, or until too many batches were skipped."""
        session, steps = self.session, self.config.adapters.steps
        batches = training_feed(self.job).batches(session.step, steps, rank=self.rank, world=self.world)
        delivery = self._delivery()
        stopping = self.monitor.stopping.remote()
        ending = Ending(step=session.step)
        while (batch := self._next(batches)) is not None:
            wish = bool(ray.wait([stopping], timeout=0)[0])
            with self.pace.computing():
                outcome = session.advance(batch, stop=wish)
            metrics = self._metrics(outcome)
            validates = bool(self.config.validation.every) and session.step % self.config.validation.every == 0
            if validates:
                metrics |= self._validate(delivery)
            self._note(batch, outcome, metrics, delivery)
            ending = self._ending(outcome)
            last = session.step == steps or ending.stopped or bool(ending.failure)
            due = session.step % self.config.checkpoint_every == 0
            if self._preempted() or due or validates or last:
                self._save()
            if last:
                break
        self.saver.wait()
        if delivery:
            # What it could not deliver the driver takes from the log.
            delivery.close()
        return ending

    def _next(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor] | None:
        with self.pace.waiting():
            batch = next(batches, None)
        if batch is None:
            return None
        batch = shaped(batch, self.session.booth)
        if not self.counted:
            self.counted = True
            self.pace.seconds_at_peak = seconds_at_peak(self.session, batch)
        return batch

    def _metrics(self, outcome: Outcome) -> dict[str, float]:
        """What every step tells. Rates are of all steps since the last checkpoint."""
        metrics = {"step": float(self.session.step), "skipped": float(self.session.guard.skipped)}
        metrics |= {f"gate/{layer}": gate for layer, gate in self.session.objective.gates().items()}
        metrics |= {
            name: value
            for name, value in (("loss", outcome.loss), ("gradient_norm", outcome.gradient_norm))
            if math.isfinite(value)
        }
        return metrics | self.pace.metrics()

    def _validate(self, delivery: Delivery | None) -> dict[str, float]:
        """The first worker measures, the others meet it at the next step."""
        if not delivery:
            return {}
        settings = self.config.validation
        if self.validation is None:
            self.validation = shaped(validation_batch(self.job), self.session.booth)
        metrics = self.session.validation_loss(self.validation) if self.validation else {}
        with self.session.averaged() as booth:
            sheet = validation_pictures(booth, self.job.held_out, settings.pictures) if settings.pictures else None
            if settings.identities and (judges := judges_of(self.config.model.base)):
                metrics |= judged(booth, judges, settings.identities)
        if sheet:
            key, data = f"{PICTURES}/{self.session.step:09d}.png", encode_png(sheet)
            patiently(partial(self.store.put, key, data))
            delivery.keep(key, data)
        return metrics

    def _note(
        self, batch: dict[str, Tensor], outcome: Outcome, metrics: dict[str, float], delivery: Delivery | None
    ) -> None:
        line = {"step": self.session.step, "time": time.time(), "machine": self.machine}
        line |= {"samples": batch["sample"].tolist(), "skipped": outcome.skipped, "metrics": metrics}
        self.lines.append(line)
        if delivery:
            delivery.log(metrics, self.session.step)
            if time.perf_counter() - self.reported > REPORT_EVERY_S:
                self.reported = time.perf_counter()
                self.monitor.report.remote(self.session.step, f"loss {outcome.loss:.4f}")

    def _preempted(self) -> bool:
        """Whether a machine of this run is to be taken away that was not when this was asked before.

        It is worth a checkpoint: once the machine is gone, Ray Train goes on from there on what is left.
        """
        if self.session.step % ASK_EVERY:
            return False
        before, self.preemption = self.preemption, ray.train.get_preemption_info()
        return self.preemption not in (None, before)

    def _ending(self, outcome: Outcome) -> Ending:
        failure = ""
        guard = self.session.guard
        if outcome.skipped and guard.exhausted:
            failure = (
                f"step {self.session.step}: {outcome.skipped}; {guard.skipped} batches were skipped, at most "
                f"{guard.max_skipped} may be; look at the samples in {self.config.output}/{LOG} that say so, lower the "
                "learning rates, or raise --compute.max-skipped"
            )
        stopped = outcome.stop and self.session.step < self.config.adapters.steps
        return Ending(step=self.session.step, stopped=stopped, failure=failure)

    def _save(self) -> None:
        """Hands what is to be saved to the saver; the samples of every worker go into the log."""
        shares = _gathered([line["samples"] for line in self.lines], self.world)
        lines, self.lines = self.lines, []
        self.pace.restart()
        if self.rank:
            return
        for number, line in enumerate(lines):
            line["samples"] = [sample_name(sample) for share in shares for sample in share[number]]
        save = partial(self._write, self.session.step, lines, self.session.snapshot())
        self.saver.start(save)

    def _write(self, step: int, lines: list[dict[str, Any]], files: Callable[[], dict[str, bytes]]) -> None:
        if lines:
            key = f"{LOG}{lines[0]['step']:09d}-{lines[-1]['step']:09d}.jsonl"
            patiently(partial(self.store.put, key, log_bytes(lines)))
        self.checkpoints.save(step, files(), loss=self._loss_of(lines))

    def _loss_of(self, lines: list[dict[str, Any]]) -> float:
        """By which the checkpoint behind these steps is compared; infinite where it cannot be."""
        metrics = [line["metrics"] for line in lines]
        if self.config.validation.every:
            return metrics[-1].get("validation/loss", math.inf) if metrics else math.inf
        losses = [each["loss"] for each in metrics if "loss" in each]
        return sum(losses) / len(losses) if losses else math.inf

    def _delivery(self) -> Delivery | None:
        if self.rank:
            return None
        return Delivery(self.config.model.tracking_uri, self.config.run, artifacts=self.config.artifacts)


def machine_of(device: torch.device) -> str:
    """What a worker computes on: its GPU's name, or its node's and processor's."""
    return machine(device) if device.type == "cuda" else f"{platform.node()}, {machine(device)}"


def shaped(batch: dict[str, Tensor], booth: Personalizer) -> dict[str, Tensor]:
    """A batch whose precomputed columns have their shapes: latents [b, C, h, w], prompt_embeds [b, T, W]."""
    side = int(booth.base.unet.config.sample_size)
    shapes = {
        "latents": (int(booth.base.unet.config.in_channels), side, side),
        "prompt_embeds": (int(booth.base.tokenizer.model_max_length), booth.base.text_width),
    }
    return {
        name: values.float().unflatten(1, shapes[name]) if name in shapes else values for name, values in batch.items()
    }


def training_feed(job: TrainingJob) -> TrainingFeed:
    """The examples of a training."""
    return TrainingFeed(
        shards=job.shards,
        prepare=job.prepare,
        seed=job.config.adapters.seed,
        batch_size=job.config.adapters.batch_size,
        rows_per_task=rows_per_task(job.prepare.image_size, job.prepare.encoder_size),
        replaced_backgrounds=job.config.adapters.replaced_backgrounds,
        precomputed=job.config.precomputed,
    )


def validation_batch(job: TrainingJob) -> dict[str, Tensor]:
    """The first pairs of the validation split as one batch; empty where the split is."""
    feed = TrainingFeed(
        shards=job.held_out,
        prepare=job.prepare,
        seed=job.config.adapters.seed,
        batch_size=1,
        precomputed=job.config.precomputed,
    )
    return first_examples(feed, job.config.validation.pairs) if feed.shards.uris else {}


def _gathered(own: list[list[int]], world: int) -> list[list[list[int]]]:
    """Every worker's, by rank."""
    if world == 1:
        return [own]
    everyone: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyone, own)
    return everyone
