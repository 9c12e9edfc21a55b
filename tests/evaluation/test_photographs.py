"""Real photographs: folders laid out as the data sets are, and embedders in the formats they come in."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from instantbooth.errors import ImageError, ParameterError, PromptError, WeightsError
from instantbooth.evaluation.cases import RECONSTRUCTION, Case, Prompt
from instantbooth.evaluation.cells import Cell, Seconds
from instantbooth.evaluation.embedders import FaceEmbedder, VisionTransformer
from instantbooth.evaluation.figures import Gallery, Judges, judge, table_row
from instantbooth.evaluation.methods.interface import Reference
from instantbooth.evaluation.photographs import list_dreambench, list_identities
from jobs.evaluation.protocol import Photographs, Protocol
from tests.photographed import Embedding, people, write
from tests.tiny import portrait

LIST = """Classes

subject_name,class
teapot,teapot
cat,cat
cat2,cat

Prompts

Object Prompts

prompt_list = [
{objects}
]

Live Subject Prompts

prompt_list = [
{live}
]
""".format(
    objects=",\n".join(f"'a {{0}} {{1}} on a mirror {n}'.format(unique_token, class_token)" for n in range(25)),
    live=",\n".join(f"'a {{0}} {{1}} in the snow {n}'.format(unique_token, class_token)" for n in range(25)),
)


def test_identities_are_folders_and_those_with_too_few_pictures_are_named(tmp_path: Path) -> None:
    photos = people(tmp_path, {"ada": 3, "ben": 1, "eve": 2})
    found = list_identities(photos, pictures=2, masks=tmp_path / "masks")
    cases = [each.case(1) for each in found.subjects]
    # Seeds follow from the number, which is the same whoever is left out.
    assert [(case.name, case.number, len(case.references)) for case in cases] == [("ada", 0, 1), ("eve", 2, 1)]
    assert all(len(case.compared) == 2 for case in cases), "one is given, and both are compared with"
    assert found.dropped == {"ben": "1 pictures, 2 are needed"}
    assert all(each.mask is not None and each.mask.mode == "L" for case in cases for each in case.references)
    assert cases[0].prompts[-1].kind == RECONSTRUCTION
    with pytest.raises(ParameterError, match=r"no usable identity \(ada: 3 pictures, 4 are needed"):
        list_identities(photos, pictures=4)
    with pytest.raises(PromptError, match="names no subject"):
        list_identities(photos, pictures=1, prompts=[Prompt(kind="style", text="a watercolor")]).subjects[0].case(1)
    (tmp_path / "masks" / "ada" / "0.png").unlink()
    (photos / "ada" / "1.jpg").write_bytes(b"no picture")
    ada = list_identities(photos, pictures=1, masks=tmp_path / "masks").subjects[0]
    with pytest.raises(ImageError, match="has no mask at"):
        ada.case(1)
    with pytest.raises(ImageError, match=r"1\.jpg"):
        list_identities(photos, pictures=2).subjects[0].case(2)


def test_a_flat_folder_is_grouped_and_ordered_by_the_numbers_in_its_names(tmp_path: Path) -> None:
    for name in ("2_0", "2_1", "10_9", "10_10", "10_11", "cover"):
        write(tmp_path / f"{name}.tif", portrait(0)[0])
    found = list_identities(tmp_path, pictures=2)
    assert [(each.name, [file.stem for file in each.files]) for each in found.subjects] == [
        ("2", ["2_0", "2_1"]),
        ("10", ["10_9", "10_10"]),
    ]
    assert found.dropped == {"cover.tif": "no identity stands before a '_' in its name"}


def test_validation_and_test_identities_are_never_the_same(tmp_path: Path) -> None:
    names = [f"person-{n}" for n in range(40)]
    photos = people(tmp_path, dict.fromkeys(names, 1))
    chosen = {
        split: {each.name for each in list_identities(photos, split=split, pictures=1).subjects}
        for split in ("test", "validation")
    }
    assert chosen["test"] | chosen["validation"] == set(names)
    assert not chosen["test"] & chosen["validation"]
    assert 4 <= len(chosen["validation"]) <= 12, "about a fifth"
    few = people(tmp_path / "few", dict.fromkeys(sorted(chosen["test"])[:3], 1))
    with pytest.raises(ParameterError, match=r"the validation split of .* no usable identity"):
        list_identities(few, split="validation", pictures=1)
    assert {each.name for each in list_identities(few, pictures=1).subjects} < chosen["test"], "wherever it lies"


def dreambench(root: Path, listed: str = LIST) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "prompts_and_classes.txt").write_text(listed)
    for name, count in {"teapot": 4, "cat": 6, "cat2": 1}.items():
        for n in range(count):
            write(root / name / f"{n:02d}.jpg", portrait(n)[0])
    return root


def test_dreambench_has_its_own_prompts_for_objects_and_for_live_subjects(tmp_path: Path) -> None:
    found = list_dreambench(dreambench(tmp_path), pictures_per_prompt=2)
    assert [each.name for each in found.subjects] == ["teapot", "cat"], "methods of any class picture a teapot too"
    teapot, cat = (each.case(4) for each in found.subjects)
    assert len(teapot.texts) == len(cat.texts) == len(set(cat.seeds)) == 50
    assert teapot.texts[0] == "a {subject} on a mirror 0"
    assert cat.texts[:3] == ["a {subject} in the snow 0", "a {subject} in the snow 0", "a {subject} in the snow 1"]
    assert (len(cat.references), len(cat.compared)) == (4, 6), "compared with all its pictures, as the benchmark does"
    assert found.dropped == {"cat2": "1 pictures, 4 are needed"}
    known = list_dreambench(tmp_path, any_class=False)
    assert [(each.name, each.number) for each in known.subjects] == [("cat", 1)]
    assert known.dropped["teapot"] == "InstantBooth's weights know no teapot; a table of other --methods keeps it"
    with pytest.raises(ParameterError, match="DreamBench's list"):
        list_dreambench(tmp_path / "cat")


@pytest.mark.parametrize(
    ("line", "instead", "words"),
    [
        ("'a {0} {1} on a mirror 7'.format(", "", "24 prompts for objects, DreamBench has 25"),
        (
            "'a {0} {1} in the snow 7'.format(",
            "'a {0} in the snow'.format(",
            "a line that is no prompt: \"'a {0} in the",
        ),
        ("cat,cat", "cat", "cannot be read as DreamBench's list"),
    ],
)
def test_no_line_of_dreambenchs_list_is_lost(line: str, instead: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=re.escape(words)):
        list_dreambench(dreambench(tmp_path, LIST.replace(line, instead)))


def test_pictures_are_compared_with_all_that_are_known_of_a_subject(tiny: Path, tmp_path: Path) -> None:
    [_, cat] = [each.case(1) for each in list_dreambench(dreambench(tmp_path), pictures_per_prompt=1).subjects]
    judges = Judges.load(tiny / "clip", VisionTransformer(tiny_vit(tmp_path / "dino")))
    judges = replace(judges, dino=judges.identity)
    seconds = Seconds(fit=1.0, first=1.0, rest=1.0)
    cell = Cell(seconds=seconds, machine="a laptop", code="v1", pictures=(portrait(9)[0],) * len(cat.prompts))

    def figures(case: Case) -> dict[str, float]:
        row = table_row(judge(judges, Gallery(judges.identity, [case]), [case], [cell]))
        return {name: row[name]["mean"] for name in ("clip_i", "dino", "face_similarity")}

    all_given = replace(cat, references=tuple(Reference(image=image) for image in cat.known))
    assert figures(cat) == figures(all_given)
    assert figures(cat) != figures(replace(cat, known=()))


class Flat(nn.Module):
    """The pixels of a single picture."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.reshape(1, 192)


