"""Batching as others do it: what waits is taken together, and what comes later waits until all of it is finished."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Self

import torch
from PIL import Image

from instantbooth import Personalizer
from instantbooth.engine.concepts import KeysValuesCache
from instantbooth.model.denoise import BatchShape, denoise
from instantbooth.model.personalizer import Request
from jobs.benchmarks.arrivals import Picture

GATHERING_S = 0.002
"""For each next request of a batch: those submitted together shall be in one batch."""


class FixedBatches:
    """A thread that denoises up to `batch_size` waiting requests, decodes them and takes the next; 1 is serial.

    With `shrinking`, finished rows leave the forward pass, as in Personalizer.generate; else the batch keeps its shape
    until all are finished.
    """

    def __init__(
        self, booth: Personalizer, concepts: KeysValuesCache, *, batch_size: int, shrinking: bool = False
    ) -> None:
        self._booth = booth
        self._concepts = concepts
        self._batch_size = batch_size
        self._shrinking = shrinking
        self._waiting: SimpleQueue[tuple[Request, Picture] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="fixed-batches", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Picture:
        """Takes a request on."""
        picture: Picture = Future()
        self._waiting.put((request, picture))
        return picture

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            while len(batch) < self._batch_size:
                try:
                    following = self._waiting.get(timeout=GATHERING_S)
                except Empty:
                    break
                if following is None:
                    self._waiting.put(None)
                    break
                batch.append(following)
            self._make(batch)

    def _make(self, batch: Sequence[tuple[Request, Picture]]) -> None:
        try:
            images = self._images([request for request, _ in batch])
        except Exception as error:
            for _, picture in batch:
                picture.set_exception(error)
            return
        for (_, picture), image in zip(batch, images, strict=True):
            picture.set_result(image)

    def _images(self, requests: Sequence[Request]) -> list[Image.Image]:
        rows = self._booth.rows(requests)
        for row, request in zip(rows, requests, strict=True):
            row.keys_values = self._concepts.get(request.concept)
        shape = BatchShape(conditional=len(rows), unconditional=sum(row.guided for row in rows))
        latents = torch.empty(0)
        for latents in denoise(self._booth.base.unet, rows, None if self._shrinking else shape):
            pass
        return self._booth.base.decode(latents)
