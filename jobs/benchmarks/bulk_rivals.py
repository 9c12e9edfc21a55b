"""What the bulk job is measured against: the loop a user would write, and engines alone on prepared concepts."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from PIL import Image

from instantbooth import Concept, Personalizer
from instantbooth.engine import Engine, EngineConfig
from instantbooth.images import decode_image, encode_png
from instantbooth.manifest import ManifestRow
from instantbooth.storage import read_uri


def loop_rate(booth: Personalizer, rows: Sequence[ManifestRow], folder: Path) -> float:
    """Pictures a second, warm, one identity at a time: read, encode, generate its prompts together, write."""
    booth.generate(rows[0].prompts[0], encode(booth, rows[0]), num_inference_steps=2)
    started = time.perf_counter()
    for row in rows:
        concept = encode(booth, row)
        for number, picture in enumerate(booth.generate(list(row.prompts), concept, seed=row.seed or 0)):
            (folder / f"{row.id}-{number}.png").write_bytes(encode_png(picture))
    return sum(len(row.prompts) for row in rows) / (time.perf_counter() - started)


def engines_rate(
    load: Callable[[], Personalizer],
    engines: int,
    config: EngineConfig,
    work: Sequence[tuple[Sequence[str], Concept]],
) -> float:
    """Pictures a second, steady, of engines in processes of their own, which have every request from the start.

    `load` is called in each of them.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(engines, spawn, initializer=_start_together, initargs=(spawn.Barrier(engines),)) as pool:
        shares = [work[n::engines] for n in range(engines)]
        return steady_rate([time for times in pool.map(partial(_engine_times, load, config), shares) for time in times])


def steady_rate(times: Iterable[float]) -> float:
    """Events a second between the first quarter of them and the last.

    Where pictures are made together, many are half done when the first ends, and few are left when the last does.
    """
    ordered = sorted(times)
    first, last = len(ordered) // 4, len(ordered) - 1 - len(ordered) // 4
    return (last - first) / (ordered[last] - ordered[first])


def encode(booth: Personalizer, row: ManifestRow) -> Concept:
    """The row's concept, from its references."""
    return booth.encode(_read(row.images), class_noun=row.class_noun, masks=row.masks and _read(row.masks))


_barrier: Barrier


def _start_together(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _engine_times(
    load: Callable[[], Personalizer], config: EngineConfig, work: Sequence[tuple[Sequence[str], Concept]]
) -> list[float]:
    """When each picture of one engine was done."""
    booth = load()
    if booth.base.device.type == "cpu":
        torch.set_num_threads(1)
    requests = [request for prompts, concept in work for request in booth.requests(prompts, concept)]
    times: list[float] = []
    with Engine(booth, config) as engine:
        _barrier.wait()
        for request in requests:
            engine.submit(request).future.add_done_callback(lambda _: times.append(time.time()))
    return times


def _read(uris: Sequence[str]) -> list[Image.Image]:
    return [decode_image(read_uri(uri), name=uri) for uri in uris]