def onnx_embedding(path: Path) -> Path:
    """What Embedding says of a single picture of 8 × 8 pixels, as an ONNX file."""
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 3, 8, 8])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 3])
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    shift = helper.make_tensor("shift", TensorProto.FLOAT, [1], [2.0])
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("Add", ["mean", "shift"], ["embedding"]),
    ]
    graph = helper.make_graph(nodes, "embedding", [pixels], [embedding], [axes, shift])
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def test_a_face_embedder_is_any_torchscript_or_onnx_file_of_the_right_shape(tmp_path: Path) -> None:
    torch.jit.script(Embedding()).save(str(tmp_path / "face.pt"))
    embedder = FaceEmbedder(tmp_path / "face.pt", size=8)
    red, wide = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (60, 20), "red")
    embedded = embedder.embed([red, wide])
    expected = torch.tensor([3.0, 1.0, 1.0]) / 11**0.5
    torch.testing.assert_close(embedded, expected.expand(2, 3))
    torch.testing.assert_close(
        FaceEmbedder(onnx_embedding(tmp_path / "face.onnx"), size=8).embed([red, wide]), embedded
    )
    with pytest.raises(WeightsError, match="say by --face-size which it reads"):
        FaceEmbedder(tmp_path / "face.onnx", size=16)
    (tmp_path / "damaged.onnx").write_bytes(b"none")
    with pytest.raises(WeightsError, match="no ONNX face embedder"):
        FaceEmbedder(tmp_path / "damaged.onnx")
    torch.jit.script(nn.Identity()).save(str(tmp_path / "pixels.pt"))
    with pytest.raises(WeightsError, match=r"must give embeddings \[N, D\], gives \(2, 3, 160, 160\)"):
        FaceEmbedder(tmp_path / "pixels.pt")
    torch.jit.trace(Flat(), torch.zeros(1, 3, 8, 8)).save(str(tmp_path / "single.pt"))
    with pytest.raises(
        WeightsError, match=r"embeds no two pictures of 8 pixels \(.*\); .* export it for batches of any size"
    ):
        FaceEmbedder(tmp_path / "single.pt", size=8)
    with pytest.raises(WeightsError, match="no TorchScript face embedder"):
        FaceEmbedder(tmp_path / "absent.pt")


