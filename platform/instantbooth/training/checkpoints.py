"""Checkpoints in object storage: what a training goes on from, trusted only when every byte is as it was written.

    checkpoints/000000120/state.pt …       the files
    checkpoints/000000120/manifest.json    written last: bytes and SHA-256 of each of them, and of what it says itself

A checkpoint without a manifest is none. One of which any file is missing, cut or altered, the manifest among them, is
passed over for the one before.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any

from instantbooth.errors import MissingObjectError
from instantbooth.storage import ObjectStore, patiently

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
KEY = re.compile(rf"{FOLDER}/(?P<step>\d{{9}})/(?P<file>.+)")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A state of the training, as its manifest tells it."""

    step: int
    """Optimizer steps done."""
    loss: float
    """By which checkpoints are compared: of validation, else of training; lower is better."""
    files: dict[str, dict[str, Any]]
    """Name → bytes and SHA-256."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The checkpoints of one run."""

    store: ObjectStore
    """The run's folder."""
    keep_last: int = 2
    """Newest ones that stay."""
    keep_best: int = 1
    """Those of the lowest loss that stay beside them; one whose loss is no finite number is never among them."""
    _whole: set[int] = field(default_factory=set, repr=False, compare=False)
    """Steps whose files were written or read here, and are known to be as their manifests say."""

    def save(self, step: int, files: Mapping[str, bytes], *, loss: float) -> None:
        """Writes a checkpoint, then takes away those that need not stay. StorageError where it cannot be written.

        A checkpoint of that step which is whole is left as it is: nothing is written over what may be relied on.
        """
        if self._manifest(step) is None or self.read(step) is None:
            self._remove(step)
            entries = {}
            for name, data in files.items():
                patiently(partial(self.store.put, _key(step, name), data))
                entries[name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
            manifest = Checkpoint(step=step, loss=loss, files=entries)
            patiently(partial(self.store.put, _key(step, MANIFEST), _manifest_bytes(manifest)))
            self._whole.add(step)
        self._prune()

    def latest(self) -> tuple[Checkpoint, dict[str, bytes]] | None:
        """The newest whole checkpoint and its files; None where there is none. Damaged ones are logged."""
        for step in sorted(self.steps(), reverse=True):
            manifest = self._manifest(step)
            files = self.read(step)
            if manifest is not None and files is not None:
                return manifest, files
            log.warning("the checkpoint of step %d is damaged; going back to the one before", step)
        return None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that have a manifest, whole or not."""
        return sorted(step for step, files in self._listed().items() if MANIFEST in files)

    def _listed(self) -> dict[int, set[str]]:
        """Step → names of the files that are there."""
        listed: dict[int, set[str]] = {}
        for key in patiently(lambda: list(self.store.list(f"{FOLDER}/"))):
            if found := KEY.fullmatch(key):
                listed.setdefault(int(found["step"]), set()).add(found["file"])
        return listed

    def _manifest(self, step: int) -> Checkpoint | None:
        """What the manifest of a step says; None where it is missing, or not to the byte as it was written there."""
        try:
            data = patiently(partial(self.store.get, _key(step, MANIFEST)))
            manifest = Checkpoint(**json.loads(data)["checkpoint"])
        except (MissingObjectError, ValueError, TypeError, KeyError):
            return None
        return manifest if manifest.step == step and _manifest_bytes(manifest) == data else None

    def read(self, step: int) -> dict[str, bytes] | None:
        """The files of a checkpoint; None where one is not as the manifest says."""
        manifest = self._manifest(step)
        if manifest is None:
            return None
        files = {}
        for name, entry in manifest.files.items():
            try:
                data = patiently(partial(self.store.get, _key(step, name)))
            except MissingObjectError:
                return None
            if len(data) != entry["bytes"] or sha256(data).hexdigest() != entry["sha256"]:
                return None
            files[name] = data
        self._whole.add(step)
        return files

    def _prune(self) -> None:
        """Damaged ones are of no use, and do not count among those that stay; nor is what a kill left unfinished."""
        self.store.sweep(FOLDER)
        listed = self._listed()
        finished = sorted(step for step, files in listed.items() if MANIFEST in files)
        whole = [each for step in finished if self._is_whole(step) and (each := self._manifest(step)) is not None]
        newest = sorted(whole, key=lambda each: each.step)[-self.keep_last :]
        comparable = [each for each in whole if math.isfinite(each.loss)]
        best = sorted(comparable, key=lambda each: each.loss)[: self.keep_best]
        kept = {each.step for each in newest + best}
        for step in sorted(listed.keys() - kept):
            # One without a manifest that is newer than all of those may be on its way.
            if step in finished or step < max(kept, default=0):
                self._remove(step)

    def _is_whole(self, step: int) -> bool:
        return step in self._whole or self.read(step) is not None

    def _remove(self, step: int) -> None:
        """The manifest goes first: what is left of a removal cut short is no checkpoint."""
        keys = patiently(lambda: list(self.store.list(f"{FOLDER}/{step:09d}/")))
        for key in sorted(keys, key=lambda key: not key.endswith(f"/{MANIFEST}")):
            patiently(partial(self.store.delete, key))


class Saver:
    """Saves beside the training, one checkpoint after the other; a failure is raised at the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, save: Callable[[], None]) -> None:
        """Runs `save` in a thread, once the one before is done."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(save,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being saved any more; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, save: Callable[[], None]) -> None:
        try:
            save()
        except BaseException as error:
            self._error = error


def _manifest_bytes(checkpoint: Checkpoint) -> bytes:
    content = asdict(checkpoint)
    digest = sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({"checkpoint": content, "sha256": digest}, indent=2) + "\n").encode()


def _key(step: int, name: str) -> str:
    return f"{FOLDER}/{step:09d}/{name}"


def log_lines(store: ObjectStore, prefix: str) -> dict[int, dict[str, Any]]:
    """Step → what the training log says of it; a step written twice, after a restart, counts once."""
    lines: dict[int, dict[str, Any]] = {}
    for key in list(store.list(prefix)):
        for line in patiently(partial(store.get, key)).splitlines():
            entry = json.loads(line)
            lines[entry["step"]] = entry
    return lines


def log_bytes(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """Log entries as JSON lines."""
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
