"""Makes the miniature world from nothing: `python -m jobs.build_miniature`. Repeated, it goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from instantbooth.miniature.recipe import Recipe, build
from instantbooth.miniature.shipping import check_destination, ship
from instantbooth.model.base import device_of
from jobs import cli
from jobs.recipes import RecipeOption


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Trains base, image encoder, segmenter, judges and adapters of the miniature world."""

    output: Path = Path("out/miniature")
    """Corpora, checkpoints and models are kept here."""
    ship: Path | None = None
    """Where to put the finished models in float16, for example platform/instantbooth/miniature/weights."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    recipe: RecipeOption = Recipe()
    """`recipe:cpu` takes two cores 4.5 hours; `recipe:gpu` has a better base, and made the shipped weights."""

    def __post_init__(self) -> None:
        if self.ship is not None:
            check_destination(self.ship)
        device_of(self.device)


def run(config: BuildConfig) -> None:
    """Runs what has not run yet and prints the figures of every stage."""
    cli.make_folder(config.output)
    record = build(config.output, config.recipe, device=device_of(config.device))
    print(json.dumps(record, indent=2))
    if config.ship is not None:
        print(f"shipped {ship(config.output / 'models', config.ship) / 1e6:.1f} MB to {config.ship}")


if __name__ == "__main__":
    cli.main(run, BuildConfig, __doc__)
