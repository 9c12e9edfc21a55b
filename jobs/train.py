"""Fits adapters and encoders on curated shards, on any number of workers; tracked, checkpointed, registered."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray.data
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from ray.train.v2.api.exceptions import WorkerGroupError
from rich.console import Console
from torch import Tensor

from instantbooth.errors import InstantBoothError, ParameterError
from instantbooth.storage import open_store
from instantbooth.tracking import TrackedRun, tracked_run
from instantbooth.training.adapters import AdapterObjective, AdapterTrainingConfig, ExamplePreparer, optimizer_for
from instantbooth.training.ema import EMA
from jobs import cli
from jobs.cluster import ray_cluster
from pipelines.feed import training_feed
from pipelines.ingest import IngestReport, read_report
from pipelines.model import ModelConfig

STATE = "state.pt"
WEIGHTS = "weights"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    dataset: str
    """URI of an ingestion's output folder."""
    storage: str = "out/train"
    """Folder for checkpoints and weights, one subfolder a run; every worker must reach it."""
    run_name: str | None = None
    """The name of an earlier run continues that run from its last checkpoint; by default a new run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Base model, weights to start from, and MLflow."""
    workers: int = 2
    """Training processes; each takes batch_size / workers examples of a step."""
    gpus_per_worker: int = 0
    """GPUs of each worker; with 0 it computes on the CPU."""
    checkpoint_every: int = 30
    """Steps between checkpoints."""
    max_failures: int = 1
    """Times that all workers are restarted from the last checkpoint after one of them failed."""
    bfloat16: bool = True
    """Autocast to bfloat16: twice as fast on GPUs and on CPUs with AVX512-BF16."""
    artifacts: str | None = None
    """URI for the artifacts of a new MLflow experiment; by default MLflow's choice."""
    adapters: AdapterTrainingConfig = field(default_factory=AdapterTrainingConfig)
    """Steps, batch, learning rates."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.checkpoint_every < 1:
            raise ParameterError(
                f"workers and checkpoint_every must be at least 1, are {self.workers} and {self.checkpoint_every}"
            )
        if self.adapters.batch_size % self.workers:
            raise ParameterError(
                f"batch_size {self.adapters.batch_size} must be a multiple of workers {self.workers}; change either"
            )


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a training run left."""

    run_name: str
    run_id: str
    """MLflow's."""
    weights: str
    """URI of the registered version, such as models:/instantbooth/3."""
    folder: Path
    """The same weights as a local folder."""
    steps: int


def train(config: TrainConfig) -> TrainReport:
    """Trains on the connected cluster and registers the averaged weights.

    Raises InstantBoothError for a data set, base or weights that cannot be used.
    """
    name = config.run_name or f"adapters-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    report = read_report(config.dataset)
    check_cluster(config)
    booth = config.model.load(device="cpu")
    preparer = ExamplePreparer(
        tokenizer=booth.base.tokenizer,
        image_size=booth.base.image_size,
        encoder_size=booth.image_encoder.size,
    )
    with tracked_run(config.model.tracking_uri, name, artifacts=config.artifacts) as run:
        run.log_parameters(asdict(config.adapters) | {"dataset": config.dataset, "workers": config.workers})
        with _progress(run, config.adapters.steps):
            result = _fit(config, name, _feed(config, report, preparer), run)
        folder = Path(config.storage).absolute() / name / WEIGHTS
        with result.checkpoint.as_directory() as checkpoint:
            shutil.copytree(Path(checkpoint) / WEIGHTS, folder, dirs_exist_ok=True)
        version = run.register(folder)
    return TrainReport(run_name=name, run_id=run.run_id, weights=version, folder=folder, steps=result.metrics["step"])


def check_cluster(config: TrainConfig) -> None:
    """Raises ParameterError where the cluster will never have what was asked for: Ray would wait for it in silence."""
    have = ray.cluster_resources()
    for resource, wanted in (("CPU", config.workers), ("GPU", config.workers * config.gpus_per_worker)):
        if have.get(resource, 0) < wanted:
            raise ParameterError(
                f"training asks for {wanted} {resource}, the cluster has {have.get(resource, 0):g}; lower workers"
            )


