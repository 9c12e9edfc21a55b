"""A training as `python -m jobs.train` runs it, its workers dying as planned: python -m tests.chaos_training.driver"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from instantbooth.training.adapters import AdapterTrainingConfig
from jobs import cli, train
from pipelines.model import ModelConfig
from pipelines.trainer import TrainConfig, ValidationConfig
from tests.chaos_training.faults import crashing_worker


def config_of(settings: dict[str, str | int]) -> TrainConfig:
    """Steps of four samples, a checkpoint every four steps."""
    folder = Path(str(settings["folder"]))
    return TrainConfig(
        data=str(folder / "curated"),
        output=str(folder / str(settings["name"])),
        model=ModelConfig(
            base=str(folder / "model" / "base"),
            image_encoder=str(folder / "model" / "clip"),
            weights=str(folder / "weights"),
            tracking_uri=f"sqlite:///{folder}/mlflow.db",
        ),
        workers=2,
        checkpoint_every=4,
        max_failures=100,
        validation=ValidationConfig(every=8, pairs=4),
        artifacts=str(folder / "artifacts"),
        adapters=AdapterTrainingConfig(steps=int(settings["steps"]), batch_size=4, warmup_steps=3),
    )


def main() -> None:
    """The settings are JSON in the first argument."""
    settings = json.loads(sys.argv[1])
    if chaos := os.environ.get("CHAOS_FOLDER"):
        (Path(chaos) / "driver").write_text(str(os.getpid()))
        train.train_worker = crashing_worker
    with cli.ending():
        train.run(config_of(settings))


if __name__ == "__main__":
    main()
