"""Trains IP-Adapter on the miniature's pairs, as long as InstantBooth was trained; repeated, it goes on.

What it writes, `ip_adapter.safetensors` in a folder for each variant, is in the format of IP-Adapter's authors.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from instantbooth.errors import ParameterError, did_you_mean
from instantbooth.evaluation.ip_adapter import weights
from instantbooth.miniature.corpus import Corpus, render_corpus
from instantbooth.miniature.ip_adapter import train_ip_adapter
from instantbooth.miniature.pairs import Pairs, corpus_latents
from instantbooth.miniature.recipe import RECIPES
from instantbooth.model.base import BaseModel, device_of
from instantbooth.model.encoders import ImageEncoder
from instantbooth.presets import miniature_folder
from jobs import cli
from jobs.recipes import RecipeOption


@dataclass(frozen=True, kw_only=True)
class IPAdapterJob:
    """Which variants to train, on what, and how long."""

    output: Path = Path("out/ip_adapter")
    """Rendered pairs, checkpoints and the trained files."""
    variants: tuple[str, ...] = weights.VARIANTS
    """"global" reads CLIP's global feature, "plus" its patch tokens through a resampler."""
    models: Path | None = None
    """A miniature built elsewhere (its base/ and clip/); the shipped one if not given."""
    recipe: RecipeOption = RECIPES["gpu"]
    """Its pairs and its steps of adapters: InstantBooth's own budget."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self) -> None:
        for variant in self.variants:
            if variant not in weights.VARIANTS:
                raise ParameterError(f"variant {variant!r} is unknown. {did_you_mean(variant, weights.VARIANTS)}")


def run(job: IPAdapterJob) -> None:
    """Trains what is not trained yet, and prints each variant's record."""
    models = job.models or miniature_folder()
    corpus = render_corpus("pretraining", job.recipe.adapter_pictures, 1, job.output / "corpora")
    for variant in job.variants:
        record_path = job.output / variant / "RECORD.json"
        if not record_path.exists():
            record_path.parent.mkdir(parents=True, exist_ok=True)
            record = _train(job, models, corpus, variant)
            record_path.write_text(json.dumps(record, indent=2) + "\n")
        print(f"{variant}: {record_path.read_text()}")


def _train(job: IPAdapterJob, models: Path, corpus: Corpus, variant: str) -> dict[str, object]:
    device, config = device_of(job.device), job.recipe.adapters
    base = BaseModel.load(str(models / "base"), device=device, dtype=torch.float32)
    encoder = ImageEncoder(models / "clip", patch_layer=weights.PLUS_LAYER, device=device, dtype=torch.float32)
    pairs = Pairs(corpus, corpus_latents(corpus, base.vae, job.output / "corpora"))
    started = time.perf_counter()
    trained, losses = train_ip_adapter(variant, base, encoder, pairs, config, folder=job.output / "checkpoints")
    weights.save(trained.state(), job.output / variant / weights.FILE)
    return {
        "variant": variant,
        "parameters": sum(parameter.numel() for parameter in trained.trained.parameters()),
        "steps": len(losses),
        "loss": sum(losses[-200:]) / len(losses[-200:]),
        "seconds_of_the_last_sitting": round(time.perf_counter() - started),
        "config": asdict(config),
    }


if __name__ == "__main__":
    cli.main(run, IPAdapterJob, __doc__)