def _feed(config: TrainConfig, report: IngestReport, preparer: ExamplePreparer) -> ray.data.Dataset:
    store = open_store(config.dataset)
    wanted = config.adapters.steps * config.adapters.batch_size
    # One epoch more than needed: splitting evenly between workers drops a few rows.
    epochs = -(-wanted // report.splits["train"]) + 1
    return training_feed(
        [store.uri(shard) for shard in report.shards], preparer, seed=config.adapters.seed, epochs=epochs
    )


def _fit(config: TrainConfig, name: str, feed: ray.data.Dataset, run: TrackedRun) -> ray.train.Result:
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config, "run": run},
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={"GPU": config.gpus_per_worker} if config.gpus_per_worker else {"CPU": 1},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(Path(config.storage).absolute()),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
        datasets={"train": feed},
    )
    try:
        return trainer.fit()
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            cause = getattr(failure, "cause", failure)
            if isinstance(cause, InstantBoothError):
                raise cause from error
        raise


def train_worker(settings: dict[str, Any]) -> None:
    """One of the workers: its share of every batch, gradients averaged over all of them."""
    config: TrainConfig = settings["config"]
    run: TrackedRun = settings["run"]
    context = ray.train.get_context()
    world, rank = context.get_world_size(), context.get_world_rank()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    objective = AdapterObjective(config.model.load(device=str(device)), config.adapters)
    model = prepare_model(objective)
    optimizer = optimizer_for(objective, config.adapters)
    ema = EMA(objective.trained.parameters(), config.adapters.ema_decay)
    start = _restore(objective, optimizer, ema)
    batches = ray.train.get_dataset_shard("train").iter_torch_batches(
        batch_size=config.adapters.batch_size // world, drop_last=True
    )
    began = time.perf_counter()
    for step, batch in zip(range(start, config.adapters.steps), batches, strict=False):
        generator = torch.Generator().manual_seed((config.adapters.seed * 1_000_003 + step) * world + rank)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.bfloat16):
            loss = model(batch, generator)
        _update(objective, optimizer, loss, config.adapters, step)
        ema.update(step)
        done = step + 1
        # Every rank takes part in the mean.
        mean = _mean_over_workers(loss.detach(), world)
        if rank == 0:
            rate = (done - start) * config.adapters.batch_size / (time.perf_counter() - began)
            gates = {f"gate/{layer}": gate for layer, gate in objective.gates().items()}
            run.log_metrics({"step": done, "loss": mean, "samples_per_second": rate} | gates, done)
        if done % config.checkpoint_every == 0 or done == config.adapters.steps:
            _report(objective, optimizer, ema, done, mean, rank)


def _update(
    objective: AdapterObjective, optimizer: torch.optim.AdamW, loss: Tensor, config: AdapterTrainingConfig, step: int
) -> None:
    rise = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    peaks = (config.adapter_learning_rate, config.encoder_learning_rate)
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * rise
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(objective.parameters(), config.clip_norm)
    optimizer.step()


def _mean_over_workers(loss: Tensor, world: int) -> float:
    if world > 1:
        torch.distributed.all_reduce(loss)
    return float(loss) / world


def _report(
    objective: AdapterObjective, optimizer: torch.optim.AdamW, ema: EMA, step: int, loss: float, rank: int
) -> None:
    """Every rank reports; rank 0 adds the checkpoint: what training continues from, and the averaged weights."""
    metrics = {"step": step, "loss": loss}
    if rank:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        state = {
            "step": step,
            "trained": objective.trained.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
        }
        torch.save(state, Path(folder) / STATE)
        ema.swap()
        objective.booth.save_weights(Path(folder) / WEIGHTS)
        ema.swap()
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _restore(objective: AdapterObjective, optimizer: torch.optim.AdamW, ema: EMA) -> int:
    """Takes up the last checkpoint, if there is one; returns the step to go on with."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)
    objective.trained.load_state_dict(state["trained"])
    optimizer.load_state_dict(state["optimizer"])
    ema.load_state_dict(state["ema"])
    return int(state["step"])


@contextmanager
def _progress(run: TrackedRun, steps: int) -> Iterator[None]:
    """A bar that follows the metrics of the run: the workers are other processes, maybe on other machines."""

    def look() -> tuple[int, str]:
        latest = run.latest()
        return int(latest.get("step", 0)), f"loss {latest['loss']:.4f}" if "loss" in latest else "starting workers"

    with cli.following("training", steps, look):
        yield


def run(config: TrainConfig) -> TrainReport:
    """Trains on the cluster and prints where the weights are."""
    with ray_cluster():
        report = train(config)
    Console().print(f"{report.weights} after {report.steps} steps, in {report.folder}", soft_wrap=True)
    return report


if __name__ == "__main__":
    cli.main(run, TrainConfig, __doc__)
