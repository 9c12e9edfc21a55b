"""Curation: what is kept is right, what is dropped is counted with its reason, and nothing else is lost."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from moto.server import ThreadedMotoServer
from PIL import Image, ImageDraw
from transformers import (
    EomtConfig,
    EomtForUniversalSegmentation,
    EomtImageProcessorPil,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from instantbooth.errors import ConditionalWriteError, ParameterError, StorageError, WeightsError
from instantbooth.images import decode_image, mask_coverage
from instantbooth.miniature.corpus import class_noun_of, identity_of, subject_seed
from instantbooth.miniature.world import Scene, render
from instantbooth.model import segmentation
from instantbooth.model.base import BaseModel, load_tokenizer
from instantbooth.model.encoders import resize_to_tensor
from instantbooth.model.segmentation import silhouette, working_size
from instantbooth.presets import miniature_folder
from instantbooth.prompts import expand, tokenize_subject
from instantbooth.storage import FileStore, ObjectStore, open_store
from pipelines.curation.duplicates import find_duplicates, look_of
from pipelines.curation.lists import csv_lines, json_lines
from pipelines.curation.pairs import Dropped, Pair, Reason, Slice
from pipelines.curation.segment import SubjectFinder, load_model
from pipelines.curation.shards import SCHEMA, stage, staged_key
from pipelines.curation.sources import Columns, plan, read_slices, text_of
from pipelines.curation.steps import Rules, decode, judge_mask, name_subject, part_areas
from pipelines.curation.tars import tar_samples
from pipelines.ingest import IngestConfig, IngestReport, ingest

PAIRS = 387
SEGMENTER = str(miniature_folder() / "segmenter")


@dataclass(frozen=True, kw_only=True)
class Raw:
    """A pair as a source holds it; None: the source has no such thing."""

    name: str
    image: bytes | None
    mask: bytes | None
    caption: bytes
    reason: Reason | None = None
    """Why curation must drop it."""


@pytest.fixture(scope="module")
def good() -> list[Raw]:
    """Pairs that must be kept, no two of which show the same."""
    return [rendered(number) for number in range(PAIRS)]


@pytest.fixture(scope="module")
def rotten(good: list[Raw]) -> list[Raw]:
    """What can be wrong with a pair in every kind of source, 3 % of all."""
    first = good[0]
    assert first.image
    assert first.mask

    def wrong(name: str, reason: Reason, **changes: object) -> Raw:
        return replace(rendered(PAIRS + len(name)), name=name, reason=reason, **changes)

    return [
        wrong("cut", Reason.UNUSABLE_IMAGE, image=first.image[:700]),
        wrong("mislabelled", Reason.UNUSABLE_IMAGE, image=b"<html>404 Not Found</html>"),
        wrong("bomb", Reason.UNUSABLE_IMAGE, image=bomb()),
        wrong("speechless", Reason.NO_CAPTION, caption=b" \t "),
        wrong("latin-1", Reason.BAD_TEXT, caption="a man in a café".encode("latin-1")),
        wrong("dotless", Reason.NO_NOUN, caption="a gırl".encode()),
        wrong("crowd", Reason.SEVERAL_NAMED, caption=b"a man and a woman at the beach"),
        wrong("placeholder", Reason.UNUSABLE_CAPTION, caption=b"a photo of a sks person"),
        wrong("mask-of-another-size", Reason.UNUSABLE_MASK, mask=png(Image.new("L", (32, 32), 255))),
        wrong("mask-of-nothing", Reason.UNUSABLE_MASK, mask=png(Image.new("L", (64, 64)))),
        wrong("two-subjects", Reason.SEVERAL_PICTURED, mask=boxes((4, 4, 24, 60), (40, 4, 60, 60))),
        replace(first, name="again", reason=Reason.EXACT_DUPLICATE),
        replace(shrunk(good[1]), name="alike", reason=Reason.NEAR_DUPLICATE),
    ]


def rendered(number: int) -> Raw:
    """A picture of a subject and scene of its own."""
    seed = subject_seed("demo", number)
    rng = np.random.default_rng([seed, 1])
    scene = Scene.sample(rng)
    picture = render(identity_of(seed), scene)
    caption = scene.caption(class_noun_of(seed), rng).encode()
    return Raw(name=f"{number:05d}", image=png(picture.image), mask=png(picture.mask), caption=caption)


def shrunk(pair: Raw) -> Raw:
    """The same picture, smaller and as a JPEG."""
    assert pair.image
    assert pair.mask
    image, mask = (Image.open(io.BytesIO(data)).resize((56, 56)) for data in (pair.image, pair.mask))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return replace(pair, image=buffer.getvalue(), mask=png(mask))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def boxes(*corners: tuple[int, int, int, int]) -> bytes:
    mask = Image.new("L", (64, 64))
    for box in corners:
        ImageDraw.Draw(mask).rectangle(box, fill=255)
    return png(mask)


def bomb() -> bytes:
    """A few bytes that claim to be a picture of ten thousand million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def tar_of(pairs: Sequence[Raw]) -> bytes:
    """A WebDataset shard as img2dataset writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for pair in pairs:
            description = json.dumps({"caption": pair.caption.decode("latin-1"), "status": "success"}).encode()
            files = {"jpg": pair.image, "mask.png": pair.mask, "json": description, "txt": pair.caption}
            for suffix, data in files.items():
                if data is not None:
                    member = tarfile.TarInfo(f"{pair.name}.{suffix}")
                    # A fraction of a second needs an extended header of its own.
                    member.size, member.mtime = len(data), 1.5
                    tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_tars(store: ObjectStore, pairs: Sequence[Raw]) -> Counter[Reason]:
    """Three tars, of which one is cut short and one has a damaged header, and one that is none."""
    third = len(pairs) // 3
    victim = rendered(2 * PAIRS)
    store.put("00000.tar", tar_of(pairs[:third]))
    damaged = bytearray(tar_of([victim, *pairs[third : 2 * third]]))
    damaged[1024:1536] = b"\xff" * 512
    store.put("00001.tar", bytes(damaged))
    end = len(tar_of(pairs[2 * third :]).rstrip(b"\0"))
    store.put("00002.tar", tar_of([*pairs[2 * third :], victim])[: end + 3000])
    store.put("00003.tar", b"<html>404 Not Found</html>")
    store.put("00000.parquet", b"img2dataset's own record of a shard")
    return Counter({Reason.DAMAGED: 3, Reason.NO_IMAGE: 1})


def write_parquet(store: ObjectStore, pairs: Sequence[Raw]) -> Counter[Reason]:
    """A file with bytes, one with Hugging Face's structs, one of URIs, and one that is cut short."""
    captions = pa.array([pair.caption for pair in pairs], pa.binary()).view(pa.string())
    masks = pa.array([pair.mask for pair in pairs], pa.binary())
    images = [pair.image for pair in pairs]
    structs = [{"bytes": image, "path": None} for image in images]
    third = len(pairs) // 3
    for pair in pairs[2 * third :]:
        store.put(f"images/{pair.name}.png", pair.image or b"")
    uris = [store.uri(f"images/{pair.name}.png") for pair in pairs]
    parts = {"bytes": ("jpg", images), "structs": ("image", structs), "uris": ("uri", uris)}
    for number, (name, (column, values)) in enumerate(parts.items()):
        part = slice(number * third, (number + 1) * third if number < 2 else None)
        table = pa.table({column: values[part], "mask": masks[part], "caption": captions[part]})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=40)
        store.put(f"{name}.parquet", buffer.getvalue())
    store.put("cut.parquet", store.get("bytes.parquet")[:5000])
    return Counter({Reason.DAMAGED: 1})


