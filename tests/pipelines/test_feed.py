"""The feed hands over the same examples whenever it starts and however many workers share them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from instantbooth.errors import StorageError, TrainingError
from instantbooth.prompts import PLACEHOLDER_TOKEN
from instantbooth.storage import FileStore
from instantbooth.training.adapters import ExamplePreparer
from pipelines import feed
from pipelines.curation.precompute import Precomputed
from pipelines.feed import Shards, TrainingFeed, first_examples, sample_name
from pipelines.ingest import caption_rules
from tests.curated import write_curated

ROWS = 20


def feed_of(folder: Path, tiny: Path, replaced_backgrounds: float) -> TrainingFeed:
    return TrainingFeed(
        shards=Shards.of(str(folder)),
        prepare=ExamplePreparer.for_model(str(tiny / "base"), str(tiny / "clip")),
        seed=0,
        batch_size=8,
        replaced_backgrounds=replaced_backgrounds,
    )


@pytest.mark.usefixtures("ray_session")
def test_a_feed_taken_up_later_or_shared_gives_the_same_batches(tmp_path: Path, tiny: Path) -> None:
    ids = write_curated(FileStore(tmp_path), ROWS)
    training = feed_of(tmp_path, tiny, 0.5)
    whole = list(training.batches(0, 10))
    assert len(whole) == 10
    samples = [sample_name(sample) for batch in whole for sample in batch["sample"].tolist()]
    for epoch in range(4):
        assert sorted(samples[ROWS * epoch : ROWS * (epoch + 1)]) == sorted(row[:15] for row in ids)

    later = list(training.batches(6, 10))
    shares = [list(training.batches(6, 10, rank=rank, world=2)) for rank in range(2)]
    for number, batch in enumerate(whole[6:]):
        assert all(torch.equal(batch[name], later[number][name]) for name in batch)
        assert all(torch.equal(batch[name], torch.cat([share[number][name] for share in shares])) for name in batch)


def test_references_stand_before_other_rows_as_often_as_is_asked(tmp_path: Path, tiny: Path) -> None:
    write_curated(FileStore(tmp_path), ROWS)

    def dark(share: float) -> list[float]:
        """How much of each reference is black."""
        training = feed_of(tmp_path, tiny, share)
        examples = [training.at(training.order(), position) for position in range(ROWS)]
        return [float((each["reference_pixels"].max(axis=0) < 5).mean()) for each in examples]

    never, sometimes, always = (dark(share) for share in (0.0, 0.5, 1.0))
    assert np.mean(always) < 0.5 * np.mean(never)
    same = [a == b for a, b in zip(sometimes, always, strict=True)]
    assert 0.2 < np.mean(same) < 0.8
    training = feed_of(tmp_path, tiny, 1.0)
    validation, plain = (first_examples(each, 2) for each in (training, feed_of(tmp_path, tiny, 0.0)))
    assert torch.equal(validation["reference_pixels"], plain["reference_pixels"]), "losses compare over trainings"


def test_a_shard_that_was_altered_is_told(tmp_path: Path) -> None:
    write_curated(FileStore(tmp_path), 2)
    (path,) = (tmp_path / "train").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"000\.parquet is not what the manifest says"):
        next(Shards.of(str(tmp_path)).read_rows())


def test_columns_of_another_base_or_word_are_refused(tmp_path: Path, tiny: Path) -> None:
    base, store = tiny / "base", FileStore(tmp_path)

    def check(precomputed: Precomputed | None) -> None:
        write_curated(store, 1, precomputed=precomputed)
        Shards.of(str(tmp_path)).check_precomputed(base, PLACEHOLDER_TOKEN)

    with pytest.raises(TrainingError, match="nothing precomputed; ingest with precompute"):
        check(None)
    with pytest.raises(TrainingError, match="placeholder 'xyz', training says 'sks'"):
        check(Precomputed.by(base, "xyz"))
    with pytest.raises(TrainingError, match="by another base than"):
        check(Precomputed(base="0" * 64, placeholder=PLACEHOLDER_TOKEN))
    check(Precomputed.by(base, PLACEHOLDER_TOKEN))


@pytest.mark.usefixtures("ray_session")
def test_captions_that_would_end_a_training_are_told_before_it_starts(tmp_path: Path, tiny: Path) -> None:
    base = tiny / "base"
    caption = "very " * 30 + "nice {subject}"
    (name, *_) = write_curated(FileStore(tmp_path / "long"), 3, rows_per_shard=2, caption=caption)
    with pytest.raises(TrainingError, match=rf"^3 of 3 pairs .* row {name} of \S*/000\.parquet: .* again with base"):
        Shards.of(f"{tmp_path}/long").check_captions(base, PLACEHOLDER_TOKEN)
    write_curated(FileStore(tmp_path / "short"), 3)
    unread = Shards.of(f"{tmp_path}/short")
    unread.check_captions(base, PLACEHOLDER_TOKEN)
    with pytest.raises(TrainingError, match=r"3 of 3 pairs .* holds the placeholder token 'photo' itself"):
        unread.check_captions(base, "photo")
    checked = replace(unread, uris=("file:///gone.parquet",), captions=caption_rules(base, PLACEHOLDER_TOKEN))
    checked.check_captions(base, PLACEHOLDER_TOKEN)
    with pytest.raises(StorageError, match=r"cannot read file:///gone\.parquet"):
        checked.check_captions(base, "photo")


def test_what_a_process_holds_of_shards_is_bounded_by_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_curated(FileStore(tmp_path), 4, rows_per_shard=1)
    shards = Shards.of(str(tmp_path))
    monkeypatch.setattr(feed, "_held", OrderedDict())
    held = [feed._shard(uri, digest) for uri, digest in zip(shards.uris, shards.digests, strict=True)]
    assert list(feed._held) == list(shards.uris)
    monkeypatch.setattr(feed, "HELD_BYTES", 2 * max(table.nbytes for table in held))
    del feed._held[shards.uris[0]]
    feed._shard(shards.uris[0], shards.digests[0])
    assert list(feed._held) == [shards.uris[3], shards.uris[0]]


def test_a_data_set_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no manifest\.json in"):
        Shards.of(str(tmp_path))


@pytest.mark.parametrize(
    "content", ['{"files"', "[]", "null", '{"name": "an app"}', '{"files": [{"key": "a"}]}', b"\xff"]
)
def test_a_manifest_of_something_else_is_named(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StorageError, match=r"manifest\.json in \S* is damaged, or no ingestion's .* ingest again"):
        Shards.of(str(tmp_path))
