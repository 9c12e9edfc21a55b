"""Checks a manifest without a model, every row of it, and estimates what its run would take.

Rows are looked at one by one as they are read, so that a manifest of any length fits. Neither torch nor Ray is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import tyro

from instantbooth.config import GenerationDefaults
from instantbooth.errors import ParameterError
from instantbooth.manifest import ManifestRow, read_prompt_sets, scan_manifest
from instantbooth.parameters import check_range
from instantbooth.storage import check_uri, open_uri, read_uri
from pipelines.places import check_manifest_apart

DRY_RUN = "--dry-run"
MEASURED_SECONDS_PER_STEP = 0.04
"""`make demo` on 2 CPU cores: 128 pictures of 25 guided steps in 129 s, starting and encoding included."""
MEASURED_ON = "the miniature on 2 CPU cores without a GPU"


@dataclass(frozen=True, kw_only=True)
class DryRunConfig:
    """What a dry run needs to know. Further options of the run may stand beside these; they are not looked at."""

    manifest: str
    """URI of the manifest: JSON Lines, CSV or Parquet."""
    output: str
    """URI of the folder for pictures and records; nothing is written."""
    prompt_sets: str | None = None
    """URI of a JSON file of named lists of prompts, for rows with a prompt_set."""
    num_inference_steps: int = GenerationDefaults.num_inference_steps
    """Denoising steps to reckon with where a row gives none: the run takes the weights' own."""
    seconds_per_step: float = MEASURED_SECONDS_PER_STEP
    """GPU seconds of an earlier run, all in, divided by its denoising steps."""
    cost_per_gpu_hour: float | None = None
    """Price of one GPU for an hour, in any currency."""

    def __post_init__(self) -> None:
        check_range("num_inference_steps", self.num_inference_steps)
        if not 0 < self.seconds_per_step < float("inf"):
            raise ParameterError(f"seconds_per_step must be above 0, is {self.seconds_per_step}; pass a measured one")
        if self.cost_per_gpu_hour is not None and not 0 <= self.cost_per_gpu_hour < float("inf"):
            raise ParameterError(f"cost_per_gpu_hour must be at least 0, is {self.cost_per_gpu_hour}; pass the price")


@dataclass(kw_only=True)
class Tally:
    """What the good rows of a manifest ask for."""

    default_steps: int
    """Denoising steps of a picture whose row gives none."""
    identities: int = 0
    reference_images: int = 0
    images: int = 0
    steps: int = 0
    """Denoising steps of all images together."""
    without_steps: int = 0
    """Rows that leave the number of steps to the weights."""
    with_size: int = 0
    """Rows that ask for a size."""
    bad: int = 0
    """Rows with faults."""

    def add(self, row: ManifestRow) -> None:
        """Counts a row in."""
        images = len(row.prompts) * row.num_images_per_prompt
        self.identities += 1
        self.reference_images += len(row.images)
        self.images += images
        self.steps += images * (row.num_inference_steps or self.default_steps)
        self.without_steps += row.num_inference_steps is None
        self.with_size += row.size is not None


def main() -> None:
    """Runs with the command line's options; exit status 1 if a row is bad."""
    arguments = [argument for argument in sys.argv[1:] if argument != DRY_RUN]
    config, unread = tyro.cli(DryRunConfig, description=__doc__, args=arguments, return_unknown_args=True)
    tally = dry_run(config)
    print(*estimate(tally, config), sep="\n")
    if unread:
        print(f"Options that only the run itself checks: {' '.join(unread)}")
    sys.exit(1 if tally.bad else 0)


def dry_run(config: DryRunConfig) -> Tally:
    """Prints every fault of every row as it is found, and returns the counts.

    Raises StorageError where manifest or prompt sets cannot be read or `output` is at no known place, ParameterError
    where the run would replace its own manifest, and ManifestError for prompt sets that cannot be used.
    """
    check_uri(config.output)
    check_manifest_apart(config.manifest, config.output)
    prompt_sets = read_prompt_sets(read_uri(config.prompt_sets)) if config.prompt_sets else None
    tally = Tally(default_steps=config.num_inference_steps)
    with open_uri(config.manifest) as file:
        for row, faults in scan_manifest(file, name=config.manifest, prompt_sets=prompt_sets):
            if row:
                tally.add(row)
            else:
                tally.bad += 1
                print(*faults, sep="\n")
    return tally


def estimate(tally: Tally, config: DryRunConfig) -> Iterator[str]:
    """Lines that say what the good rows take, and what that assumes."""
    seconds = tally.steps * config.seconds_per_step
    price = config.cost_per_gpu_hour
    yield f"rows              {tally.identities:,} good, {tally.bad:,} bad"
    yield f"identities        {tally.identities:,}"
    yield f"reference images  {tally.reference_images:,}"
    yield f"images            {tally.images:,}"
    yield f"denoising steps   {tally.steps:,}"
    yield f"seconds           {seconds:,.0f} on one GPU ({_duration(seconds)}); n GPUs take one n-th, at the same cost"
    yield (
        "cost              unknown without a price: pass --cost-per-gpu-hour"
        if price is None
        else f"cost              {seconds / 3600 * price:,.2f} at {price:,g} per GPU hour"
    )
    yield "This assumes:"
    measured = f": measured with {MEASURED_ON}" if config.seconds_per_step == MEASURED_SECONDS_PER_STEP else ""
    yield f"  {config.seconds_per_step:g} s for a step of one picture, all in (--seconds-per-step){measured}"
    if tally.without_steps:
        steps, rows = config.num_inference_steps, tally.without_steps
        yield f"  {steps} steps where a row gives no number (--num-inference-steps): rows of the kind: {rows:,}"
    if tally.with_size:
        yield f"  the same time at every size: rows that ask for one: {tally.with_size:,}"
    yield "  that every good row succeeds"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} d"
