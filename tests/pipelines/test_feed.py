"""The feed hands over the same examples whenever it starts and however many workers share them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from instantbooth.errors import StorageError
from instantbooth.storage import FileStore
from instantbooth.training.adapters import ExamplePreparer
from pipelines.feed import Shards, TrainingFeed, sample_name
from tests.curated import write_curated

ROWS = 20


@pytest.mark.usefixtures("ray_session")
def test_a_feed_taken_up_later_or_shared_gives_the_same_batches(tmp_path: Path, tiny: Path) -> None:
    ids = write_curated(FileStore(tmp_path), ROWS)
    feed = TrainingFeed(
        shards=Shards.of(str(tmp_path)),
        prepare=ExamplePreparer.for_model(str(tiny / "base"), str(tiny / "clip")),
        seed=0,
        batch_size=8,
    )
    whole = list(feed.batches(0, 10))
    assert len(whole) == 10
    samples = [sample_name(sample) for batch in whole for sample in batch["sample"].tolist()]
    for epoch in range(4):
        assert sorted(samples[ROWS * epoch : ROWS * (epoch + 1)]) == sorted(row[:15] for row in ids)

    later = list(feed.batches(6, 10))
    shares = [list(feed.batches(6, 10, rank=rank, world=2)) for rank in range(2)]
    for number, batch in enumerate(whole[6:]):
        assert all(torch.equal(batch[name], later[number][name]) for name in batch)
        assert all(torch.equal(batch[name], torch.cat([share[number][name] for share in shares])) for name in batch)


def test_a_data_set_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no manifest\.json in"):
        Shards.of(str(tmp_path))
