"""Trains IP-Adapter on the miniature's pairs, as long as InstantBooth was trained; repeated, it goes on.

What it writes, `ip_adapter.safetensors` in a folder for each variant, is in the format of IP-Adapter's authors.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from instantbooth.errors import ParameterError, did_you_mean
from instantbooth.evaluation.ip_adapter import weights
from instantbooth.evaluation.ip_adapter.origin import MODELS, trained_for
from instantbooth.miniature.corpus import Corpus, render_corpus
from instantbooth.miniature.ip_adapter import train_ip_adapter, training_of
from instantbooth.miniature.pairs import corpus_latents
from instantbooth.miniature.recipe import RECIPES
from instantbooth.miniature.shipping import check_destination, ship
from instantbooth.model.base import BaseModel, check_layout, device_of
from instantbooth.model.encoders import ImageEncoder
from instantbooth.model.record import RECORD, write_record
from instantbooth.presets import miniature_folder
from instantbooth.training.adapters import AdapterTrainingConfig
from instantbooth.training.loop import last_loss
from jobs import cli
from jobs.recipes import RecipeOption


@dataclass(frozen=True, kw_only=True)
class IPAdapterJob:
    """Which variants to train, on what, and how long."""

    output: Path = Path("out/ip_adapter")
    """Rendered pairs, checkpoints and the trained files."""
    ship: Path | None = None
    """Where to put these in float16 as well, without pairs and checkpoints; `jobs.evaluate --ip-adapter` reads both."""
    variants: tuple[str, ...] = weights.VARIANTS
    """"global" reads CLIP's global feature, "plus" its patch tokens through a resampler."""
    models: Path | None = None
    """A miniature built elsewhere (its base/ and clip/); the shipped one if not given."""
    recipe: RecipeOption = RECIPES["gpu"]
    """Its pairs and its rounds of the adapters' training: InstantBooth's own budget."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self) -> None:
        for variant in self.variants:
            if variant not in weights.VARIANTS:
                raise ParameterError(f"variant {variant!r} is unknown. {did_you_mean(variant, weights.VARIANTS)}")
            if self.ship is not None:
                check_destination(self.ship / variant)

    @property
    def rounds(self) -> tuple[AdapterTrainingConfig, ...]:
        """The recipe's, as IP-Adapter needs them."""
        return tuple(training_of(each) for each in self.recipe.rounds)


def run(job: IPAdapterJob) -> None:
    """Trains what is not trained yet, and prints each variant's record.

    ParameterError where what is there was trained otherwise, or for other models. BaseModelError where there are none.
    """
    models, device = job.models or miniature_folder(), device_of(job.device)
    check_layout(models / "base")
    cli.make_folder(job.output)
    plans = {variant: plan(job, models, variant) for variant in job.variants}
    for variant, planned in plans.items():
        check_record(job.output / variant / RECORD, planned)
    missing = {variant: planned for variant, planned in plans.items() if not (job.output / variant / RECORD).exists()}
    if missing:
        corpus = render_corpus("pretraining", job.recipe.adapter_pictures, 1, job.output / "corpora")
        for variant, planned in missing.items():
            _train(job, models, corpus, variant, planned, device)
    for variant in plans:
        trained = job.output / variant
        print(f"{variant}: {(trained / RECORD).read_text()}")
        if job.ship is not None:
            print(f"shipped {ship(trained, job.ship / variant) / 1e6:.1f} MB to {job.ship / variant}")


def plan(job: IPAdapterJob, models: Path, variant: str) -> dict[str, Any]:
    """All that the trained weights depend on, as their record says it."""
    planned = {
        "variant": variant,
        MODELS: trained_for(models / "base", models / "clip"),
        "pictures": job.recipe.adapter_pictures,
        "rounds": [asdict(each) for each in job.rounds],
    }
    found: dict[str, Any] = json.loads(json.dumps(planned))
    return found


def check_record(path: Path, planned: dict[str, Any]) -> None:
    """ParameterError where the weights that are there are not the planned ones."""
    if not path.exists():
        return
    made = json.loads(path.read_text())
    for name, value in planned.items():
        if made.get(name) != value:
            raise ParameterError(
                f"{path} is of a training with {name} {made.get(name)}, asked is {value}; repeat its options, or name "
                "another --output"
            )


def _train(
    job: IPAdapterJob, models: Path, corpus: Corpus, variant: str, planned: dict[str, Any], device: torch.device
) -> None:
    """Trains a variant, or goes on from its checkpoint; its record is written last."""
    base = BaseModel.load(str(models / "base"), device=device, dtype=torch.float32)
    encoder = ImageEncoder(models / "clip", patch_layer=weights.PLUS_LAYER, device=device, dtype=torch.float32)
    latents = corpus_latents(corpus, base.vae, job.output / "corpora")
    started = time.perf_counter()
    # Another plan's checkpoints, or another base's, are not gone on from.
    checkpoints = job.output / "checkpoints" / sha256(json.dumps(planned).encode()).hexdigest()[:12]
    objective, losses = train_ip_adapter(variant, base, encoder, corpus, latents, job.rounds, folder=checkpoints)
    record = planned | {
        "parameters": sum(parameter.numel() for parameter in objective.trained.parameters()),
        "steps": len(losses),
        "loss": last_loss(losses),
        "seconds_of_the_last_run": round(time.perf_counter() - started),
    }
    folder = job.output / variant
    weights.save(objective.state(), folder / weights.FILE)
    write_record(folder, record)


if __name__ == "__main__":
    cli.main(run, IPAdapterJob, __doc__)