def write_files(store: ObjectStore, pairs: Sequence[Raw]) -> Iterator[tuple[str, str, bytes]]:
    """The pairs as files: image, mask, caption."""
    for pair in pairs:
        image, mask = f"images/{pair.name}.png", f"masks/{pair.name}.png"
        store.put(image, pair.image or b"")
        store.put(mask, pair.mask or b"")
        yield image, mask, pair.caption


def write_folder(store: ObjectStore, pairs: Sequence[Raw]) -> Counter[Reason]:
    """An image folder in Hugging Face's form, and lines that are none."""
    lines = [
        b'{"file_name": "%s", "mask_file_name": "%s", "text": "%s"}' % (image.encode(), mask.encode(), caption)
        for image, mask, caption in write_files(store, pairs)
    ]
    image, mask = b"images/00000.png", b"masks/00000.png"
    lines.insert(7, b'{"file_name": "images/absent.png", "mask_file_name": "%s", "text": "a man"}' % mask)
    lines.insert(9, b'{"file_name": "../../etc/passwd", "mask_file_name": "%s", "text": "a man"}' % mask)
    lines.insert(50, b'{"file_name": "%s", "mask_file_name": "masks/absent.png", "text": "a man"}' % image)
    lines.insert(70, b'{"file_name": "images/0')
    lines.insert(90, b'["a man"]')
    lines.insert(91, b'{"file_name": "%s", "mask_file_name": "%s", "text": 7}' % (image, mask))
    lines.insert(92, b'{"file_name": "%s", "mask_file_name": "%s", "text": "a \\ud800 man"}' % (image, mask))
    store.put("metadata.jsonl", b"\n".join(line.replace(b"\t", b"\\t") for line in lines))
    return Counter({Reason.UNREADABLE: 2, Reason.BAD_METADATA: 4, Reason.BAD_TEXT: 1})


