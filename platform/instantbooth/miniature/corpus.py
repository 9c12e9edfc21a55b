"""Rendered data sets: pictures, masks, captions and labels, each split from identities of its own."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from instantbooth.errors import ParameterError, did_you_mean
from instantbooth.miniature.world import ATTRIBUTES, NOUNS, Identity, Scene, render

SPLITS = {"pretraining": 0, "judging": 1, "judging-held-out": 2, "validation": 3, "test": 4, "demo": 5}
"""Each split draws its identities and scenes from seeds of its own."""
SEEDS_PER_SPLIT = 10_000_000
CLASSES = tuple(NOUNS)
RENDERER = (
    "backgrounds",
    "cat",
    "corpus",
    "drawing",
    "hair",
    "identity",
    "person",
    "scene",
    "styles",
    "wardrobe",
    "world",
)
"""The modules that pictures depend on."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Rendered pictures with all that is known of them; row i of each field belongs to picture i."""

    images: NDArray[np.uint8]
    """[N, 64, 64, 3] RGB."""
    masks: NDArray[np.uint8]
    """[N, 64, 64], 255 where the subject is."""
    identities: NDArray[np.int64]
    """[N] seeds of the identities; even ones are persons, odd ones cats."""
    labels: NDArray[np.int64]
    """[N, attributes] index of each attribute's value, in the order of ATTRIBUTES."""
    captions: list[str]
    """What the scene's caption says; the class noun stands at `nouns`."""
    nouns: list[str]
    """The noun used for the subject: "person", "woman", "kitten", …"""
    descriptions: list[str]
    """Phrases that tell the identity coarsely, comma separated."""

    def __len__(self) -> int:
        return len(self.captions)


def subject_seed(split: str, number: int) -> int:
    """Seed of a split's identity `number`. ParameterError for an unknown split."""
    if split not in SPLITS:
        raise ParameterError(f"split {split!r} is unknown. {did_you_mean(split, SPLITS)}")
    return SPLITS[split] * SEEDS_PER_SPLIT + number


def class_noun_of(seed: int) -> str:
    """Persons have even seeds, cats odd ones."""
    return CLASSES[seed % 2]


def draw_noun(seed: int, rng: np.random.Generator) -> str:
    """What a caption calls the subject: often its class, sometimes "woman", "kitten" …"""
    return str(rng.choice(NOUNS[class_noun_of(seed)])) if rng.random() < 0.3 else class_noun_of(seed)


def identity_of(seed: int) -> Identity:
    """The identity behind a seed."""
    return Identity.sample(class_noun_of(seed), seed)


def labels_of(attributes: dict[str, str]) -> list[int]:
    """Index of each attribute's value, −1 where `attributes` does not say."""
    return [values.index(attributes[name]) if name in attributes else -1 for name, values in ATTRIBUTES.items()]


def render_corpus(split: str, identities: int, pictures_each: int, folder: Path) -> Corpus:
    """Renders `identities` × `pictures_each` pictures on all cores, or reads them from `folder` where they lie."""
    path = folder / f"{split}-{identities}x{pictures_each}-{renderer_digest()}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        numbers = range(identities)
        job = partial(_render_identity, split, pictures_each)
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            done = pool.map(job, numbers, chunksize=32)
            bar = track(done, f"rendering {split}", total=identities, console=Console(stderr=True))
            rows = [row for batch in bar for row in batch]
        images, masks, seeds, labels, words = zip(*rows, strict=True)
        temporary = path.with_suffix(".partial.npz")
        np.savez(
            temporary,
            images=np.stack(images),
            masks=np.stack(masks),
            identities=np.array(seeds, np.int64),
            labels=np.array(labels, np.int64),
            words=np.array(json.dumps(words)),
        )
        temporary.rename(path)
    with np.load(path) as saved:
        captions, nouns, descriptions = (list(column) for column in zip(*json.loads(str(saved["words"])), strict=True))
        return Corpus(
            images=saved["images"],
            masks=saved["masks"],
            identities=saved["identities"],
            labels=saved["labels"],
            captions=captions,
            nouns=nouns,
            descriptions=descriptions,
        )


def renderer_digest() -> str:
    """Changes with the code that draws."""
    sources = (Path(__file__).with_name(f"{name}.py").read_bytes() for name in RENDERER)
    return sha256(b"".join(sources)).hexdigest()[:8]


_Row = tuple[NDArray[np.uint8], NDArray[np.uint8], int, list[int], tuple[str, str, str]]


def _render_identity(split: str, pictures: int, number: int) -> list[_Row]:
    seed = subject_seed(split, number)
    identity = identity_of(seed)
    rng = np.random.default_rng([seed, 1])
    rows = []
    for _ in range(pictures):
        scene = Scene.sample(rng)
        noun = draw_noun(seed, rng)
        picture = render(identity, scene)
        labels = labels_of({"subject": class_noun_of(seed)} | scene.attributes())
        words = (scene.caption(noun, rng), noun, identity.description())
        rows.append((np.asarray(picture.image), np.asarray(picture.mask), seed, labels, words))
    return rows
