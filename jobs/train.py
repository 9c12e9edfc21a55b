"""Fits adapters and encoders on curated shards, on any number of workers; tracked, checkpointed, registered.

The output folder is the run: the same command goes on from its last checkpoint, after a crash or when it is asked to
stop (SIGTERM saves first). `python -m jobs.train miniature --help` lists every option.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import ray
import ray.train
import tyro
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from instantbooth.errors import InstantBoothError, ParameterError, StoppedError, TrainingError
from instantbooth.evaluation.miniature import judges_of
from instantbooth.model.base import locate
from instantbooth.presets import model_parts
from instantbooth.prompts import PLACEHOLDER_TOKEN
from instantbooth.storage import FileStore, open_store, patiently
from instantbooth.tracking import absolute_tracking_uri
from instantbooth.training.adapters import AdapterTrainingConfig, ExamplePreparer
from instantbooth.training.session import WEIGHTS, check_run
from jobs import cli
from jobs.cluster import ray_cluster
from jobs.tracked import Tracking
from pipelines.curation.shards import TRAIN, VALIDATION
from pipelines.feed import Shards
from pipelines.model import ModelConfig
from pipelines.trainer import Ending, Monitor, TrainConfig, TrainingJob, ValidationConfig, train_worker

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it where a job was submitted."""
PRESETS = {
    "miniature": (
        "The miniature, onwards from its shipped weights: minutes on two cores.",
        TrainConfig(
            data=tyro.MISSING, output=tyro.MISSING, validation=ValidationConfig(every=100, pictures=4, identities=8)
        ),
    ),
    "sd15": (
        "Stable Diffusion 1.5 from closed gates, with the paper's hyperparameters: four GPUs.",
        TrainConfig(
            data=tyro.MISSING,
            output=tyro.MISSING,
            model=ModelConfig(base="sd15"),
            fresh=True,
            workers=4,
            gpus_per_worker=1,
            checkpoint_every=1000,
            validation=ValidationConfig(every=1000, pictures=4),
            adapters=AdapterTrainingConfig(
                steps=320_000,
                batch_size=16,
                adapter_learning_rate=1e-6,
                encoder_learning_rate=1e-4,
                warmup_steps=500,
                ema_decay=0.9999,
                text_dropout=0.05,
                image_dropout=0.05,
                both_dropout=0.05,
            ),
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a training run left."""

    run_id: str
    """MLflow's; empty where it could not be had."""
    weights: str
    """URI of the registered version, such as models:/instantbooth/3; the folder where MLflow could not be had."""
    folder: str
    """The same weights as a folder: a path, or a URI at s3://."""
    steps: int


def train(config: TrainConfig) -> TrainReport:
    """Trains on the connected cluster and registers the averaged weights.

    Raises InstantBoothError for a data set, base or weights that cannot be used, TrainingError where too many batches
    were skipped, StoppedError after SIGTERM.
    """
    config = config.absolute()
    # Its workers, and those of a restart, start from the same version, wherever an alias moves meanwhile.
    config = replace(config, model=config.model.pinned())
    manifest = config.manifest()
    shards, held_out = (Shards.of(config.data, split, manifest) for split in (TRAIN, VALIDATION))
    check_cluster(config)
    check_judges(config)
    _check_shards(config, shards, held_out)
    booth = config.start(device="cpu")
    fingerprint = config.fingerprint(shards, booth)
    done = _done(config, fingerprint)
    config.keep(manifest)
    preparer = ExamplePreparer(
        tokenizer=booth.base.tokenizer,
        image_size=booth.base.image_size,
        latent_size=int(booth.base.unet.config.sample_size),
        encoder_size=booth.image_encoder.size,
        augmentation=config.augmentation,
        with_pixels=not config.precomputed,
    )
    job = TrainingJob(config=config, shards=shards, held_out=held_out, prepare=preparer, fingerprint=fingerprint)
    with _tracked(config, shards) as tracking:
        if done < config.adapters.steps:
            _raise_for(_fit(job, done))
        step, files = _weights_of(config)
        folder = _write_weights(config, files)
        run_id, version = tracking.register(step, files, folder)
    return TrainReport(run_id=run_id, weights=version, folder=folder, steps=step)


def _check_shards(config: TrainConfig, shards: Shards, held_out: Shards) -> None:
    """Raises TrainingError for shards that cannot be trained on as is asked, before anything is."""
    if config.validation.every and not held_out.uris:
        raise TrainingError(
            f"validation.every is {config.validation.every}, and {config.data} holds out no pairs to validate on; "
            "ingest with a larger share for validation, or pass --validation.every 0"
        )
    base = locate(model_parts(config.model.base, None, config.model.image_encoder, None).base)
    if config.precomputed:
        shards.check_precomputed(base, PLACEHOLDER_TOKEN)
    for split in (shards, held_out):
        split.check_captions(base, PLACEHOLDER_TOKEN)


def check_judges(config: TrainConfig) -> None:
    """Raises ParameterError for identities of the miniature with a base that pictures another world."""
    wanted = config.validation.identities if config.validation.every else 0
    if wanted and judges_of(config.model.base) is None:
        raise ParameterError(
            f"validation.identities is {wanted}, and {config.model.base} is no miniature with judges beside it; the "
            "shipped ones know nothing of its pictures: pass --validation.identities 0"
        )


def check_tracking(config: TrainConfig) -> None:
    """ParameterError for a submitted job whose registry would lie in its own folder, which goes with the cluster."""
    uri = config.model.tracking_uri
    if SUBMITTED in os.environ and absolute_tracking_uri(uri) != uri:
        raise ParameterError(
            f"model.tracking_uri is {uri}, in a folder that goes with this submitted job; set MLFLOW_TRACKING_URI in "
            "its runtime environment, or pass --model.tracking-uri, to a server or an absolute path"
        )


def check_cluster(config: TrainConfig) -> None:
    """Raises ParameterError where the cluster will never have what was asked for: Ray would wait for it in silence."""
    have = ray.cluster_resources()
    gpus, found = config.workers * config.gpus_per_worker, have.get("GPU", 0)
    if found < gpus:
        scaling = "" if found else "; one that scales up from none must keep that many running (minReplicas)"
        raise ParameterError(f"training asks for {gpus} GPU, the cluster has {found:g}; lower workers{scaling}")
    held = 0 if config.gpus_per_worker else config.workers
    if (cpus := have.get("CPU", 0)) < held + 1:
        raise ParameterError(
            f"training asks for {held + 1} CPU, {held} for workers and one for the feed that prepares their examples; "
            f"the cluster has {cpus:g}; lower workers"
        )


class _InterruptibleTrainer(TorchTrainer):
    """Ctrl-C stays a KeyboardInterrupt: Ray Train's own handler ends the process, and stays behind after training."""

    def _register_sigint_handler(self, controller: object) -> None:
        pass


def _fit(job: TrainingJob, done: int) -> Ending:
    """Runs the workers, restarted as often as max_failures says; a bar follows them."""
    config = job.config
    # Beside the driver: on another node, a spot one for instance, it would be lost with that.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = ray.remote(Monitor).options(num_cpus=0, scheduling_strategy=here).remote(done)
    # Ray Train's own folder stays empty: checkpoints are the run's, and it would resume no data position.
    with tempfile.TemporaryDirectory() as scratch, _asked_to_stop(monitor):
        trainer = _InterruptibleTrainer(
            train_worker,
            train_loop_config={"job": job, "monitor": monitor},
            scaling_config=ScalingConfig(
                num_workers=config.workers,
                use_gpu=config.gpus_per_worker > 0,
                resources_per_worker={"GPU": config.gpus_per_worker} if config.gpus_per_worker else {"CPU": 1},
            ),
            run_config=RunConfig(
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=config.max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        with cli.following("training", config.adapters.steps, lambda: ray.get(monitor.progress.remote()), done=done):
            try:
                return trainer.fit().return_value
            except WorkerGroupError as error:
                for failure in error.worker_failures.values():
                    cause = getattr(failure, "cause", failure)
                    if isinstance(cause, InstantBoothError):
                        raise cause from error
                raise


@contextmanager
def _asked_to_stop(monitor: ray.actor.ActorHandle) -> Iterator[None]:
    """SIGTERM makes the workers save and stop. Only a process's main thread hears signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = threading.Event()
    over = threading.Event()

    def tell() -> None:
        # Not in the handler: it may have interrupted a call into Ray.
        asked.wait()
        if not over.is_set():
            monitor.stop.remote()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        over.set()
        asked.set()
        teller.join()


def _raise_for(ending: Ending) -> None:
    if ending.failure:
        raise TrainingError(ending.failure)
    if ending.stopped:
        raise StoppedError(f"asked to stop, and saved step {ending.step}; the same command goes on from there")


def _done(config: TrainConfig, fingerprint: str) -> int:
    """Steps that the output holds already. TrainingError where they are of another training."""
    found = config.checkpoints().latest()
    if found is None:
        return 0
    check_run(found[1], fingerprint)
    return found[0].step


def _weights_of(config: TrainConfig) -> tuple[int, dict[str, bytes]]:
    """The last step, and the files of its averaged weights."""
    found = config.checkpoints().latest()
    if found is None or found[0].step < config.adapters.steps:
        raise TrainingError(
            f"the last checkpoint in {config.output} is damaged or gone; run the same command again, which goes on "
            "from the one before"
        )
    prefix = f"{WEIGHTS}/"
    return found[0].step, {
        name.removeprefix(prefix): data for name, data in found[1].items() if name.startswith(prefix)
    }


def _write_weights(config: TrainConfig, files: dict[str, bytes]) -> str:
    """Puts the weights where they are found without their checkpoint, config.json last; the folder."""
    store = open_store(config.output)
    for name, data in files.items():
        patiently(partial(store.put, f"{WEIGHTS}/{name}", data))
    return str(store.root / WEIGHTS) if isinstance(store, FileStore) else f"{config.output.rstrip('/')}/{WEIGHTS}"


@contextmanager
def _tracked(config: TrainConfig, shards: Shards) -> Iterator[Tracking]:
    """Opens the run in MLflow and ends it as the training ended; without MLflow the training runs all the same."""
    tracking = Tracking(config, shards)
    tracking.begin()
    status = "FAILED"
    try:
        yield tracking
        status = "FINISHED"
    except (KeyboardInterrupt, StoppedError):
        status = "KILLED"
        raise
    finally:
        tracking.end(status)


def run(config: TrainConfig) -> TrainReport:
    """Trains on the cluster and prints where the weights are."""
    check_tracking(config)
    with ray_cluster():
        report = train(config)
    Console().print(f"{report.weights} after {report.steps} steps, in {report.folder}", soft_wrap=True)
    return report


def main() -> None:
    """The command line: a preset, and options that override its values."""
    with cli.ending():
        run(tyro.extras.overridable_config_cli(PRESETS, description=__doc__))


if __name__ == "__main__":
    main()
