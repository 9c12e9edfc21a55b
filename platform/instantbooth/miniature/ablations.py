"""The trainings behind the ablations' rows, and what each of them leaves."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instantbooth.evaluation.ablations import Ablation, ablated_objective
from instantbooth.miniature.corpus import Corpus
from instantbooth.miniature.pairs import Pairs
from instantbooth.miniature.recipe import Recipe, train_adapters
from instantbooth.model.adapter import detach
from instantbooth.model.base import locate
from instantbooth.model.personalizer import Personalizer
from instantbooth.model.record import RECORD, write_record
from instantbooth.presets import ModelPreset
from instantbooth.training.adapters import AdapterTrainingConfig
from instantbooth.training.loop import last_loss


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Where a row's models lie once they are trained."""

    folder: Path
    """Checkpoint, weights/, and image_encoder/ or base/ where that was tuned; RECORD.json is written last."""

    @property
    def done(self) -> bool:
        """Whether it is trained to its end."""
        return (self.folder / RECORD).is_file()

    @property
    def record(self) -> dict[str, Any]:
        """What its training was."""
        found: dict[str, Any] = json.loads((self.folder / RECORD).read_text())
        return found

    def preset(self, preset: ModelPreset, ablation: Ablation) -> ModelPreset:
        """The models with the row's own in their place."""
        chosen = replace(preset, weights=str(self.folder / "weights"))
        if ablation.tuned == "unet":
            return replace(chosen, base=str(self.folder / "base"))
        if ablation.tuned == "image_encoder":
            return replace(chosen, image_encoder=str(self.folder / "image_encoder"))
        return chosen


def train_ablation(
    ablation: Ablation,
    preset: ModelPreset,
    corpus: Corpus,
    latents: Tensor,
    config: AdapterTrainingConfig,
    *,
    tuned_rate: float,
    trained: Trained,
    device: torch.device,
) -> None:
    """Trains a row from nothing, or from its checkpoint, by the method's own training.

    `latents` [N, C, h, w] are the corpus's, scaled; what is tuned beside the method's own parts is so at `tuned_rate`
    times their learning rate. All rows start with the same encoders and adapters and meet the same pairs and noises.
    """
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    booth = ablation.personalizer.untrained(
        preset.base,
        image_encoder=preset.image_encoder,
        patch_layer=preset.patch_layer,
        defaults=Recipe().defaults,
        device=device,
    )
    objective, tuned = ablated_objective(booth, config, ablation)
    parameters = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    pairs = Pairs(corpus, latents, masked=ablation.masked, replaced_backgrounds=config.replaced_backgrounds)
    multiples = dict.fromkeys(tuned, tuned_rate)
    losses = train_adapters(objective, pairs, folder=trained.folder, multiples=multiples)
    booth.save_weights(trained.folder / "weights")
    _save_tuned(booth, ablation, preset, trained.folder)
    record = {
        "title": ablation.title,
        "parameters": parameters,
        "steps": len(losses),
        "loss": last_loss(losses),
        "seconds_of_the_last_run": round(time.perf_counter() - started),
        "config": asdict(config),
        "tuned_rate": tuned_rate,
    }
    write_record(trained.folder, record)


def _save_tuned(booth: Personalizer, ablation: Ablation, preset: ModelPreset, folder: Path) -> None:
    """The models in which something was tuned, whole, as the others are read."""
    if ablation.tuned == "image_encoder":
        booth.image_encoder.tower.save_pretrained(folder / "image_encoder")
        shutil.copy(locate(preset.image_encoder) / "preprocessor_config.json", folder / "image_encoder")
    if ablation.tuned == "unet":
        detach(booth.base.unet)
        shutil.copytree(locate(preset.base), folder / "base", dirs_exist_ok=True)
        booth.base.unet.save_pretrained(folder / "base" / "unet")
