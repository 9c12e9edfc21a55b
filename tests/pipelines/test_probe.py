"""What a training shows of itself."""

from __future__ import annotations

from pathlib import Path

from instantbooth import Personalizer
from instantbooth.storage import FileStore
from pipelines.curation.shards import VALIDATION
from pipelines.feed import Shards
from pipelines.probe import validation_pictures
from tests.curated import write_curated


def test_pictures_are_made_of_subjects_whose_nouns_only_the_ingestion_knows(
    tmp_path: Path, booth: Personalizer
) -> None:
    write_curated(FileStore(tmp_path), 1, validation=2, noun="tabby")
    sheet = validation_pictures(booth, Shards.of(str(tmp_path), VALIDATION), 2)
    assert sheet is not None
    assert sheet.size == (2 * booth.base.image_size, 2 * booth.base.image_size)
