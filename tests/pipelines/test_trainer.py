"""What the workers of a training do together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import tyro

from instantbooth.errors import ParameterError, TrainingError
from instantbooth.images import Augmentation
from instantbooth.storage import FileStore
from instantbooth.training.adapters import AdapterTrainingConfig
from instantbooth.training.checkpoints import Checkpoints
from instantbooth.training.session import ComputeConfig, TrainingSession
from jobs.train import PRESETS
from pipelines.trainer import TrainConfig, restore
from tests.tiny import tiny_booth


def test_a_worker_that_cannot_read_what_the_first_found_does_not_train_apart(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(store=FileStore(tmp_path))
    session = TrainingSession(booth=tiny_booth(tiny), config=AdapterTrainingConfig(), compute=ComputeConfig())
    for step in (10, 20):
        session.step = step
        checkpoints.save(step, session.snapshot()(), loss=0.1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda chosen: chosen.__setitem__(0, 10))
    restore(session, checkpoints)
    assert session.step == 10, "the first worker's choice counts, not the newest"
    (tmp_path / "checkpoints" / "000000010" / "state.pt").unlink()
    with pytest.raises(TrainingError, match="step 10 is whole for the first worker and damaged for another"):
        restore(session, checkpoints)


@pytest.mark.parametrize(
    ("name", "value"), [("workers", 0), ("keep_last", 0), ("keep_best", -1), ("gpus_per_worker", -1)]
)
def test_options_below_what_makes_sense_are_refused(name: str, value: int) -> None:
    with pytest.raises(ParameterError, match=f"{name} must be at least {value + 1}, is {value}; raise it"):
        TrainConfig(data="curated", output="run", **{name: value})


def test_the_papers_augmentation_is_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = "miniature --data in --output out --augmentation.flip 0 --augmentation.crop-area 0.8 1"
    config = tyro.extras.overridable_config_cli(PRESETS, args=options.split())
    assert config.augmentation == Augmentation(flip=0, crop_area=(0.8, 1))
    with pytest.raises(SystemExit):
        tyro.extras.overridable_config_cli(PRESETS, args=["miniature", "--help"])
    assert "--augmentation.rotation" in capsys.readouterr().out