def write_list(store: ObjectStore, pairs: Sequence[Raw]) -> Counter[Reason]:
    """A CSV list of URIs, and lines that are none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["uri", "mask_uri", "caption"])
    for image, mask, caption in write_files(store, pairs):
        writer.writerow([store.uri(image), store.uri(mask), caption.decode("utf-8", "surrogateescape")])
    lines = text.getvalue().encode("utf-8", "surrogateescape").splitlines()
    lines.insert(5, b'a.png,b.png,"a man with an open quote')
    lines.insert(6, b"a.png,b.png")
    lines.insert(60, b"https://example.org/a.png,b.png,a man")
    store.put("pairs.csv", b"\n".join(lines) + b"\n\n")
    return Counter({Reason.BAD_METADATA: 3})


def curate(source: str, output: str, **options: object) -> IngestReport:
    rules = Rules(min_side=48)
    return ingest(IngestConfig(source=source, output=output, **{"rules": rules, "rows_per_shard": 64} | options))


def rows_of(output: str, report: IngestReport) -> list[dict[str, object]]:
    store = open_store(output)
    files = [store.get(shard) for shard in report.shards + report.validation_shards]
    return [row for data in files for row in pq.read_table(io.BytesIO(data)).to_pylist()]


def dropped_of(output: str) -> list[dict[str, str]]:
    store = open_store(output)
    listed = [entry["key"] for entry in json.loads(store.get("manifest.json"))["files"] if not entry["split"]]
    return [json.loads(line) for key in listed for line in store.get(key).splitlines()]


def data_set(output: str) -> dict[str, bytes]:
    """The files of the manifest."""
    store = open_store(output)
    files = json.loads(store.get("manifest.json"))["files"]
    contents = {entry["key"]: store.get(entry["key"]) for entry in files}
    assert all(hashlib.sha256(contents[entry["key"]]).hexdigest() == entry["sha256"] for entry in files)
    return contents


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("write", [write_tars, write_parquet, write_folder, write_list])
def test_three_percent_of_rot_cost_nothing_good_and_are_all_reported(
    write: Callable[[ObjectStore, Sequence[Raw]], Counter[Reason]],
    good: list[Raw],
    rotten: list[Raw],
    tmp_path: Path,
) -> None:
    assert len(rotten) / (len(good) + len(rotten)) >= 0.03
    pairs = [*good]
    for number, pair in enumerate(rotten):
        pairs.insert(17 + 31 * number, pair)
    store = FileStore(tmp_path / "source")
    expected = write(store, pairs) + Counter(pair.reason for pair in rotten)
    output = str(tmp_path / "output")
    report = curate(str(store.root), output)

    assert report == IngestReport(**json.loads(open_store(output).get("report.json")))
    assert report.dropped == {reason.value: count for reason, count in expected.items()}
    assert report.kept == len(good) == report.read - sum(report.dropped.values())
    assert report.processed == report.read
    dropped = dropped_of(output)
    assert Counter(line["reason"] for line in dropped) == report.dropped
    assert all(line["source"] and line["name"] and line["detail"] for line in dropped)

    kept = {row["image"]: row for row in rows_of(output, report)}
    assert kept.keys() == {pair.image for pair in good}
    for pair in good:
        row = kept[pair.image]
        assert set(row) == set(SCHEMA.names)
        assert row["caption"].replace("{subject}", row["noun"]).encode() == pair.caption
        mask = decode_image(row["mask"]).convert("L")
        assert mask.tobytes() == Image.open(io.BytesIO(pair.mask or b"")).convert("L").tobytes()
        assert 0.1 <= mask_coverage(mask) <= 0.7
    assert report.splits == {
        "train": len(good) - report.splits["validation"],
        "validation": report.splits["validation"],
    }
    assert 0 < report.splits["validation"] < 0.06 * len(good)

    page = (tmp_path / "output/report.html").read_text()
    assert all(f"{reason}: {count}" in page for reason, count in report.dropped.items())
    assert page.count("data:image/jpeg") > 12
    assert "<script" not in page


@pytest.mark.usefixtures("ray_session")
def test_a_grown_source_costs_only_what_is_new_and_ends_as_if_read_at_once(good: list[Raw], tmp_path: Path) -> None:
    store = FileStore(tmp_path / "source")
    store.put("0.tar", tar_of([*good[:20], shrunk(good[30])]))
    before = curate(str(store.root), f"{tmp_path}/grown", rows_per_shard=8)
    store.put("1.tar", tar_of(good[20:40]))
    after = curate(str(store.root), f"{tmp_path}/grown", rows_per_shard=8)
    at_once = curate(str(store.root), f"{tmp_path}/at-once", rows_per_shard=8)

    assert (before.kept, before.processed) == (21, 21)
    assert (after.kept, after.processed, after.dropped) == (40, 20, {Reason.NEAR_DUPLICATE: 1})
    assert len(set(before.shards + before.validation_shards) & {*after.shards, *after.validation_shards}) >= 2
    assert replace(at_once, processed=20, seconds=0.0) == replace(after, seconds=0.0)
    assert data_set(f"{tmp_path}/grown") == data_set(f"{tmp_path}/at-once")


@pytest.mark.usefixtures("ray_session")
def test_whatever_a_killed_run_left_the_next_one_ends_the_same(good: list[Raw], tmp_path: Path) -> None:
    store = FileStore(tmp_path / "source")
    write_tars(store, [*good[:24], replace(good[3], name="again")])
    whole = FileStore(tmp_path / "whole")
    curate(str(store.root), str(whole.root), rows_per_shard=8)
    expected = data_set(str(whole.root))
    # Objects are written at once: a run killed anywhere leaves some of them, whole, and reports come last.
    for seed, share in enumerate((0.2, 0.8)):
        rng = np.random.default_rng(seed)
        output = FileStore(tmp_path / f"killed-{seed}")
        for key in whole.list():
            if not key.startswith(("report", "manifest")) and rng.random() < share:
                output.put(key, whole.get(key))
        curate(str(store.root), str(output.root), rows_per_shard=8)
        assert data_set(str(output.root)) == expected
        assert output.get("manifest.json") == whole.get("manifest.json")


@pytest.mark.usefixtures("ray_session")
def test_a_file_that_was_missing_is_tried_again(good: list[Raw], tmp_path: Path) -> None:
    store = FileStore(tmp_path / "source")
    write_folder(store, good[:40])
    late = store.root / "images/00003.png"
    late.rename(tmp_path / "late")
    before = curate(str(store.root), f"{tmp_path}/output")
    (tmp_path / "late").rename(late)
    after = curate(str(store.root), f"{tmp_path}/output")
    assert (after.kept, after.read) == (before.kept + 1, before.read)


@pytest.mark.usefixtures("ray_session")
def test_a_data_set_is_not_replaced_by_what_nobody_can_want(good: list[Raw], tmp_path: Path) -> None:
    store = FileStore(tmp_path / "source")
    lines = [f"{image},{mask},{caption.decode()}" for image, mask, caption in write_files(store, good[:4])]
    store.put("pairs.csv", "\n".join(["image,mask,caption", *lines]).encode())
    curate(str(store.root), f"{tmp_path}/output")
    before = data_set(f"{tmp_path}/output")
    with pytest.raises(StorageError, match=r"none of 4 pairs is kept \(4 no caption\); look at --columns"):
        curate(str(store.root), f"{tmp_path}/output", columns=Columns(caption="txet"))
    (store.root / "images").rename(tmp_path / "away")
    with pytest.raises(StorageError, match="4 of 4 pairs cannot be read, the first"):
        curate(str(store.root), f"{tmp_path}/output", rows_per_shard=2)
    assert data_set(f"{tmp_path}/output") == before


@pytest.mark.full
def test_the_job_gives_the_same_shards_from_s3_as_from_a_folder(
    good: list[Raw], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    local = FileStore(tmp_path / "source")
    write_tars(local, good[:20])
    curate(str(local.root), f"{tmp_path}/output", rows_per_shard=8)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="pairs")
        write_tars(open_store("s3://pairs/raw"), good[:20])
        # A Ray of its own: workers have the AWS_* settings that they were started with.
        command = (
            "-m jobs.ingest --source s3://pairs/raw --output s3://pairs/curated --rules.min-side 48 --rows-per-shard 8"
        )
        done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "kept 20 of 24 pairs" in done.stdout
        assert data_set("s3://pairs/curated") == data_set(f"{tmp_path}/output")
    finally:
        server.stop()


@pytest.mark.usefixtures("ray_session")
def test_a_subject_is_found_by_transparency_or_a_model(good: list[Raw], tmp_path: Path) -> None:
    store = FileStore(tmp_path / "source")
    transparent = Image.open(io.BytesIO(good[0].image or b""))
    transparent.putalpha(Image.open(io.BytesIO(good[0].mask or b"")).convert("L"))
    bare = [replace(pair, mask=None) for pair in good[1:9]]
    store.put("0.tar", tar_of([replace(good[0], image=png(transparent), mask=None), *bare]))
    without = curate(str(store.root), f"{tmp_path}/without")
    assert (without.kept, without.dropped) == (1, {Reason.NO_MASK: 8})
    output = f"{tmp_path}/with"
    report = curate(str(store.root), output, segmenter=SEGMENTER, actor_batch=3)
    assert report.kept >= 7
    truths = {pair.image: Image.open(io.BytesIO(pair.mask or b"")) for pair in good[1:9]}
    found = [
        (decode_image(row["mask"]), truths[row["image"]]) for row in rows_of(output, report) if row["image"] in truths
    ]
    assert np.mean([overlap(mask, truth) for mask, truth in found]) > 0.8


@pytest.mark.usefixtures("ray_session")
def test_latents_and_embeddings_are_those_that_training_would_compute(
    good: list[Raw], tiny: Path, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "source")
    store.put("0.tar", tar_of([*good[:4], replace(good[4], caption=b"very " * 40 + b"tall man")]))
    output, folder = f"{tmp_path}/output", str(tiny / "base")
    report = curate(str(store.root), output, base=folder, precompute=True, validation=0.5)
    assert report.dropped == {Reason.UNUSABLE_CAPTION: 1}
    base = BaseModel.load(folder, device=torch.device("cpu"), dtype=torch.float32)
    for row in rows_of(output, report):
        pixels = resize_to_tensor(decode_image(row["image"]).convert("RGB"), base.image_size)[None] * 2 - 1
        ids, _ = tokenize_subject(base.tokenizer, expand(row["caption"], row["noun"]))
        expected = {"latents": base.encode_pixels(pixels), "prompt_embeds": base.encode_text(torch.tensor([ids]))}
        for name, value in expected.items():
            stored = np.frombuffer(row[name], np.float16).reshape(value.shape[1:])
            np.testing.assert_allclose(stored, value[0].detach().numpy(), atol=2e-3)


def overlap(one: Image.Image, other: Image.Image) -> float:
    """Intersection over union."""
    left, right = (np.asarray(mask.convert("L")) > 127 for mask in (one, other))
    return float((left & right).sum() / (left | right).sum())


def mask2former(folder: Path, labels: dict[int, str]) -> None:
    """A small one with random masks, all of them persons."""
    size = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "num_queries": 4, "num_attention_heads": 2}
    size |= {"dim_feedforward": 16, "encoder_feedforward_dim": 16, "encoder_layers": 1, "decoder_layers": 2}
    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2)
    swin.out_features = ["stage1", "stage2", "stage3", "stage4"]
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, id2label=labels, **size))
    with torch.no_grad():
        model.class_predictor.weight.zero_()
        model.class_predictor.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)


def eomt(folder: Path, labels: dict[int, str]) -> None:
    """The same of another architecture, whose processor takes other arguments."""
    torch.manual_seed(1)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_queries": 4, "num_blocks": 1}
    model = EomtForUniversalSegmentation(EomtConfig(image_size=64, patch_size=16, id2label=labels, **size))
    with torch.no_grad():
        model.class_predictor.weight.zero_()
        model.class_predictor.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
        model.query.weight.normal_()
        model.mask_head.fc3.weight.mul_(1000)
    model.save_pretrained(folder)
    EomtImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 64}, do_pad=True).save_pretrained(folder)


@pytest.mark.parametrize("write", [mask2former, eomt])
def test_a_model_of_instances_tells_subjects_apart(
    write: Callable[[Path, dict[int, str]], None], tmp_path: Path
) -> None:
    write(tmp_path, {0: "background", 1: "person", 2: "cat"})
    noise = np.random.default_rng(2).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    pair = Pair(row=0, name="a", image=png(Image.fromarray(noise)), subject="person")
    seen = load_model(tmp_path, torch.device("cpu")).subjects([Image.open(io.BytesIO(pair.image))], [{1}])[0]
    shares = sorted((float(subject.mean()) for subject in seen), reverse=True)
    assert len(shares) > 1

    def found(subject: str, second_subject: float) -> Pair:
        rules = Rules(second_subject=second_subject)
        finder = SubjectFinder(str(tmp_path), rules=rules, batch_size=2, device="cpu")
        pairs = (replace(pair, subject=subject),)
        part = Slice(unit="", source="", number=0, last=True, digest="", pairs=pairs, settled=True)
        return finder({"slice": part})["slice"].pairs[0]

    assert mask_coverage(Image.open(io.BytesIO(found("person", 1.0).mask))) == shares[0]
    assert found("person", shares[1] / shares[0] / 2).reason == Reason.SEVERAL_PICTURED
    assert found("cat", 1.0).reason == Reason.NO_SUBJECT


def test_large_pictures_are_segmented_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn((1, 5, 8, 8), generator=torch.Generator().manual_seed(0))
    exact = silhouette(scores, {1, 3}, (400, 300))
    monkeypatch.setattr(segmentation, "MAX_PIXELS", 100 * 75)
    assert working_size((400, 300)) == (100, 75)
    assert math.prod(working_size((7000, 4))) <= 100 * 75
    coarse = silhouette(scores, {1, 3}, (400, 300))
    assert coarse.shape == exact.shape == (300, 400)
    assert 0.95 < (coarse == exact).mean() < 1


def test_a_segmenter_that_is_none_is_told_before_anything_starts(good: list[Raw], tmp_path: Path) -> None:
    FileStore(tmp_path / "source").put("0.tar", tar_of(good[:1]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "oneformer").mkdir()
    (tmp_path / "oneformer/config.json").write_text('{"model_type": "oneformer"}')
    for name, reason in (("empty", "no segmentation model"), ("oneformer", "more than a picture; name one of detr")):
        with pytest.raises(WeightsError, match=reason):
            curate(f"{tmp_path}/source", f"{tmp_path}/output", segmenter=f"{tmp_path}/{name}")
    assert not (tmp_path / "output").exists()


@pytest.mark.usefixtures("ray_session")
def test_actors_that_the_cluster_will_never_have_are_refused(good: list[Raw], tiny: Path, tmp_path: Path) -> None:
    FileStore(tmp_path / "source").put("0.tar", tar_of(good[:1]))
    source, output = f"{tmp_path}/source", f"{tmp_path}/output"
    with pytest.raises(ParameterError, match=r"of 1 GPU each ask for 2 GPU.* the cluster has 0; lower actors or gpus"):
        curate(source, output, segmenter=SEGMENTER, actors=2, gpus_per_actor=1)
    with pytest.raises(ParameterError, match=r"4 actors .* ask for 5 CPU; the cluster has 4; lower actors"):
        curate(source, output, base=str(tiny / "base"), precompute=True, actors=4)
    assert not (tmp_path / "output").exists()


def test_a_noun_is_a_word_of_its_own_and_the_only_one() -> None:
    rules = Rules(nouns={"bride": "person", "puppy": "dog"})

    def named(text: str) -> Pair:
        return name_subject(Pair(row=0, name="", text=text), rules=rules)

    for text, caption, noun, subject in (
        ("a man reading a manual in a catamaran", "a {subject} reading a manual in a catamaran", "man", "person"),
        ("Portrait of a  Woman\n", "Portrait of a {subject}", "woman", "person"),
        ("a man-made lake, and a cat's toy", "a man-made lake, and a {subject}'s toy", "cat", "cat"),
        ("the bride", "the {subject}", "bride", "person"),
        ("a puppy", "a {subject}", "puppy", "dog"),
        ("a man beside a gırl", "a {subject} beside a gırl", "man", "person"),
    ):
        pair = named(text)
        assert (pair.caption, pair.noun, pair.subject) == (caption, noun, subject)
    tokenizer = load_tokenizer(miniature_folder() / "base")
    alike = name_subject(Pair(row=0, name="", text="a man and desks"), rules=rules, tokenizer=tokenizer)
    assert alike.caption == "a {subject} and desks", "whose last token is the placeholder's"
    for text, reason in {
        "a catalogue of manners": Reason.NO_NOUN,
        "GİRL power": Reason.NO_NOUN,
        "a gırl": Reason.NO_NOUN,
        "a perſon": Reason.NO_NOUN,
        "a cat and a boy": Reason.SEVERAL_NAMED,
        "\n": Reason.NO_CAPTION,
        "a {subject} man": Reason.UNUSABLE_CAPTION,
        "a man, " + "very " * 200: Reason.UNUSABLE_CAPTION,
    }.items():
        with pytest.raises(Dropped) as dropped:
            named(text)
        assert dropped.value.reason == reason


def test_why_a_pair_is_dropped_is_told_in_few_words_whatever_it_holds() -> None:
    with pytest.raises(Dropped) as dropped:
        text_of(b"a m\xffn " * 10_000)
    pair = Pair(row=0, name="").dropped(dropped.value.reason, dropped.value.detail)
    assert len(pair.detail) < 1000
    assert pair.detail.startswith(r"caption b'a m\xffn")
    assert pair.detail.endswith("save it as UTF-8")


def test_pictures_and_masks_are_judged_by_the_papers_rules() -> None:
    image = png(Image.new("RGB", (64, 64), "red"))

    def judged(**changes: bytes) -> Pair:
        pair = replace(Pair(row=0, name="a.png", image=image), **changes)
        return judge_mask(decode(pair, rules=Rules()), rules=Rules())

    assert judged(given_mask=boxes((0, 0, 31, 63))).coverage == 0.5
    for changes, reason in (
        ({"image": png(Image.new("RGB", (63, 200)))}, Reason.IMAGE_TOO_SMALL),
        ({"given_mask": b"no picture"}, Reason.UNUSABLE_MASK),
        ({"given_mask": boxes((0, 0, 15, 15))}, Reason.SUBJECT_TOO_SMALL),
        ({"given_mask": boxes((0, 0, 63, 55))}, Reason.SUBJECT_TOO_LARGE),
        ({"given_mask": boxes((0, 0, 20, 63), (40, 0, 50, 63))}, Reason.SEVERAL_PICTURED),
        ({}, Reason.NO_MASK),
    ):
        with pytest.raises(Dropped) as dropped:
            judged(**changes)
        assert dropped.value.reason == reason


def test_parts_of_a_mask_are_joined_however_they_wind() -> None:
    mask = Image.new("L", (128, 128))
    pen = ImageDraw.Draw(mask)
    for box in ((10, 10, 19, 99), (50, 10, 59, 99), (10, 90, 59, 99), (30, 10, 34, 50), (60, 100, 69, 109)):
        pen.rectangle(box, fill=255)
    assert part_areas(mask) == [900 + 900 + 300 + 100, 205]
    assert part_areas(Image.new("L", (16, 16))) == [0]


def test_duplicates_are_those_of_a_better_row_in_whatever_order_they_come() -> None:
    rng = np.random.default_rng(0)
    count, bits = 400, 8
    looks = rng.integers(0, 256, (count, 16), dtype=np.uint8)
    for row in range(0, count, 3):
        looks[row] = looks[rng.integers(count)]
        for bit in rng.integers(0, 128, rng.integers(12)):
            looks[row, bit // 8] ^= 1 << bit % 8
    pictures = np.array([f"{value:04d}" for value in rng.integers(0, 4 * count, count)], "S")
    ids = np.array([f"{value:04d}" for value in rng.permutation(count)], "S")
    pixels = rng.integers(1, 4, count)
    found = find_duplicates(pictures, looks, pixels, ids, bits)

    rank = sorted(range(count), key=lambda row: (-pixels[row], ids[row]))
    best: dict[bytes, int] = {}
    originals: list[int] = []
    for row in rank:
        assert found.exact[row] == best.setdefault(pictures[row], row) or best[pictures[row]] == row
        assert (found.exact[row] == -1) == (best[pictures[row]] == row)
        if found.exact[row] == -1:
            alike = [other for other in originals if np.bitwise_count(looks[row] ^ looks[other]).sum() <= bits]
            assert found.near[row] == (alike[0] if alike else -1)
            originals.append(row)
    assert (found.near >= 0).sum() > 20

    order = rng.permutation(count)
    again = find_duplicates(pictures[order], looks[order], pixels[order], ids[order], bits)
    assert (again.near >= 0).tolist() == (found.near[order] >= 0).tolist()


def test_copies_look_the_same_and_other_pictures_do_not(good: list[Raw]) -> None:
    looks = [np.frombuffer(look_of(Image.open(io.BytesIO(pair.image or b""))), np.uint8) for pair in good[:100]]
    copies = [
        np.frombuffer(look_of(Image.open(io.BytesIO(shrunk(pair).image or b""))), np.uint8) for pair in good[:100]
    ]
    differing = np.bitwise_count(np.array(looks)[:, None] ^ np.array(copies)[None]).sum(-1, dtype=int)
    assert np.diag(differing).max() <= 8
    assert differing[~np.eye(len(looks), dtype=bool)].min() > 16


def test_every_place_where_a_tar_can_be_cut_or_damaged_costs_what_it_touches(good: list[Raw]) -> None:
    data = tar_of(good[:3])
    whole = dict(tar_samples(io.BytesIO(data)))
    assert list(whole) == [pair.name for pair in good[:3]]
    for at in range(0, len(data) - 1024, 512):
        damaged = bytearray(data)
        damaged[at : at + 512] = b"\xff" * 512
        samples = list(tar_samples(io.BytesIO(bytes(damaged))))
        untouched = [key for key, files in samples if whole.get(key) == files]
        assert len(untouched) >= 2
        cut = list(tar_samples(io.BytesIO(data[: at + 100])))
        assert isinstance(next(files for key, files in cut if key == "the end"), Dropped)
        assert all(whole[key].items() >= files.items() for key, files in cut if key in whole)


def test_headers_that_announce_headers_without_end_are_a_damaged_part(good: list[Raw]) -> None:
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 2
    chain = (name.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")) * 2000
    before, after = tar_of(good[:1]).rstrip(b"\0"), tar_of(good[1:3])
    before += bytes(-len(before) % 512)
    samples = list(tar_samples(io.BytesIO(before + chain + after)))
    assert {good[0].name, good[2].name} <= {key for key, files in samples if not isinstance(files, Dropped)}
    (damage,) = (files for _, files in samples if isinstance(files, Dropped))
    assert "recursion depth" in damage.detail


def test_lists_lose_only_the_lines_that_are_wrong() -> None:
    text = '{"text": "a\u2028b"}\r\n\n{"text": \n[1]\n{"text": "c"}\n{"text": ' + "[" * 400 + "]" * 400 + "}"
    lines = list(json_lines(text.encode()))
    assert [line.number for line in lines] == [1, 3, 4, 5, 6]
    assert [line.record.get("text") for line in lines] == ["a\u2028b", None, None, "c", None]
    assert [line.fault is None for line in lines] == [True, False, False, True, False]

    rows = [
        "uri,caption",
        'a.png,"two\nlines, ""quoted"""',
        'b.png,"never closed',
        "c.png,plain",
        "d.png",
        'e.png,5" big',
    ]
    lines = list(csv_lines("\n".join(rows).encode(), ","))
    assert [(line.number, line.record.get("caption")) for line in lines] == [
        (2, 'two\nlines, "quoted"'),
        (4, None),
        (5, "plain"),
        (6, None),
        (7, '5" big'),
    ]


