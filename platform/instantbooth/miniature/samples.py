"""The miniature world's pictures as a user's own data: text-image pairs to train on, a manifest of new subjects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from PIL import Image

from instantbooth.images import encode_png
from instantbooth.manifest import ManifestRow
from instantbooth.miniature.corpus import class_noun_of, draw_noun, identity_of, subject_seed
from instantbooth.miniature.world import SIZE, Picture, Scene, caption_of, render
from instantbooth.prompts import SUBJECT_FIELD
from instantbooth.storage import ObjectStore

SPLIT = "demo"
FIRST_SUBJECT = 1_000_000
"""Subjects of the manifest are numbered from here, those of the pairs from 0: no picture shows both."""

Wanted = Mapping[str, str]

PROMPTS: tuple[Mapping[str, Wanted], ...] = (
    {
        "background": {"style": "photo", "background": "beach"},
        "style": {"style": "watercolor", "background": "forest"},
        "composition": {"style": "photo", "clothing": "red", "headwear": "top hat", "background": "snow"},
        "composition and action": {"style": "photo", "clothing": "yellow", "action": "waving", "background": "moon"},
    },
    {
        "background": {"style": "photo", "background": "city at night"},
        "style": {"style": "pencil drawing", "background": "living room"},
        "composition": {"style": "photo", "clothing": "blue", "headwear": "crown", "background": "desert"},
        "composition and action": {
            "style": "photo",
            "clothing": "green",
            "action": "holding a balloon",
            "background": "flower meadow",
        },
    },
    {
        "background": {"style": "photo", "background": "flower meadow"},
        "style": {"style": "pixel art", "background": "city at night"},
        "composition": {"style": "photo", "clothing": "white", "headwear": "straw hat", "background": "beach"},
        "composition and action": {
            "style": "photo",
            "clothing": "purple",
            "action": "reading a book",
            "background": "forest",
        },
    },
)
"""Kind of prompt → the attributes it names; one set for each subject, in turn by SUBJECTS_PER_SET."""
SUBJECTS_PER_SET = 8


def write_pairs(store: ObjectStore, prefix: str, count: int) -> Iterator[int]:
    """Writes `count` pairs of as many subjects, with masks, and six unusable ones, as an image folder under `prefix`.

    Yields the number of each pair as it is done; metadata.jsonl comes last.
    """
    lines = []
    for number in range(count):
        seed = subject_seed(SPLIT, number)
        rng = np.random.default_rng([seed, 1])
        noun = draw_noun(seed, rng)
        scene = Scene.sample(rng)
        picture = render(identity_of(seed), scene)
        lines.append(_write_pair(store, prefix, f"{number:05d}", picture, scene.caption(noun, rng)))
        yield number
    lines += _write_unusable(store, prefix)
    store.put(f"{prefix}/metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def write_manifest(store: ObjectStore, prefix: str, *, subjects: int, references: int) -> Iterator[int]:
    """Writes photos with masks of subjects that no pair shows, and `prefix`/manifest.jsonl with four prompts for each.

    The subjects are bare-headed and busy with nothing, in different places and clothes. A row's metadata carries the
    subject's seed and, prompt by prompt, the attributes wanted. Yields the number of each subject as it is done.
    """
    rows = []
    for number in range(subjects):
        seed = subject_seed(SPLIT, FIRST_SUBJECT + number)
        identity, noun = identity_of(seed), class_noun_of(seed)
        rng = np.random.default_rng([seed, 2])
        images, masks = [], []
        for reference in range(references):
            scene = replace(Scene.sample(rng), style="photo", headwear="none", action="none")
            picture = render(identity, scene)
            key = f"{prefix}/references/{number:03d}-{reference}"
            store.put(f"{key}.png", encode_png(picture.image))
            store.put(f"{key}-mask.png", encode_png(picture.mask))
            images.append(store.uri(f"{key}.png"))
            masks.append(store.uri(f"{key}-mask.png"))
        kinds = PROMPTS[number // SUBJECTS_PER_SET % len(PROMPTS)]
        row = ManifestRow(
            id=f"{noun}-{number:03d}",
            images=tuple(images),
            masks=tuple(masks),
            class_noun=noun,
            prompts=tuple(caption_of(wanted, SUBJECT_FIELD) for wanted in kinds.values()),
            metadata={
                "seed": seed,
                "kinds": list(kinds),
                "wanted": [{"subject": noun, **wanted} for wanted in kinds.values()],
            },
        )
        rows.append(row.to_json() + "\n")
        yield number
    store.put(f"{prefix}/manifest.jsonl", "".join(rows).encode())


def _write_unusable(store: ObjectStore, prefix: str) -> list[dict[str, str]]:
    """What every collection of pictures holds: each pair breaks one rule of curation."""
    seed = subject_seed(SPLIT, FIRST_SUBJECT - 1)
    picture = render(identity_of(seed), Scene())
    caption = caption_of({"style": "photo", "background": "beach"}, class_noun_of(seed))
    small, large = Image.new("L", (SIZE, SIZE)), Image.new("L", (SIZE, SIZE), 255)
    small.paste(255, (0, 0, 8, 8))
    lines = [
        _write_pair(store, prefix, "truncated", picture, caption),
        _write_pair(store, prefix, "unnamed", picture, "a photo of a bicycle at the beach"),
        _write_pair(store, prefix, "several", picture, "a photo of a man and a woman at the beach"),
        _write_pair(store, prefix, "small", Picture(image=picture.image, mask=small), caption),
        _write_pair(store, prefix, "large", Picture(image=picture.image, mask=large), caption),
        _write_pair(store, prefix, "present", picture, caption) | {"mask_file_name": "masks/absent.png"},
    ]
    store.put(f"{prefix}/images/truncated.png", encode_png(picture.image)[:600])
    return lines


def _write_pair(store: ObjectStore, prefix: str, name: str, picture: Picture, text: str) -> dict[str, str]:
    line = {"file_name": f"images/{name}.png", "mask_file_name": f"masks/{name}.png", "text": text}
    store.put(f"{prefix}/{line['file_name']}", encode_png(picture.image))
    store.put(f"{prefix}/{line['mask_file_name']}", encode_png(picture.mask))
    return line
