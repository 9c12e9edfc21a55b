from __future__ import annotations

import csv
import io
import json
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from instantbooth.errors import ManifestError
from instantbooth.manifest import CONTROL, SAMPLERS, ManifestRow, read_prompt_sets, scan_manifest
from instantbooth.model import samplers

GOOD = {"id": "ada", "images": ["s3://in/ada.jpg"], "class_noun": "person", "prompts": ["a photo of a {subject}"]}


def line(**changes: object) -> bytes:
    return json.dumps(GOOD | changes).encode() + b"\n"


def rows_of(data: object, **options: Any) -> list[ManifestRow]:
    """The rows of a manifest without faults."""
    scanned = list(scan_manifest(data, **options))
    assert not [fault for _, faults in scanned for fault in faults]
    return [row for row, _ in scanned if row is not None]


def faults_of(data: object, **options: Any) -> list[str]:
    """All faults of a manifest."""
    return [fault for _, faults in scan_manifest(data, **options) for fault in faults]


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    """Lists and objects as JSON, everything else as it prints."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    """Metadata as the text of a JSON object, which alone holds any JSON."""
    rows = [{k: json.dumps(v) if k == "metadata" else v for k, v in row.items()} for row in rows]
    file = io.BytesIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    parquet.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), file)
    return file.getvalue()


FORMATS = {"jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet}


def test_a_full_row_arrives_unchanged() -> None:
    row = {
        **GOOD,
        "images": ["s3://in/1.jpg", "file:///data/2.png"],
        "masks": ["masks/1.png", "masks/2.png"],
        "num_images_per_prompt": 2,
        "seed": 7,
        "num_inference_steps": 30,
        "guidance_scale": 5,
        "adapter_scale": 0.0,
        "concept_scale": 0.4,
        "negative_prompt": "blurry",
        "sampler": "ddim",
        "size": "512x768",
        "metadata": {"order": {"nummer": [1, "ü"]}},
    }
    (read,) = rows_of(json.dumps(row).encode())
    assert json.loads(read.to_json()) == row
    assert (read.width, read.height) == (512, 768)
    assert pickle.loads(pickle.dumps(read)) == read


def prompt_text() -> st.SearchStrategy[str]:
    """Any text that may stand in a prompt beside the subject."""
    return st.text(max_size=900).map(lambda text: CONTROL.sub("", text.replace("{", "")))


ROWS = st.lists(
    st.builds(
        ManifestRow,
        id=st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", fullmatch=True),
        images=st.lists(st.sampled_from(["s3://in/a.jpg", "file:///b|c, d.png"]), min_size=1, max_size=16).map(tuple),
        class_noun=st.sampled_from(["person", "kitten"]),
        prompts=st.lists(prompt_text().map("{}{{subject}}".format), min_size=1, unique=True).map(tuple),
        seed=st.none() | st.integers(0, 2**63 - 1),
        guidance_scale=st.none() | st.floats(0, 30),
        adapter_scale=st.none() | st.floats(0, 2),
        num_images_per_prompt=st.integers(1, 16),
        num_inference_steps=st.none() | st.integers(1, 1000),
        # An empty cell of a CSV means "not given".
        negative_prompt=st.none() | prompt_text().filter(str.strip),
        sampler=st.none() | st.sampled_from(SAMPLERS),
        size=st.none() | st.builds("{}x{}".format, *[st.integers(1, 200).map(lambda eights: 8 * eights)] * 2),
        metadata=st.dictionaries(st.text(), st.text() | st.integers() | st.booleans()),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda row: row.id,
)


@pytest.mark.parametrize("kind", FORMATS)
@given(rows=ROWS, named=st.booleans())
@settings(max_examples=50)
def test_rows_survive_being_written_and_read(kind: str, named: bool, rows: list[ManifestRow]) -> None:
    data = FORMATS[kind]([json.loads(row.to_json()) for row in rows])
    assert rows_of(data, name=f"s3://in/rows.{kind}" if named else "") == rows


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (b"{", "row: must be one JSON object"),
        (b"[]\n", r"row: must be a JSON object, is \[\]"),
        (b"\xff\xfe{}\n", "row: must be one JSON object in UTF-8"),
        (b"[" * 100_000, "row: must be one JSON object"),
        (b'{"id": "a", "id": "b"}', "row: .*'id' is given twice"),
        (line(metadata={"x": float("nan")}), "row: .*NaN is not a finite number"),
        (line(prompts=["a \ud800{subject}"]), "row: .*surrogates not allowed"),
        (b'{"images": ["a.png"], "class_noun": "cat", "prompts": ["{subject}"]}', "id: must be given"),
        (line(adaptor_scale=1), "adaptor_scale: must be a known field.*Did you mean 'adapter_scale'"),
        (line(id="../etc/passwd"), 'id: must be 1 to 128 of .*, is "../etc/passwd"; rename it'),
        (line(id=".hidden"), "id: "),
        (line(id="ada\n"), "id: "),
        (line(id="a" * 129), "id: "),
        (line(id=5), "id: "),
        (line(images=[]), "images: must be a list of 1 to 16 URIs, is 0 of them"),
        (line(images=["a.png"] * 17), "images: .*is 17 of them"),
        (line(images="a.png"), 'images: .*is "a.png"; list them in brackets'),
        (line(images=["https://example.org/a.png"]), "images: https://example.org/a.png is not at a known place"),
        (line(images=[None]), "images: a URI must be text"),
        (line(masks=["a.png", "b.png"]), "masks: must be one per image, are 2 for 1"),
        (line(class_noun="catt"), "class_noun: must be a known noun, is \"catt\"; Did you mean 'cat'"),
        (line(class_noun=None), "class_noun: must be a known noun, is null"),
        (
            line(images=["s3://bucket"]),
            "images: 's3://bucket' can be no object, whose key must be text of at least one",
        ),
        (line(prompts=[]), "prompts: must be a list of at least one prompt"),
        (line(prompts="a {subject}"), "prompts: must be a list"),
        (line(prompts=["a {subject}", "a cat"]), r"prompts: must each hold \{subject\} exactly once, one is \"a cat\""),
        (line(prompts=["{subject} and {subject}"]), "prompts: must each hold"),
        (
            line(prompts=["a {subject}", "{subject}", "a {subject}"]),
            r"prompts: must each be given once, \"a \{subject\}\" is given again; drop it, or raise num_images_per",
        ),
        (
            line(prompts=["a \0{subject}"]),
            r"prompts: must hold no control character, one is \"a \\u0000\{subject\}\"; remove it",
        ),
        (
            line(prompts=["{subject}", "{subject}" + "y" * 992]),
            "prompts: must have at most 1000 .*, one has 1001; shor",
        ),
        (line(negative_prompt="\x1b[0m"), "negative_prompt: must hold no control character"),
        (line(negative_prompt="x" * 70_000), "negative_prompt: must have at most 1000 characters, one has 70000"),
        (line(num_images_per_prompt=None), "num_images_per_prompt: must be a whole number from 1 to 16, is None"),
        (line(seed=-1), "seed: .*raise it to 0 or more"),
        (line(num_inference_steps=25.5), "num_inference_steps: must be a whole number from 1 to 1000, is 25.5"),
        (line(guidance_scale=True), "guidance_scale: must be a number from 0 to 30, is True"),
        (line(adapter_scale="1"), "adapter_scale: must be a number from 0 to 2, is '1'"),
        (line(concept_scale=3), "concept_scale: .*is 3; lower it to 2 or less"),
        (line(negative_prompt=1), "negative_prompt: must be text, is 1"),
        (line(negative_prompt="no {subject}"), r"negative_prompt: must not hold \{subject\}, .*; remove it"),
        (line(sampler="ddmi"), "sampler: must be a known sampler, is \"ddmi\"; Did you mean 'ddim'"),
        (line(size=512), "size: must be width x height in pixels, multiples of 8, is 512; write for example 512x512"),
        (line(size="512x"), "size: "),
        (line(size="512X512"), "size: "),
        (line(size="512x300"), "size: "),
        (line(size="0x0"), "size: "),
        (line(size="8" * 4300 + "x8"), "size: "),
        (line(metadata=[]), "metadata: must be an object"),
        (line(prompt_set="poses"), "prompt_set: must stand instead of prompts, is given beside them; drop one"),
        (line(**{"a\nb": 1}), r'"a\\nb": must be a known field'),
    ],
)
def test_each_bad_row_is_named_by_line_field_rule_value_and_fix(bad: bytes, fault: str) -> None:
    assert re.match(f"line 1: {fault}", faults_of(bad)[0])


def test_every_fault_of_every_row_is_reported_at_once() -> None:
    faults = faults_of([line(), line(id="b", seed=-1, concept_scale=9), b"\n", b"oops\n", line(), line(id="c")])
    assert [fault[: fault.index(":", 8)] for fault in faults] == [
        "line 2: seed",
        "line 2: concept_scale",
        "line 4: row",
        "line 5: id",
    ]
    assert faults[-1] == 'line 5: id: must be unique, "ada" is on line 1 too; rename one'


def test_the_second_of_two_rows_is_a_duplicate_even_where_the_first_is_bad() -> None:
    assert faults_of([line(seed=-1), line()])[-1].startswith("line 2: id: must be unique")


CSV_HEADER = b"id,images,class_noun,prompts,seed,num_inference_steps,guidance_scale,metadata\r\n"


def test_csv_lists_are_separated_or_json_and_empty_cells_are_not_given() -> None:
    data = (
        b"\xef\xbb\xbf"
        + CSV_HEADER
        + b'ada,s3://in/1.jpg | s3://in/2.jpg,cat,"[""a {subject}, sleeping""]",7.0,,5,\r\n'
        + b"\r\n"
        + b'bob,file:///b.png,cat,"a {subject},\nawake|a wet {subject}",,25,1e1,"{""order"": 1}"\r\n'
    )
    ada, bob = rows_of(data)
    assert ada == ManifestRow(
        id="ada",
        images=("s3://in/1.jpg", "s3://in/2.jpg"),
        class_noun="cat",
        prompts=("a {subject}, sleeping",),
        seed=7,
        guidance_scale=5,
    )
    assert bob == ManifestRow(
        id="bob",
        images=("file:///b.png",),
        class_noun="cat",
        prompts=("a {subject},\nawake", "a wet {subject}"),
        num_inference_steps=25,
        guidance_scale=10,
        metadata={"order": 1},
    )


@pytest.mark.parametrize(
    ("cells", "fault"),
    [
        (b"ada,a.png,cat,a {subject},x,,,", "seed: must be a whole number .*, is 'x'; pass a whole number"),
        (b"ada,a.png,cat,a {subject},7.5,,,", "seed: must be a whole number .*, is 7.5"),
        (b"ada,a.png,cat,a {subject},,,nan,", "guidance_scale: must be a number .*, is nan"),
        (b"ada,a.png,cat,a {subject},,,1e999,", "guidance_scale: .*is inf; lower it"),
        (b"ada,a.png,cat,a {subject},,,,order 1", 'metadata: must be an object, is "order 1"'),
        (b"ada,[a.png,cat,a {subject},,,,", r'images: must be a list of 1 to 16 URIs, is "\[a.png"; list them in brac'),
        (b"ada,a.png,cat,a {subject}|,,,,", 'prompts: must each hold .*one is ""'),
        (b"ada,,cat,a {subject},,,,", "images: must be given, is missing; add it"),
        (b"ada,a.png,cat,,,,,", "prompts: must be given, is missing; add it or prompt_set"),
        (b"ada,a.png,cat,a {subject},,,", "row: must have 8 cells, has 7; quote cells that hold commas"),
        (b'ada,"a.png"x,cat,a {subject},,,,', "row: must be comma-separated values"),
        (b"ada,\xff.png,cat,a {subject},,,,", "row: must hold UTF-8 text"),
    ],
)
def test_a_bad_row_of_a_csv_is_named_by_the_line_it_starts_on(cells: bytes, fault: str) -> None:
    good = b'eve,a.png,cat,"a {subject},\nawake",,,,\n'
    (found,) = faults_of(CSV_HEADER + good + cells + b"\n" + good.replace(b"eve", b"kim"))
    assert re.match(f"line 4: {fault}", found)


@pytest.mark.parametrize(("write", "where"), [(as_csv, "line 1"), (as_parquet, "row 1")])
def test_a_column_is_wrong_once_and_not_in_every_row(
    write: Callable[[list[dict[str, Any]]], bytes], where: str
) -> None:
    rows = [GOOD | {"id": str(number), "adaptor_scale": 1, "seed": -number} for number in range(3)]
    faults = faults_of(write(rows))
    assert faults[0].startswith(f"{where}: adaptor_scale: must be a known field, is not; Did you mean 'adapter_scale'?")
    assert [fault.partition(":")[2].split(":")[0] for fault in faults[1:]] == [" seed", " seed"]
    without = [{name: value for name, value in row.items() if name != "class_noun"} for row in rows]
    assert faults_of(write(without))[1:] == [f"{where}: class_noun: must be given, is missing; add it"]


def test_a_csv_column_stands_once() -> None:
    data = b"id,images,class_noun,prompts,id\na,a.png,cat,{subject},b\n"
    assert faults_of(data) == ["line 1: id: must be one column, is 2; drop the others"]


def test_parquet_rows_are_numbered_and_may_hold_nested_metadata() -> None:
    seeds = [None, 2.0, -1.0]
    rows = [GOOD | {"id": f"a{n}", "seed": seed, "metadata": {"order": {"number": n}}} for n, seed in enumerate(seeds)]
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file)
    (first, _), (second, _), (third, faults) = scan_manifest(file.getvalue())
    assert first is not None
    assert (first.seed, first.metadata) == (None, {"order": {"number": 0}})
    assert second is not None
    assert (second.seed, third) == (2, None)
    assert faults == ["row 3: seed: must be a whole number from 0 to 9223372036854775807, is -1; raise it to 0 or more"]


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: data[:4] + bytes(40) + data[44:]])
def test_damaged_parquet_is_a_fault_and_no_crash(damage: Callable[[bytes], bytes]) -> None:
    (fault,) = faults_of(damage(as_parquet([GOOD])))
    assert "must be readable Parquet" in fault


@pytest.mark.parametrize("values", [[b"ada"], [1.5]])
def test_parquet_types_that_are_no_json_or_no_text_are_faults_of_their_row(values: list[object]) -> None:
    file = io.BytesIO()
    table = pa.table({name: values if name == "id" else [value] for name, value in GOOD.items()})
    parquet.write_table(table, file)
    (fault,) = faults_of(file.getvalue())
    assert fault.startswith("row 1: ")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_prompt_set_is_given_once_and_named_by_rows(kind: str) -> None:
    sets = read_prompt_sets(b'{"poses": ["a {subject} sleeping", "a {subject} running"]}')
    unprompted = {name: value for name, value in GOOD.items() if name != "prompts"}
    data = FORMATS[kind]([unprompted | {"prompt_set": "poses"}, GOOD | {"id": "eve"}])
    posed, own = rows_of(data, prompt_sets=sets)
    assert posed.prompts == ("a {subject} sleeping", "a {subject} running")
    assert own.prompts == ("a photo of a {subject}",)
    assert rows_of(posed.to_json().encode()) == [posed]
    (fault,) = faults_of(data, prompt_sets={"pose": ("a {subject}",)})
    assert "prompt_set: must name a prompt set, is \"poses\"; Did you mean 'pose'?" in fault
    (fault,) = faults_of(data)
    assert "none are given: pass --prompt-sets" in fault


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"{", "must be one JSON object in UTF-8"),
        (b'{"a": ["{subject}"], "a": ["{subject}"]}', "'a' is given twice"),
        (b'["a {subject}"]', "must be a JSON object"),
        (
            b'{"a": ["{subject}"], "b": [], "c": ["cat"]}',
            r'(?s)^prompt set "b": must be a list .*set "c": must each hold',
        ),
        (b'{"a": ["{subject}", "{subject}"]}', r'^prompt set "a": must each be given once, "\{subject\}" is'),
    ],
)
def test_prompt_sets_follow_the_rules_of_prompts(data: bytes, fault: str) -> None:
    with pytest.raises(ManifestError, match=fault):
        read_prompt_sets(data)


@given(st.binary() | st.binary().map(lambda data: CSV_HEADER + data) | st.binary().map(lambda data: b"PAR1" + data))
def test_any_bytes_are_rows_or_faults(data: bytes) -> None:
    assert list(scan_manifest(data))


def test_the_samplers_are_those_of_the_model() -> None:
    assert SAMPLERS == samplers.SAMPLERS


def test_rows_stream_before_the_manifest_ends() -> None:
    def endless() -> Iterator[bytes]:
        yield b"\xef\xbb\xbf" + line()
        raise AssertionError("read ahead")

    row, _ = next(scan_manifest(endless()))
    assert row is not None
    assert row.id == "ada"


@pytest.mark.parametrize("empty", [b"", b"\n  \n", []])
def test_a_manifest_without_rows_is_refused(empty: bytes | list[bytes]) -> None:
    assert "at least one row" in faults_of(empty)[0]


def test_a_row_made_in_python_follows_the_same_rules() -> None:
    with pytest.raises(ManifestError, match=r"id: .*; seed: "):
        ManifestRow(id="a/b", images=("a.png",), class_noun="cat", prompts=("{subject}",), seed=-1)