def test_sources_are_told_apart_by_their_files(good: list[Raw], tmp_path: Path) -> None:
    for write, kind, units in ((write_tars, "tar", 4), (write_parquet, "parquet", 4), (write_list, "list", 3)):
        store = FileStore(tmp_path / kind)
        write(store, good[:20])
        planned = plan(str(store.root), lines_per_unit=8)
        assert {unit.kind for unit in planned} == {kind}
        assert len(planned) == units
    # One file, and folders of any depth.
    assert len(plan(f"{tmp_path}/tar/00000.tar", lines_per_unit=8)) == 1
    assert len(plan(str(tmp_path), lines_per_unit=8)) == 4
    slices = list(read_slices(planned[0], Columns(), pairs_per_slice=3, rules=""))
    assert [len(part.pairs) for part in slices] == [3, 3, 2]
    assert [(part.number, part.last) for part in slices] == [(0, False), (1, False), (2, True)]
    FileStore(tmp_path / "else").put("readme.txt", b"")
    with pytest.raises(StorageError, match=r"nothing to ingest among 1 files; name a folder with metadata\.jsonl"):
        plan(f"{tmp_path}/else", lines_per_unit=8)


def test_one_cell_or_file_name_that_is_no_utf8_costs_itself_alone(good: list[Raw], tmp_path: Path) -> None:
    first, second = good[:2]
    bad = pa.array([b"a man", b"a m\xffn"]).view(pa.string())
    columns = {
        "plain": bad,
        "dictionary": pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), bad),
        "list": pa.ListArray.from_arrays([0, 1, 2], bad),
        "struct": pa.StructArray.from_arrays([bad], ["text"]),
    }
    for name, captions in columns.items():
        table = pa.table({"jpg": [first.image, second.image], "caption": captions})
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "0.parquet")
        (unit,) = plan(f"{tmp_path}/{name}", lines_per_unit=8)
        (part,) = read_slices(unit, Columns(), pairs_per_slice=8, rules="")
        assert part.pairs[0].text == "a man" or "must be text" in part.pairs[0].detail
        assert part.pairs[1].reason == Reason.BAD_TEXT

    (tmp_path / "tars").mkdir()
    for name in (b"0.tar", b"\xff.tar"):
        with open(bytes(tmp_path / "tars") + b"/" + name, "wb") as file:
            file.write(tar_of([first]))
    readable, unreadable = (
        next(read_slices(unit, Columns(), pairs_per_slice=8, rules=""))
        for unit in plan(f"{tmp_path}/tars", lines_per_unit=8)
    )
    assert [pair.text for pair in readable.pairs] == [first.caption.decode()]
    assert [pair.reason for pair in unreadable.pairs] == [Reason.UNREADABLE]
    assert r"\xff.tar" in unreadable.source


