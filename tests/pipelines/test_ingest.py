"""Curation: what is kept is right, what is dropped is counted with its reason, and nothing else is lost."""

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from instantbooth.errors import ParameterError, StorageError
from instantbooth.images import decode_image, mask_coverage
from instantbooth.miniature.samples import write_pairs
from instantbooth.storage import FileStore
from pipelines.ingest import SCHEMA, Dropped, IngestConfig, find_noun, ingest, read_report


@pytest.mark.usefixtures("ray_session")
def test_every_pair_is_kept_in_a_shard_or_dropped_with_its_reason(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    list(write_pairs(store, "pairs", 40))
    store.put("pairs/metadata.jsonl", store.get("pairs/metadata.jsonl") + b"not JSON\n\n")
    output = f"{tmp_path}/curated"
    report = ingest(IngestConfig(source=f"{tmp_path}/pairs", output=output, rows_per_shard=16, rows_per_group=8))

    assert report == read_report(output)
    assert report.read == 40 + 6 + 1 == report.kept + sum(report.dropped.values())
    assert (
        report.dropped.items()
        >= {
            "bad metadata": 1,
            "no class noun": 1,
            "several subjects": 1,
            "unreadable file": 1,
            "unusable image or mask": 1,
        }.items()
    )
    drops = [json.loads(line) for line in store.get("curated/dropped.jsonl").splitlines()]
    assert len(drops) == report.read - report.kept
    assert all(drop["reason"] and drop["detail"] for drop in drops)

    files = [pq.ParquetFile(io.BytesIO(store.get(f"curated/{shard}"))) for shard in report.shards]
    rows = [row for file in files for row in file.read().to_pylist()]
    assert len(rows) == len({row["id"] for row in rows}) == report.kept
    assert len(files) == 3
    assert max(file.num_row_groups for file in files) == 2
    for row in rows:
        assert set(row) == set(SCHEMA.names)
        assert row["caption"].count("{subject}") == 1
        mask = decode_image(row["mask"]).convert("L")
        assert mask.size == decode_image(row["image"]).size
        assert 0.1 <= mask_coverage(mask) <= 0.7


def test_a_noun_is_a_whole_word_and_the_only_one() -> None:
    assert find_noun("a man reading a manual in a catamaran") == "man"
    for caption, reason in {"a catalogue of manners": "no class noun", "a cat and a boy": "several subjects"}.items():
        with pytest.raises(Dropped) as dropped:
            find_noun(caption)
        assert dropped.value.reason == reason


def test_bad_configurations_and_unfinished_data_sets_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="coverage must rise"):
        IngestConfig(source="a", output="b", min_coverage=0.7, max_coverage=0.1)
    with pytest.raises(StorageError, match=r"no dataset\.json"):
        read_report(str(tmp_path))
    with pytest.raises(StorageError, match=r"metadata\.jsonl"):
        ingest(IngestConfig(source=str(tmp_path), output=f"{tmp_path}/out"))
