from __future__ import annotations

import json
import pickle
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantbooth.errors import ManifestError
from instantbooth.manifest import ManifestRow, check_manifest, read_manifest

GOOD = {"id": "ada", "images": ["s3://in/ada.jpg"], "class_noun": "person", "prompts": ["a photo of a {subject}"]}


def line(**changes: object) -> bytes:
    return json.dumps(GOOD | changes).encode() + b"\n"


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
        "metadata": {"order": {"nummer": [1, "ü"]}},
    }
    (read,) = read_manifest(json.dumps(row).encode())
    assert json.loads(read.to_json()) == row
    assert pickle.loads(pickle.dumps(read)) == read


@given(
    st.builds(
        ManifestRow,
        id=st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", fullmatch=True),
        images=st.lists(st.just("s3://in/a.jpg"), min_size=1, max_size=16).map(tuple),
        class_noun=st.sampled_from(["person", "cat"]),
        prompts=st.lists(st.text().map(lambda text: text.replace("{", "") + "{subject}"), min_size=1).map(tuple),
        seed=st.none() | st.integers(0, 2**63 - 1),
        adapter_scale=st.none() | st.floats(0, 2),
        num_images_per_prompt=st.integers(1, 16),
        metadata=st.dictionaries(st.text(), st.text() | st.integers() | st.booleans()),
    )
)
def test_rows_survive_being_written_and_read(row: ManifestRow) -> None:
    assert list(read_manifest(row.to_json().encode())) == [row]


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
        (line(class_noun=" "), "class_noun: must not be empty"),
        (line(class_noun=None), "class_noun: must be text, is null"),
        (line(prompts=[]), "prompts: must be a list of at least one prompt"),
        (line(prompts="a {subject}"), "prompts: must be a list"),
        (line(prompts=["a {subject}", "a cat"]), r"prompts: must each hold \{subject\} exactly once, one is \"a cat\""),
        (line(prompts=["{subject} and {subject}"]), "prompts: must each hold"),
        (line(num_images_per_prompt=None), "num_images_per_prompt: must be a whole number from 1 to 16, is None"),
        (line(seed=-1), "seed: .*raise it to 0 or more"),
        (line(num_inference_steps=25.5), "num_inference_steps: must be a whole number from 1 to 1000, is 25.5"),
        (line(guidance_scale=True), "guidance_scale: must be a number from 0 to 30, is True"),
        (line(adapter_scale="1"), "adapter_scale: must be a number from 0 to 2, is '1'"),
        (line(concept_scale=3), "concept_scale: .*is 3; lower it to 2 or less"),
        (line(negative_prompt=1), "negative_prompt: must be text, is 1"),
        (line(metadata=[]), "metadata: must be an object"),
    ],
)
def test_each_bad_row_is_named_by_line_field_rule_value_and_fix(bad: bytes, fault: str) -> None:
    with pytest.raises(ManifestError, match=f"^line 1: {fault}"):
        list(read_manifest(bad))


def test_every_fault_of_every_row_is_reported_at_once() -> None:
    faults = check_manifest([line(), line(id="b", seed=-1, concept_scale=9), b"\n", b"oops\n", line(), line(id="c")])
    assert [fault[: fault.index(":", 8)] for fault in faults] == [
        "line 2: seed",
        "line 2: concept_scale",
        "line 4: row",
        "line 5: id",
    ]
    assert faults[-1] == "line 5: id: must be unique, 'ada' is on line 1 too; rename one"


def test_rows_stream_before_the_manifest_ends() -> None:
    def endless() -> Iterator[bytes]:
        yield b"\xef\xbb\xbf" + line()
        raise AssertionError("read ahead")

    assert next(read_manifest(endless())).id == "ada"


@pytest.mark.parametrize("empty", [b"", b"\n  \n", []])
def test_a_manifest_without_rows_is_refused(empty: bytes | list[bytes]) -> None:
    assert "at least one row" in check_manifest(empty)[0]


def test_a_row_made_in_python_follows_the_same_rules() -> None:
    with pytest.raises(ManifestError, match=r"id: .*; seed: "):
        ManifestRow(id="a/b", images=("a.png",), class_noun="cat", prompts=("{subject}",), seed=-1)