def test_an_onnx_file_without_its_reader_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(WeightsError, match=r"pip install -e '\.\[onnx\]'"):
        FaceEmbedder(Path("face.onnx"))


def tiny_vit(folder: Path) -> Path:
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_a_judge_whose_files_lack_tensors_would_be_partly_random(kind: str, tiny: Path, tmp_path: Path) -> None:
    whole = tiny / "clip" if kind == "clip" else tiny_vit(tmp_path / "dino")
    folder = tmp_path / "partial"
    shutil.copytree(whole, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(list(tensors.items())[1:]), folder / "model.safetensors", metadata={"format": "pt"})
    load: Callable[[Path], object] = VisionTransformer
    if kind == "clip":
        load = partial(Judges.load, identity=VisionTransformer(tiny_vit(tmp_path / "other")))
    with pytest.raises(WeightsError, match="its files lack 1 tensors"):
        load(folder)


def test_dreambench_is_judged_as_it_is_defined_unless_others_are_named() -> None:
    chosen = Photographs(layout="dreambench")
    assert (chosen.judging_clip, chosen.judging_dino) == ("openai/clip-vit-base-patch32", "facebook/dino-vits16")
    named = replace(chosen, judge_clip="some/clip", dino="some/vit")
    assert (named.judging_clip, named.judging_dino) == ("some/clip", "some/vit")
    people = replace(chosen, layout="identities")
    assert (people.judging_clip, people.judging_dino) == (people.clip, None)


def test_the_protocol_reads_photographs_and_names_what_is_missing(tiny: Path, tmp_path: Path) -> None:
    for person in ("ada", "eve"):
        write(tmp_path / "photos" / person / "0.jpg", portrait(0)[0])
    torch.jit.script(Embedding()).save(str(tmp_path / "face.pt"))
    photographs = Photographs(
        data=tmp_path / "photos",
        base=str(tiny / "base"),
        clip=str(tiny / "clip"),
        face=tmp_path / "face.pt",
        dino=str(tiny_vit(tmp_path / "dino")),
    )
    protocol = Protocol(output=str(tmp_path / "out"), photographs=photographs, references=1, identities=2)
    protocol.check(("textual-inversion", "dreambooth"))
    assert [case.name for case in protocol.cases] == ["ada", "eve"]
    assert protocol.parts.settings.dreambooth.learning_rate == 5e-6
    judges = protocol.judges
    assert judges.attributes is None
    assert judges.dino is not None
    assert torch.allclose(judges.dino.embed([portrait(0)[0]]).norm(dim=1), torch.ones(1))
    with pytest.raises(ParameterError, match="needs trained weights"):
        protocol.check(("instantbooth",))
    with pytest.raises(ParameterError, match="pass --face"):
        replace(protocol, photographs=replace(photographs, face=None, dino=None)).check(("dreambooth",))
    by_dino = replace(photographs, face=None).judges()
    assert by_dino.identity is by_dino.dino
    with pytest.raises(ParameterError, match="is no folder"):
        replace(protocol, photographs=replace(photographs, data=tmp_path / "absent")).check(("dreambooth",))
    with pytest.raises(WeightsError, match="holds no ViT"):
        VisionTransformer(tmp_path)