def test_a_source_named_from_this_folder_is_found_from_every_other(
    good: list[Raw], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FileStore(tmp_path).put("a.png", good[0].image or b"")
    FileStore(tmp_path).put("pairs.csv", b"uri,caption\na.png,a man\n")
    for source in ("pairs.csv", ".", f"../{tmp_path.name}"):
        monkeypatch.chdir(tmp_path)
        (unit,) = plan(source, lines_per_unit=8)
        monkeypatch.chdir("/")
        (part,) = read_slices(unit, Columns(), pairs_per_slice=8, rules="")
        assert [(pair.image, pair.reason) for pair in part.pairs] == [(good[0].image, None)]


def test_the_same_lines_in_another_folder_are_other_pairs_and_moved_files_are_the_same(
    good: list[Raw], tmp_path: Path
) -> None:
    def ids(folder: str, key: str, data: bytes) -> list[str]:
        path = tmp_path / folder / key
        path.parent.mkdir()
        path.write_bytes(data)
        os.utime(path, (1, 1))
        return [unit.id("rules") for unit in plan(f"{tmp_path}/{folder}", lines_per_unit=8)]

    line = b'{"file_name": "0.png", "text": "a man"}'
    assert ids("v1", "metadata.jsonl", line) != ids("v2", "metadata.jsonl", line)
    tar = tar_of(good[:1])
    assert ids("t1", "0.tar", tar) == ids("t2", "0.tar", tar)


def test_bad_configurations_and_unfinished_data_sets_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="coverage must rise"):
        Rules(min_coverage=0.7, max_coverage=0.1)
    with pytest.raises(ParameterError, match="nouns must be words"):
        Rules(nouns={"Bride!": "person"})
    with pytest.raises(ParameterError, match="precompute needs a base"):
        IngestConfig(source="a", output="b", precompute=True)
    with pytest.raises(ParameterError, match="gpus_per_actor must be from 0 to 1, is -1"):
        IngestConfig(source="a", output="b", gpus_per_actor=-1)
    with pytest.raises(ParameterError, match="lies within source"):
        IngestConfig(source="s3://bucket/data", output="s3://bucket/data/curated")
    FileStore(tmp_path / "tars").put("0.tar", b"")
    with pytest.raises(ParameterError, match=r"columns\.mask is 'seg', but in tars the ending tells .* leave it out"):
        curate(f"{tmp_path}/tars", f"{tmp_path}/out", columns=Columns(mask="seg"))
    with pytest.raises(StorageError, match="there is nothing at"):
        ingest(IngestConfig(source=f"{tmp_path}/absent", output=f"{tmp_path}/out"))
    FileStore(tmp_path / "source").put("a.jsonl", b"{}")
    FileStore(tmp_path / "app").put("manifest.json", b'{"name": "an app"}')
    with pytest.raises(StorageError, match=r"or no ingestion's \(KeyError: 'files'\); name another folder"):
        ingest(IngestConfig(source=f"{tmp_path}/source", output=f"{tmp_path}/app"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="no segmentation model"):
        load_model(tmp_path, None)  # type: ignore[arg-type]


class Unconditional(FileStore):
    """A store that has no conditional writes."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        raise ConditionalWriteError(f"cannot write {key}")


def test_a_store_without_conditional_writes_does_for_one_run_at_a_time(tmp_path: Path) -> None:
    store = Unconditional(tmp_path)
    part = Slice(unit="u", source="s", number=0, last=True, digest="d", pairs=(), settled=True)
    assert stage({"slice": part}, store=store)["digest"] == "d"
    written = store.get(staged_key("d"))
    assert pq.read_table(io.BytesIO(written)).num_rows == 0
    store.put(staged_key("d"), b"an earlier run's")
    stage({"slice": part}, store=store)
    assert store.get(staged_key("d")) == b"an earlier run's"
