"""The bulk job, warm, against the loop a user would write, and against as many engines alone, on prepared concepts."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from PIL import Image

from instantbooth import Concept, Personalizer
from instantbooth.engine import Engine
from instantbooth.errors import ParameterError
from instantbooth.images import decode_image, encode_png
from instantbooth.manifest import ManifestRow
from instantbooth.miniature.samples import write_manifest
from instantbooth.storage import FileStore, read_uri
from jobs import cli
from jobs.benchmarks.timing import machine
from jobs.cluster import ray_cluster
from pipelines.outcome import Outcome
from pipelines.personalize import PersonalizeConfig, Pool, Tally, load_manifest, personalize
from pipelines.plan import SETTINGS

PROMPT_COUNTS = (1, 4, 16)


@dataclass(frozen=True, kw_only=True)
class BulkBenchmark:
    """Subjects of the miniature world, four prompts each."""

    subjects: int = 24
    """Of the bulk job and of the engine."""
    loop_subjects: int = 6
    """Of the loop."""
    references: int = 3
    """Reference images of each subject."""
    generators: int = os.cpu_count() or 1
    """Actors that generate pictures, and engines that do so alone; without a GPU, one core each."""

    def __post_init__(self) -> None:
        if not 1 <= self.loop_subjects <= self.subjects:
            raise ParameterError(f"loop_subjects must be from 1 to subjects ({self.subjects}), is {self.loop_subjects}")


@dataclass(kw_only=True)
class Watch:
    """When rows were done, seen from the driver."""

    started: float = field(default_factory=time.time)
    seen: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, and pictures made so far."""

    def __call__(self, tally: Tally, outcome: Outcome | None) -> None:
        if outcome is not None:
            self.seen.append((time.time() - self.started, tally.made))

    def warm_rate(self) -> float:
        """Pictures a second from the first row done to the last."""
        (first_s, first), (last_s, last) = self.seen[0], self.seen[-1]
        return (last - first) / (last_s - first_s)


def bulk(options: cli.Flat[BulkBenchmark]) -> None:
    """Prints pictures a second of the three, their ratios, and what encoding once saves, as JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        store = FileStore(Path(folder))
        list(write_manifest(store, "orders", subjects=options.subjects, references=options.references))
        rows = load_manifest(store.uri("orders/manifest.jsonl"))
        booth = Personalizer.from_pretrained("miniature", device=device)
        encode_s, generate_s = _loop(booth, rows[: options.loop_subjects], Path(folder))
        alone = _engines_rate(options, booth, rows)
        watch = _run(options, store, device)
        first_image = min(path.stat().st_mtime for path in Path(folder).glob("bulk/images/*/*")) - watch.started
    prompts = len(rows[0].prompts)
    loop = options.loop_subjects * prompts / (encode_s + generate_s)
    result = {
        "machine": machine(device),
        "images_per_second": {
            "bulk, warm": round(watch.warm_rate(), 3),
            "loop, one identity at a time": round(loop, 3),
            "engines alone": round(alone, 3),
        },
        "bulk_over_loop": round(watch.warm_rate() / loop, 3),
        "bulk_over_engines": round(watch.warm_rate() / alone, 3),
        "seconds_to_first_image": round(first_image, 1),
        "seconds_to_first_row": round(watch.seen[0][0], 1),
        "encode_once_saves": _savings(encode_s / options.loop_subjects, generate_s / options.loop_subjects / prompts),
        "settings": vars(options) | {"prompts": prompts, "steps": booth.defaults.num_inference_steps},
    }
    print(json.dumps(result, indent=2))


def _loop(booth: Personalizer, rows: Sequence[ManifestRow], folder: Path) -> tuple[float, float]:
    """Seconds that a user's own loop spends on encoding, reading included, and on generating, writing included."""
    encode_s = generate_s = 0.0
    booth.generate(rows[0].prompts[0], _encode(booth, rows[0]), num_inference_steps=2)
    for row in rows:
        started = time.perf_counter()
        concept = _encode(booth, row)
        encoded = time.perf_counter()
        for number, picture in enumerate(booth.generate(list(row.prompts), concept, seed=row.seed or 0)):
            (folder / f"{row.id}-{number}.png").write_bytes(encode_png(picture, {}))
        encode_s += encoded - started
        generate_s += time.perf_counter() - encoded
    return encode_s, generate_s


def _engines_rate(options: BulkBenchmark, booth: Personalizer, rows: Sequence[ManifestRow]) -> float:
    """Pictures a second of engines in processes of their own, which have every concept and request from the start."""
    device = booth.base.device.type
    engines = 1 if device == "cuda" else options.generators
    work = [(list(row.prompts), _encode(booth, row)) for row in rows]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(engines, spawn, initializer=_start_together, initargs=(spawn.Barrier(engines),)) as pool:
        spans = list(pool.map(_engine_span, [work[n::engines] for n in range(engines)], [device] * engines))
    pictures = sum(len(prompts) for prompts, _ in work)
    return pictures / (max(end for _, end in spans) - min(start for start, _ in spans))


_barrier: Barrier


def _start_together(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _engine_span(work: Sequence[tuple[list[str], Concept]], device: str) -> tuple[float, float]:
    """When one engine, warm, began and ended."""
    if device == "cpu":
        torch.set_num_threads(1)
    booth = Personalizer.from_pretrained("miniature", device=device)
    requests = [
        request
        for prompts, concept in work
        for request in booth.requests(prompts, concept, seed=0, **dict.fromkeys(SETTINGS))
    ]
    with Engine(booth) as engine:
        _barrier.wait()
        started = time.time()
        for ticket in [engine.submit(request) for request in requests]:
            ticket.result()
        return started, time.time()


def _run(options: BulkBenchmark, store: FileStore, device: str) -> Watch:
    """The job, on a cluster that is there already."""
    gpus = 1.0 if device == "cuda" else 0.0
    pools = {
        "concept": Pool(gpus=0.2 * gpus),
        "diffusion": Pool(gpus=0.8 * gpus) if gpus else Pool(min=options.generators, max=options.generators),
    }
    config = PersonalizeConfig(manifest=store.uri("orders/manifest.jsonl"), output=store.uri("bulk"), **pools)
    with ray_cluster():
        watch = Watch()
        personalize(config, watch)
    return watch


def _encode(booth: Personalizer, row: ManifestRow) -> Concept:
    return booth.encode(_read(row.images), class_noun=row.class_noun, masks=row.masks and _read(row.masks))


def _read(uris: Sequence[str]) -> list[Image.Image]:
    return [decode_image(read_uri(uri), name=uri) for uri in uris]


def _savings(encode_s: float, picture_s: float) -> dict[str, float]:
    """Prompts of a subject → share of the time saved against encoding it anew for every prompt; from the loop."""
    return {
        str(count): round(1 - (encode_s + count * picture_s) / (count * (encode_s + picture_s)), 3)
        for count in PROMPT_COUNTS
    }
