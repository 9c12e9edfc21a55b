"""What a manifest comes to, and how it is carried."""

from __future__ import annotations

import json
import random
import tracemalloc
from dataclasses import replace

from instantbooth.ledger import digest_of
from instantbooth.manifest import ManifestRow
from pipelines.plan import ModelIdentity, Settled, Task, concept_key, packed, pieces, unpacked

MODEL = ModelIdentity(base="miniature", image_encoder=None, weights="0" * 64, config="1" * 64)
ROW = ManifestRow(
    id="ada", images=("s3://in/ada.jpg",), class_noun="person", prompts=("a {subject}", "the {subject}"), seed=7
)


def test_ids_change_with_what_determines_a_picture_and_with_nothing_else() -> None:
    works = [piece.work for piece in pieces(ROW, MODEL)]
    assert [piece.work for piece in pieces(replace(ROW, metadata={"order": 1}), MODEL)] == works
    for changed in (
        replace(ROW, seed=8),
        replace(ROW, images=("s3://in/ada-2.jpg",)),
        replace(ROW, num_inference_steps=30),
        replace(ROW, attempt=1),
    ):
        assert not set(works) & {piece.work for piece in pieces(changed, MODEL)}
    assert not set(works) & {piece.work for piece in pieces(ROW, replace(MODEL, image_format="webp"))}
    tuned = replace(MODEL, config="2" * 64)
    assert not set(works) & {piece.work for piece in pieces(ROW, tuned)}
    assert concept_key(ROW, tuned) == concept_key(ROW, MODEL) != concept_key(ROW, replace(MODEL, patch_layer=-2))
    half = replace(MODEL, precision="bf16")
    assert not set(works) & {piece.work for piece in pieces(ROW, half)}
    assert concept_key(ROW, half) != concept_key(ROW, MODEL)
    one = pieces(replace(ROW, prompts=(ROW.prompts[0], "a drawing of a {subject}")), MODEL)
    assert [piece.work in works for piece in one] == [True, False]
    assert concept_key(replace(ROW, prompts=("a {subject}",), id="eve"), MODEL) == concept_key(ROW, MODEL)


def test_settled_works_are_known_and_others_are_not() -> None:
    works = [digest_of("item", number) for number in range(2000)]
    settled = Settled(random.Random(0).sample(works[:1000], 1000))
    assert [work in settled for work in works] == [True] * 1000 + [False] * 1000
    assert works[0] not in Settled(["not-an-id", "x" * 32, " " * 32])


def test_a_manifest_is_carried_whole_in_a_fraction_of_its_memory() -> None:
    tasks = [
        Task(row=replace(ROW, id=f"subject-{n}", metadata={"note": "x" * 400}), missing=(0, 1)) for n in range(500)
    ]
    tracemalloc.start()
    chunks = list(packed(tasks, 8))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert [task for chunk in chunks for task in unpacked(chunk)] == tasks
    assert held < 0.4 * sum(len(json.dumps(json.loads(task.row.to_json()))) for task in tasks)
