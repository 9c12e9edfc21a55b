"""Curated shards become training examples, prepared by Ray tasks beside the training workers and streamed to them.

Which sample comes when is SampleOrder's to say, from the manifest alone. Each worker asks for its own share of the
batches, from any step on: that is what lets a training be resumed to the sample, which Ray Train's own data sets
cannot. A task prepares a few batches in order, and a few tasks are ahead of the training. They are no Ray Data set: its
executor would live in the worker, where it turns in circles while it holds tasks back; training was four times as slow.
"""

from __future__ import annotations

import functools
import io
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray
from PIL import Image
from ray import cloudpickle
from torch import Tensor
from transformers import CLIPTokenizer

from instantbooth.errors import InputError, MissingObjectError, PromptError, StorageError, TrainingError
from instantbooth.images import decode_image
from instantbooth.model.base import load_tokenizer
from instantbooth.prompts import expand, tokenize_subject
from instantbooth.storage import open_store, patiently, read_uri
from instantbooth.training.adapters import unpacked
from instantbooth.training.order import SampleOrder
from pipelines.curation.precompute import Precomputed
from pipelines.curation.shards import TRAIN
from pipelines.curation.sources import open_filesystem
from pipelines.ingest import MANIFEST, caption_rules, read_manifest

Prepare = Callable[..., dict[str, Any]]

TASK_BYTES = 16 * 2**20
MAX_ROWS_PER_TASK = 256
TASKS_AHEAD = 8
TASK_CPUS = 0.5
"""Claimed by each task: on the one CPU that training leaves to it at least, the feed makes two at a time."""
HELD_BYTES = 512 * 2**20
"""Of shards, in a process. Its lanes read LANES at a time: with less room than these take they are read over again."""
PRECOMPUTED = ("latents", "prompt_embeds")
CHECKED_SHARDS = 64
"""Of which one task reads the captions; a caption takes 0.2 ms."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The shards of one split, as the manifest of an ingestion lists them."""

    uris: tuple[str, ...]
    rows: tuple[int, ...]
    digests: tuple[str, ...]
    """SHA-256 of each."""
    captions: str | None = None
    """By which rules (`caption_rules`) their captions were found to be of use; None where no base was given for it."""
    precomputed: Precomputed | None = None
    """What made the latents and prompt embeddings in them; None where there are none."""

    @property
    def digest(self) -> str:
        """Of the split's content: the SHA-256 of the shards' digests."""
        return sha256("".join(self.digests).encode()).hexdigest()

    @classmethod
    def of(cls, dataset: str, split: str = TRAIN, manifest: Mapping[str, Any] | None = None) -> Shards:
        """What the manifest in an ingestion's output folder lists, or an earlier `manifest` of it.

        StorageError where there is none, or a foreign one.
        """
        store = open_store(dataset)
        if manifest is None:
            manifest = finished_manifest(dataset)
        chosen = [entry for entry in manifest["files"] if entry["split"] == split and entry["rows"]]
        made_by = manifest.get("precomputed")
        return cls(
            uris=tuple(store.uri(entry["key"]) for entry in chosen),
            rows=tuple(entry["rows"] for entry in chosen),
            digests=tuple(entry["sha256"] for entry in chosen),
            captions=manifest.get("captions"),
            precomputed=Precomputed(**made_by) if made_by else None,
        )

    def read_rows(self) -> Iterator[dict[str, Any]]:
        """The rows in their order, columns of SCHEMA and what was precomputed."""
        for uri, digest in zip(self.uris, self.digests, strict=True):
            yield from _table(uri, digest).to_pylist()

    def check_captions(self, base: Path, placeholder: str) -> None:
        """TrainingError unless this base's text encoder reaches the subject of every caption.

        An ingestion that was given the base has seen to that. Otherwise all captions are read, on the cluster: found in
        the midst of a training, one would end it again and again.
        """
        if self.captions == caption_rules(base, placeholder):
            return
        tokenizer = ray.put(load_tokenizer(base))
        find = ray.remote(num_cpus=TASK_CPUS)(_useless_captions)
        parts = [self.uris[start : start + CHECKED_SHARDS] for start in range(0, len(self.uris), CHECKED_SHARDS)]
        found = ray.get([find.remote(part, tokenizer, placeholder) for part in parts])
        if count := sum(number for number, _ in found):
            first = next(fault for _, fault in found if fault)
            raise TrainingError(
                f"{count} of {sum(self.rows)} pairs cannot be trained on, first {first}; ingest again with base "
                f"{base}, which leaves such pairs out"
            )

    def check_precomputed(self, base: Path, placeholder: str) -> None:
        """TrainingError unless this base and word made the latents and prompt embeddings in the shards."""
        if self.precomputed is None:
            raise TrainingError("the shards hold nothing precomputed; ingest with precompute, or train without")
        if self.precomputed.placeholder != placeholder:
            raise TrainingError(
                f"the shards were precomputed with the placeholder {self.precomputed.placeholder!r}, training says "
                f"{placeholder!r}; ingest again"
            )
        if self.precomputed != Precomputed.by(base, placeholder):
            raise TrainingError(f"the shards were precomputed by another base than {base}; ingest again with that base")


