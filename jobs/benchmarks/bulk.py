"""The bulk job, warm, against the loop a user would write, and against as many engines alone, on prepared concepts."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from instantbooth import Personalizer
from instantbooth.engine import EngineConfig
from instantbooth.errors import ParameterError
from instantbooth.machine import machine
from instantbooth.manifest import ManifestRow
from instantbooth.miniature.samples import write_manifest
from instantbooth.model.loading import Precision
from instantbooth.storage import FileStore
from jobs import cli
from jobs.benchmarks.bulk_rivals import encode, engines_rate, loop_rate, steady_rate
from jobs.benchmarks.encode_once import PROMPTS, savings, write_comparison
from jobs.benchmarks.full_size import write_full_size
from jobs.benchmarks.peak import known_peak, share_of_peak, unet_tflop
from jobs.cluster import MIN_LOGICAL_CPUS, ray_cluster
from jobs.goals import at_least, conclude
from pipelines.model import ModelConfig
from pipelines.personalize import PersonalizeConfig, Pool, load_manifest, personalize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CORES = os.cpu_count() or 1
GENERATORS = 1 if DEVICE == "cuda" else min(CORES, max(MIN_LOGICAL_CPUS, CORES) - 2)
"""A GPU is one actor's. Without one each takes a CPU of Ray's, and fetching and encoding need one each."""
BATCHES = 4
"""At least so many for each generator, or the last ones, when some generators have no work, would tell."""
ROWS_PER_BATCH = PersonalizeConfig.rows_per_batch
"""At most."""
COMPARED = 2
"""Subjects by which encoding once is measured."""


@dataclass(frozen=True, kw_only=True)
class BulkBenchmark:
    """Subjects of the miniature world."""

    full_size: bool = False
    """Stable Diffusion 1.5's shapes at 512 pixels with random weights, instead of the miniature."""
    subjects: int = max(24, 12 * GENERATORS)
    """Of the bulk job and of the engine."""
    loop_subjects: int = 6
    """Of the loop."""
    references: int = 3
    """Reference images of each subject."""
    prompts: int = 4
    """Of each subject; the loop makes its pictures together, so that with few of them it batches little."""
    generators: int = GENERATORS
    """Actors that generate pictures, and engines that do so alone; without a GPU, one core each."""
    precision: Precision = "bf16" if DEVICE == "cuda" else "fp32"
    """In which numbers all of them compute."""
    compile: bool = False
    """Whether the bulk job's U-Net is compiled, and the engines' alone; the loop's is not, as a user would write it."""
    peak_tflops: float | None = None
    """The GPU's dense bf16 peak, for the share of it that the U-Net takes; None looks it up."""

    def __post_init__(self) -> None:
        if not 1 <= self.generators <= GENERATORS:
            raise ParameterError(
                f"generators must be from 1 to {GENERATORS} on this machine, is {self.generators}; correct it"
            )
        if self.subjects < BATCHES * self.generators:
            raise ParameterError(
                f"subjects must be at least {BATCHES} for each generator ({BATCHES * self.generators}), is "
                f"{self.subjects}; raise it"
            )
        if not 1 <= self.loop_subjects <= self.subjects:
            raise ParameterError(
                f"loop_subjects must be from 1 to subjects ({self.subjects}), is {self.loop_subjects}; correct it"
            )
        if not 1 <= self.references <= 16:
            raise ParameterError(f"references must be from 1 to 16, is {self.references}; correct it")
        if not 1 <= self.prompts <= len(PROMPTS):
            raise ParameterError(f"prompts must be from 1 to {len(PROMPTS)}, is {self.prompts}; correct it")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < float("inf"):
            raise ParameterError(f"peak_tflops must be above 0, is {self.peak_tflops}; correct it, or leave it out")

    @property
    def rows_per_batch(self) -> int:
        """Rows of the manifest that an actor takes at a time."""
        return min(ROWS_PER_BATCH, self.subjects // (BATCHES * self.generators))


def bulk(options: cli.Flat[BulkBenchmark]) -> None:
    """Prints pictures a second of the three, their ratios, and what encoding once saves, as JSON.

    Exit status 1 where a goal is missed.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = ModelConfig()
        if options.full_size:
            write_full_size(Path(folder) / "model")
            model = untrained_model(Path(folder) / "model")
        result = measure(options, model, Path(folder))
    goals = {"bulk over loop": at_least(result["bulk_over_loop"], 2.0)}
    conclude(result, goals | {"bulk over engines": at_least(result["bulk_over_engines"], 0.9)})


def untrained_model(base: Path) -> ModelConfig:
    """A Stable Diffusion folder with random trained parts, which are written into it."""
    Personalizer.untrained(base, device="cpu").save_weights(base / "weights")
    return ModelConfig(base=str(base), weights=str(base / "weights"))


def measure(options: BulkBenchmark, model: ModelConfig, folder: Path) -> dict[str, Any]:
    """What `bulk` prints, of any model; `folder` is for inputs and outputs."""
    store = FileStore(folder)
    rows = _write_orders(options, store)
    load = partial(model.load, device=DEVICE, precision=options.precision)
    booth = load()
    loop = loop_rate(booth, rows[: options.loop_subjects], folder)
    work = [(row.prompts, encode(booth, row)) for row in rows]
    tflop = unet_tflop(booth, work[0][1])
    alone = engines_rate(load, options.generators, EngineConfig(compile=options.compile), work)
    with ray_cluster():
        started = time.time()
        _run(options, model, store, "orders", "bulk", rows_per_batch=options.rows_per_batch)
        write_comparison(rows[:COMPARED], store, "comparison")
        _run(options, model, store, "comparison", "compared", rows_per_batch=ROWS_PER_BATCH)
    times = [path.stat().st_mtime for path in folder.glob("bulk/images/*/[!.]*")]
    rate = steady_rate(times)
    rates = {"bulk, steady": rate, "loop, one identity at a time": loop, "engines alone, steady": alone}
    peak = options.peak_tflops or known_peak()
    return {
        "machine": machine(DEVICE),
        "images_per_second": {name: round(each, 3) for name, each in rates.items()},
        "bulk_over_loop": round(rate / loop, 3),
        "bulk_over_engines": round(rate / alone, 3),
        "seconds_to_first_image": round(min(times) - started, 1),
        "encode_once_saves": savings(FileStore(folder / "compared")),
        "unet_tflop_of_a_step": float(f"{tflop:.4g}"),
        "unet_share_of_peak": peak
        and {name: round(share_of_peak(each, tflop, booth.defaults, peak), 4) for name, each in rates.items()},
        "settings": vars(options)
        | {
            "steps": booth.defaults.num_inference_steps,
            "rows_per_batch": options.rows_per_batch,
        },
    }


def _write_orders(options: BulkBenchmark, store: FileStore) -> Sequence[ManifestRow]:
    """orders/manifest.jsonl, and its rows."""
    list(write_manifest(store, "orders", subjects=options.subjects, references=options.references))
    uri = store.uri("orders/manifest.jsonl")
    rows = [replace(row, prompts=PROMPTS[: options.prompts], metadata={}) for row in load_manifest(uri)]
    store.put("orders/manifest.jsonl", "".join(row.to_json() + "\n" for row in rows).encode())
    return rows


def _run(
    options: BulkBenchmark, model: ModelConfig, store: FileStore, orders: str, output: str, *, rows_per_batch: int
) -> None:
    """The job, on a cluster that is there already."""
    gpus = 1.0 if DEVICE == "cuda" else 0.0
    config = PersonalizeConfig(
        manifest=store.uri(f"{orders}/manifest.jsonl"),
        output=store.uri(output),
        model=model,
        precision=options.precision,
        compile=options.compile,
        concept=Pool(gpus=0.2 * gpus),
        diffusion=Pool(min=options.generators, max=options.generators, gpus=0.8 * gpus),
        rows_per_batch=rows_per_batch,
    )
    personalize(config)
