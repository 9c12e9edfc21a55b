"""Real photographs: folders laid out as the data sets are, and embedders in the formats they come in."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from instantbooth.errors import ImageError, ParameterError, PromptError, WeightsError
from instantbooth.evaluation.cases import RECONSTRUCTION, Prompt
from instantbooth.evaluation.embedders import FaceEmbedder, VisionTransformer
from instantbooth.evaluation.figures import Judges
from instantbooth.evaluation.photographs import read_dreambench, read_identities
from jobs.evaluation.protocol import Photographs, Protocol
from tests.tiny import portrait

LIST = """Classes

subject_name,class
teapot,teapot
cat,cat
cat2,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on a mirror'.format(unique_token, class_token),
'a shiny {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a {0} {1} in a chef outfit'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]
"""


def write(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_identities_are_folders_and_those_with_too_few_pictures_are_named(tmp_path: Path) -> None:
    for person, count in {"ada": 3, "bob": 1, "eve": 2}.items():
        for n in range(count):
            image, mask = portrait(n)
            write(tmp_path / "photos" / person / f"{n}.jpg", image)
            write(tmp_path / "masks" / person / f"{n}.png", mask)
    found = read_identities(tmp_path / "photos", references=2, masks=tmp_path / "masks")
    assert [(case.name, case.number, len(case.references)) for case in found.cases] == [("ada", 0, 2), ("eve", 1, 2)]
    assert found.dropped == {"bob": "1 pictures, 2 are needed"}
    assert all(each.mask is not None and each.mask.mode == "L" for case in found.cases for each in case.references)
    assert found.cases[0].prompts[-1].kind == RECONSTRUCTION
    with pytest.raises(ParameterError, match=r"no usable identity \(ada: 3 pictures, 4 are needed"):
        read_identities(tmp_path / "photos", references=4)
    with pytest.raises(PromptError, match="names no subject"):
        read_identities(tmp_path / "photos", references=1, prompts=[Prompt(kind="style", text="a watercolor")])
    (tmp_path / "masks" / "ada" / "0.png").unlink()
    with pytest.raises(ImageError, match="has no mask at"):
        read_identities(tmp_path / "photos", references=2, masks=tmp_path / "masks")
    (tmp_path / "photos" / "ada" / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"0\.jpg"):
        read_identities(tmp_path / "photos", references=2)


def test_a_flat_folder_is_grouped_by_names(tmp_path: Path) -> None:
    for name in ("0_0", "0_1", "12_0", "12_1", "12_2"):
        write(tmp_path / f"{name}.tif", portrait(0)[0])
    found = read_identities(tmp_path, references=2)
    assert [(case.name, len(case.references)) for case in found.cases] == [("0", 2), ("12", 2)]


def test_dreambench_has_its_own_prompts_for_objects_and_for_live_subjects(tmp_path: Path) -> None:
    (tmp_path / "prompts_and_classes.txt").write_text(LIST)
    for name, count in {"teapot": 4, "cat": 4, "cat2": 1}.items():
        for n in range(count):
            write(tmp_path / name / f"{n:02d}.jpg", portrait(n)[0])
    found = read_dreambench(tmp_path, references=2, pictures_per_prompt=2)
    assert [case.name for case in found.cases] == ["cat"]
    assert found.cases[0].texts == [
        *["a {subject} in the snow"] * 2,
        *["a {subject} in a chef outfit"] * 2,
        *["a red {subject}"] * 2,
    ]
    assert len(set(found.cases[0].seeds)) == 6
    assert set(found.dropped) == {"teapot", "cat2"}
    assert "'teapot'" in found.dropped["teapot"]
    with pytest.raises(ParameterError, match="DreamBench's list"):
        read_dreambench(tmp_path / "cat")


class Embedding(nn.Module):
    """The mean colour, as an embedding."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3)) + 2


def test_a_face_embedder_is_any_torchscript_file_of_the_right_shape(tmp_path: Path) -> None:
    torch.jit.script(Embedding()).save(str(tmp_path / "face.pt"))
    embedder = FaceEmbedder(tmp_path / "face.pt", size=8)
    red, wide = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (60, 20), "red")
    embedded = embedder.embed([red, wide])
    expected = torch.tensor([3.0, 1.0, 1.0]) / 11**0.5
    torch.testing.assert_close(embedded, expected.expand(2, 3))
    torch.jit.script(nn.Identity()).save(str(tmp_path / "pixels.pt"))
    with pytest.raises(WeightsError, match=r"must give embeddings \[N, D\], gives \(1, 3, 160, 160\)"):
        FaceEmbedder(tmp_path / "pixels.pt")
    with pytest.raises(WeightsError, match="no TorchScript face embedder"):
        FaceEmbedder(tmp_path / "absent.pt")


def tiny_vit(folder: Path) -> Path:
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("judge", ["clip", "dino"])
def test_a_judge_whose_files_lack_tensors_would_be_partly_random(judge: str, tiny: Path, tmp_path: Path) -> None:
    whole = tiny / "clip" if judge == "clip" else tiny_vit(tmp_path / "dino")
    partial = tmp_path / "partial"
    shutil.copytree(whole, partial)
    tensors = load_file(partial / "model.safetensors")
    save_file(dict(list(tensors.items())[1:]), partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="its files lack 1 tensors"):
        if judge == "clip":
            Judges.load(partial, VisionTransformer(tiny_vit(tmp_path / "other")))
        else:
            VisionTransformer(partial)


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
    protocol = Protocol(output=str(tmp_path / "out"), photographs=photographs, references=1)
    protocol.check(("textual-inversion", "dreambooth"))
    assert [case.name for case in protocol.cases()] == ["ada", "eve"]
    assert protocol.parts.settings.dreambooth.learning_rate == 5e-6
    judges = protocol.judges()
    assert judges.attributes is None
    assert judges.dino is not None
    assert torch.allclose(judges.dino.embed([portrait(0)[0]]).norm(dim=1), torch.ones(1))
    with pytest.raises(ParameterError, match="needs trained weights"):
        protocol.check(("instantbooth",))
    with pytest.raises(ParameterError, match="pass --face"):
        replace(protocol, photographs=replace(photographs, face=None)).check(("dreambooth",))
    with pytest.raises(ParameterError, match="is no folder"):
        replace(protocol, photographs=replace(photographs, data=tmp_path / "absent")).check(("dreambooth",))
    with pytest.raises(WeightsError, match="holds no ViT"):
        VisionTransformer(tmp_path)