@dataclass(frozen=True, kw_only=True)
class TrainingFeed:
    """The examples of one worker, batch by batch."""

    shards: Shards
    prepare: Prepare
    seed: int
    batch_size: int
    """Of a step, over all workers."""
    rows_per_task: int = 32
    """Examples that one task prepares."""
    tasks_ahead: int = TASKS_AHEAD
    """Tasks that run, or whose examples wait to be taken."""
    replaced_backgrounds: float = 0.0
    """AdapterTrainingConfig's; a scene is a row of the same shard, drawn at random."""
    precomputed: bool = False
    """Whether latents and prompt embeddings are taken from the shards, where ingestion put them."""

    def order(self) -> SampleOrder:
        """Which sample comes when."""
        return _order(self.shards.rows, self.seed)

    def at(self, order: SampleOrder, position: int) -> dict[str, Any]:
        """The example at a position of the training."""
        place = order.place(position)
        uri = self.shards.uris[place.shard]
        shard = _shard(uri, self.shards.digests[place.shard])
        row = _row(shard, place.row)
        number = {"position": np.int64(position), "sample": np.int64(int(row["id"][:15], 16))}
        try:
            return self.example(row, place.epoch, scenes=shard) | number
        except InputError as error:
            raise TrainingError(
                f"row {row['id']} of {uri} cannot be trained on: {error}; ingest with the base that is trained, which "
                "leaves such pairs out"
            ) from error

    def example(self, row: dict[str, Any], epoch: int, *, scenes: pa.Table | None = None) -> dict[str, Any]:
        """A row as it is trained on in an epoch; all that is random in it is drawn from (seed, epoch, id).

        Without `scenes`, references are on black.
        """
        rng = np.random.default_rng([self.seed, epoch, int(row["id"][:16], 16)])
        scene = None
        if scenes is not None and self.replaced_backgrounds and rng.random() < self.replaced_backgrounds:
            scene = _pictured(_row(scenes, int(rng.integers(len(scenes)))))
        image, mask = _pictured(row)
        example = self.prepare(image=image, mask=mask, caption=row["caption"], noun=row["noun"], rng=rng, scene=scene)
        if self.precomputed:
            example |= {name: np.frombuffer(row[name], np.float16) for name in PRECOMPUTED}
        return example

    def batches(self, start: int, stop: int, *, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        """This rank's share of the batches of steps start … stop − 1, in order.

        Beside the example's arrays each batch has `position` [b] and `sample` [b], the first 60 bits of the row's id.
        Raises TrainingError rather than hand over another batch than the one that is due.
        """
        share = self.batch_size // world
        steps_per_task = max(1, self.rows_per_task // share)
        order = self.order()
        spans = [range(first, min(first + steps_per_task, stop)) for first in range(start, stop, steps_per_task)]
        step = start
        for block in self._blocks(spans, rank, world):
            for batch in _cut(block, share):
                due = order.batch(step, self.batch_size, rank=rank, world=world)
                if batch["position"].tolist() != list(due):
                    raise TrainingError(
                        f"step {step} got samples {batch['position'].tolist()} where {due} are due; run the same "
                        "command again"
                    )
                yield unpacked(batch)
                step += 1

    def _blocks(self, spans: Sequence[range], rank: int, world: int) -> Iterator[dict[str, NDArray[np.generic]]]:
        """The examples of each span of steps, in order."""
        feed = ray.put(cloudpickle.dumps(self))
        make = ray.remote(num_cpus=TASK_CPUS, scheduling_strategy="SPREAD")(_made)
        tasks = (make.remote(feed, steps, rank, world) for steps in spans)
        ahead = deque(islice(tasks, self.tasks_ahead))
        while ahead:
            block = ray.get(ahead.popleft())
            ahead.extend(islice(tasks, 1))
            if ahead:
                # What another node has made is fetched while this block is trained on.
                ray.wait([*ahead], num_returns=len(ahead), timeout=0)
            yield block


def finished_manifest(dataset: str) -> dict[str, Any]:
    """Of an ingestion's output folder. StorageError where there is none, or a foreign one."""
    try:
        return read_manifest(dataset)
    except MissingObjectError as error:
        raise StorageError(f"there is no {MANIFEST} in {dataset}; point to an ingestion that finished") from error


def rows_per_task(image_size: int, encoder_size: int) -> int:
    """How many examples of pictures of these sides (pixels) a task prepares: small ones are made faster than tasks."""
    example_bytes = 3 * (image_size**2 + encoder_size**2)
    return max(1, min(TASK_BYTES // example_bytes, MAX_ROWS_PER_TASK))


def sample_name(sample: int) -> str:
    """The first 15 characters of a row's id, from what a batch carries of it."""
    return f"{sample:015x}"


def first_examples(feed: TrainingFeed, count: int) -> dict[str, Tensor]:
    """The first rows of the shards as one batch, augmented the same way every time; for validation."""
    made = [feed.example(row, 0) for row in islice(feed.shards.read_rows(), count)]
    return unpacked({name: torch.from_numpy(np.stack([each[name] for each in made])) for name in made[0]})


def _row(shard: pa.Table, number: int) -> dict[str, Any]:
    row: dict[str, Any] = shard.slice(number, 1).to_pylist()[0]
    return row


def _pictured(row: dict[str, Any]) -> tuple[Image.Image, Image.Image]:
    """A row's picture, RGB, and its mask, L."""
    picture, mask = (decode_image(row[name], name=row["id"]) for name in ("image", "mask"))
    return picture.convert("RGB"), mask.convert("L")


def _cut(block: dict[str, NDArray[np.generic]], size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of this many rows; copies, for what Ray hands over is not to be written to."""
    for start in range(0, len(block["position"]), size):
        yield {name: torch.tensor(values[start : start + size]) for name, values in block.items()}


def _made(feed: bytes, steps: range, rank: int, world: int) -> dict[str, NDArray[np.generic]]:
    """One rank's examples of these steps, stacked in order."""
    made_by = _unpickled(feed)
    order = made_by.order()
    batches = (order.batch(step, made_by.batch_size, rank=rank, world=world) for step in steps)
    made = [made_by.at(order, position) for batch in batches for position in batch]
    return {name: np.stack([each[name] for each in made]) for name in made[0]}


@functools.lru_cache(maxsize=4)
def _unpickled(feed: bytes) -> TrainingFeed:
    """Once in a process rather than once a task: a tokenizer takes 20 ms."""
    found: TrainingFeed = cloudpickle.loads(feed)
    return found


@functools.lru_cache(maxsize=1)
def _order(rows: tuple[int, ...], seed: int) -> SampleOrder:
    return SampleOrder(rows=rows, seed=seed)


def _useless_captions(uris: tuple[str, ...], tokenizer: CLIPTokenizer, placeholder: str) -> tuple[int, str]:
    """How many these shards hold, and what is wrong with the first."""
    count, first = 0, ""
    for uri in uris:
        filesystem, path = open_filesystem(uri)
        try:
            rows = pq.read_table(path, filesystem=filesystem, columns=["id", "caption", "noun"]).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"cannot read {uri}: {error}; ingest again") from error
        for row in rows:
            try:
                tokenize_subject(tokenizer, expand(row["caption"], row["noun"], placeholder), placeholder)
            except PromptError as error:
                count += 1
                first = first or f"row {row['id']} of {uri}: {error}"
    return count, first


_held: OrderedDict[str, pa.Table] = OrderedDict()


def _shard(uri: str, digest: str) -> pa.Table:
    """A shard, kept in this process as long as there is room."""
    if uri not in _held:
        _held[uri] = _table(uri, digest)
        while len(_held) > 1 and sum(table.nbytes for table in _held.values()) > HELD_BYTES:
            _held.popitem(last=False)
    _held.move_to_end(uri)
    return _held[uri]


def _table(uri: str, digest: str) -> pa.Table:
    data = patiently(partial(read_uri, uri))
    if sha256(data).hexdigest() != digest:
        raise StorageError(f"{uri} is not what the manifest says: its SHA-256 differs; ingest again")
    return pq.read_table(io.BytesIO(data))
