"""What users get wrong is told at once, in the project's own errors, before any model runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from instantbooth import Concept, Personalizer
from instantbooth.errors import (
    BaseModelError,
    ConceptError,
    ImageError,
    InstantBoothError,
    ParameterError,
    PromptError,
    WeightsError,
)
from instantbooth.model.base import BaseModel
from tests.tiny import portrait

PROMPT = "a photo of a {subject}"


@pytest.fixture(scope="module")
def concept(booth: Personalizer) -> Concept:
    image, mask = portrait(0)
    return booth.encode([image], "person", [mask])


@pytest.mark.parametrize(
    ("images", "masks", "noun", "error", "message"),
    [
        ([], None, "person", ImageError, "0 reference images given; pass at least 1"),
        (portrait(0)[0], None, "person", ImageError, "pass a list"),
        ([portrait(0)[0]], portrait(0)[1], "person", ImageError, "masks is Image; pass a list"),
        ([portrait(0)[0]], 1, "person", ImageError, "masks is int; pass a list"),
        (["ada.jpg"], None, "person", ImageError, "must be a PIL image"),
        ([Image.new("RGB", (1, 1))], None, "person", ImageError, "image 1"),
        ([portrait(0)[0]], [], "person", ImageError, "0 masks given for 1 images"),
        ([portrait(0)[0]], [Image.new("L", (8, 8), 255)], "person", ImageError, "must have its image's size"),
        ([portrait(0)[0]], [Image.new("L", (40, 40))], "person", ImageError, "marks 0.00%"),
        ([Image.new("RGBA", (40, 40))], None, "person", ImageError, "the transparency of image 1 marks 0.00%"),
        ([portrait(0)[0]], None, "perso", ParameterError, "Did you mean 'person'"),
    ],
)
def test_references(
    booth: Personalizer, images: object, masks: object, noun: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        booth.encode(images, noun, masks)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "LA", "RGBA", "1", "I;16"])
def test_every_ordinary_kind_of_picture_is_taken(booth: Personalizer, mode: str) -> None:
    image = portrait(0)[0]
    converted = Image.new("I;16", (40, 40), 30_000) if mode == "I;16" else image.convert(mode)
    assert booth.encode([converted], "person").num_images == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"adapter_scale": 3.0}, ParameterError, "adapter_scale must be"),
        ({"adapter_scale": float("nan")}, ParameterError, "adapter_scale must be"),
        ({"concept_scale": -0.1}, ParameterError, "concept_scale must be"),
        ({"num_inference_steps": 0}, ParameterError, "num_inference_steps must be"),
        ({"num_inference_steps": 2.5}, ParameterError, "a whole number"),
        ({"num_images_per_prompt": 0}, ParameterError, "num_images_per_prompt must be"),
        ({"guidance_scale": "7"}, ParameterError, "guidance_scale must be"),
        ({"guidance_scale": [1.0, 2.0]}, ParameterError, "2 values for 1 prompts"),
        ({"seed": -1}, ParameterError, "seed must be"),
        ({"sampler": "dimm"}, ParameterError, "Did you mean 'ddim'"),
        ({"negative_prompt": "a {subject}"}, PromptError, "without {subject}"),
        ({"prompts": ["a photo"]}, PromptError, "names no subject"),
        ({"prompts": []}, PromptError, "no prompts given"),
        ({"prompts": [3]}, PromptError, "is int, not text"),
        ({"prompts": None}, PromptError, "prompts is NoneType; pass a text"),
        ({"concepts": "ada.safetensors"}, ParameterError, "pass what encode or Concept.load returned"),
    ],
)
def test_parameters(
    booth: Personalizer, concept: Concept, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        booth.generate(**({"prompts": [PROMPT], "concepts": concept} | arguments))  # type: ignore[arg-type]


def test_folders(tiny: Path, booth: Personalizer, tmp_path: Path) -> None:
    def load(base: Path | str | None = tiny / "base", **parts: object) -> None:
        Personalizer.from_pretrained(base, **({"image_encoder": tiny / "clip", "weights": tmp_path / "w"} | parts))

    def spoiled(part: str, file: str) -> Path:
        """A copy of the folder in which one file is what a clone without large files has in its place."""
        copy = tmp_path / f"{part} without {Path(file).name}"
        shutil.copytree(tiny / part, copy, dirs_exist_ok=True)
        (copy / file).write_text('["version https://git-lfs.github.com/spec/v1"]')
        return copy

    def without_one_tensor(part: str, file: str) -> Path:
        copy = tmp_path / f"{part} without a tensor of {Path(file).parent.name or 'its own'}"
        shutil.copytree(tiny / part, copy, dirs_exist_ok=True)
        tensors = load_file(copy / file)
        tensors.pop(next(name for name in tensors if "vision" in name or part == "base"))
        save_file(tensors, copy / file, metadata={"format": "pt"})
        return copy

    def inpainting() -> Path:
        copy = tmp_path / "inpainting"
        shutil.copytree(tiny / "base", copy)
        UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(copy / "unet") | {"in_channels": 9}
        ).save_pretrained(copy / "unet")
        return copy

    booth.save_weights(tmp_path / "w")
    load()
    (tmp_path / "empty").mkdir()
    xl = tmp_path / "xl"
    shutil.copytree(tiny / "base", xl)
    (xl / "text_encoder_2").mkdir()
    cases: list[tuple[type[Exception], str, dict[str, object]]] = [
        (BaseModelError, "lacks tokenizer, text_encoder", {"base": tmp_path / "empty"}),
        (WeightsError, "Did you mean 'miniature'", {"base": "minature"}),
        (WeightsError, "config.json does not exist", {"weights": tmp_path / "nowhere"}),
        (WeightsError, "no CLIP image encoder", {"image_encoder": tmp_path / "empty"}),
        (WeightsError, "no CLIP image encoder", {"image_encoder": spoiled("clip", "model.safetensors")}),
        (BaseModelError, "cannot be loaded as", {"base": spoiled("base", "text_encoder/model.safetensors")}),
        (BaseModelError, "cannot be loaded as", {"base": spoiled("base", "unet/diffusion_pytorch_model.safetensors")}),
        (BaseModelError, "cannot be loaded as", {"base": spoiled("base", "scheduler/scheduler_config.json")}),
        (BaseModelError, "Stable Diffusion XL folder", {"base": xl}),
        (BaseModelError, "cannot be loaded as", {"base": spoiled("base", "vae/diffusion_pytorch_model.safetensors")}),
        (BaseModelError, "takes 9 channels and gives 4", {"base": inpainting()}),
        (BaseModelError, "lack 1 tensors", {"base": without_one_tensor("base", "text_encoder/model.safetensors")}),
        (
            BaseModelError,
            "lack 1 tensors",
            {"base": without_one_tensor("base", "unet/diffusion_pytorch_model.safetensors")},
        ),
        (WeightsError, "lack 1 tensors", {"image_encoder": without_one_tensor("clip", "model.safetensors")}),
        (WeightsError, "model is NoneType; name a preset or a folder", {"base": None}),
        (ParameterError, "device 'gpu' is unknown", {"device": "gpu"}),
        (ParameterError, "device 1.5 is unknown", {"device": 1.5}),
        (ParameterError, "device '' is unknown", {"device": ""}),
        (ParameterError, "device is 'mps', which torch cannot use here", {"device": "mps"}),
        (ParameterError, "device is 'cuda:7', which torch cannot use here", {"device": "cuda:7"}),
        (WeightsError, "comes without trained weights", {"weights": None}),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            load(**arguments)  # type: ignore[arg-type]


def test_small_files_that_are_missing_are_found_before_large_ones_are_read(
    tiny: Path, booth: Personalizer, tmp_path: Path
) -> None:
    booth.save_weights(tmp_path / "w")
    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "w/config.json", tmp_path / "cut")
    shutil.copytree(tiny / "clip", tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    parts = {"image_encoder": tiny / "clip", "weights": tmp_path / "w"}
    with pytest.raises(BaseModelError, match="lacks tokenizer"):
        Personalizer.from_pretrained(tmp_path / "empty", **parts)  # what reading it ends with
    for changed, message in (
        ({"weights": tmp_path / "cut"}, "weights.safetensors does not exist"),
        ({"image_encoder": tmp_path / "empty"}, "no CLIP image encoder: it has no config.json"),
        ({"image_encoder": tmp_path / "pickled"}, r"no CLIP image encoder: it has no \*\.safetensors"),
    ):
        with pytest.raises(WeightsError, match=message):
            Personalizer.from_pretrained(tmp_path / "empty", **(parts | changed))
    with pytest.raises(WeightsError, match=r"it has no \*\.safetensors"):
        Personalizer.untrained(tiny / "base", image_encoder=tmp_path / "pickled")


def test_weights_are_not_saved_into_a_file(booth: Personalizer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="name a folder to write in"):
        booth.save_weights(tmp_path / "file")


def test_tokenizers(tiny: Path, tmp_path: Path) -> None:
    def with_tokenizer(name: str, **files: str) -> Path:
        """A copy of the base whose tokenizer has these files alone."""
        copy = tmp_path / name
        shutil.copytree(tiny / "base", copy)
        shutil.rmtree(copy / "tokenizer")
        (copy / "tokenizer").mkdir()
        for file, text in files.items():
            (copy / f"tokenizer/{file}.json").write_text(text)
        return copy

    def with_long_prompts() -> Path:
        copy = tmp_path / "long prompts"
        shutil.copytree(tiny / "base", copy)
        config = copy / "tokenizer/tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 900}))
        return copy

    for base, message in (
        (with_tokenizer("none"), "does not say how long a prompt may be"),
        (with_tokenizer("a list", tokenizer="[]"), "holds no tokenizer of CLIP's"),
        (with_tokenizer("another's", tokenizer='{"version": "1.0"}'), "holds no tokenizer of CLIP's"),
        (with_long_prompts(), "takes 900 tokens, its text encoder 24"),
    ):
        with pytest.raises(BaseModelError, match=message):
            BaseModel.load(str(base), device=torch.device("cpu"), dtype=torch.float32)


def test_damaged_and_foreign_weights(tiny: Path, booth: Personalizer, tmp_path: Path) -> None:
    booth.save_weights(tmp_path)
    tensors = tmp_path / "weights.safetensors"
    whole = tensors.read_bytes()

    def load() -> None:
        Personalizer.from_pretrained(tiny / "base", image_encoder=tiny / "clip", weights=tmp_path)

    for spoil, message in (
        (lambda: tensors.write_bytes(whole[: len(whole) // 2]), "is damaged"),
        (lambda: save_file({"encoders.concept.weight": torch.zeros(3)}, tensors), "does not fit the model"),
        (tensors.unlink, "weights.safetensors does not exist"),
        (lambda: (tmp_path / "config.json").write_text("{"), "is no weights' config.json"),
        (lambda: (tmp_path / "config.json").write_text('{"format_version": 9}'), "format_version is 9"),
    ):
        spoil()
        with pytest.raises(WeightsError, match=message):
            load()


def test_damaged_concepts(concept: Concept, tmp_path: Path) -> None:
    path = tmp_path / "ada.safetensors"
    concept.save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConceptError, match="cannot be read as a concept"):
        Concept.load(path)
    with pytest.raises(ConceptError, match="cannot be read as a concept"):
        Concept.load(tmp_path / "nowhere")
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ConceptError, match="holds no concept"):
        Concept.load(path)
    metadata = {"format": "instantbooth-concept-1", "image_digests": "[]"}
    metadata |= dict.fromkeys(("class_noun", "encoder_digest", "created"), "")
    tensors = {"concept_embedding": torch.zeros(1, 8), "patch_features": torch.zeros(3, 8)}
    for changed, header in (
        ({"concept_embedding": torch.zeros(8)}, {}),
        ({"patch_features": torch.zeros(3, 9)}, {}),
        ({}, {"image_digests": "5"}),
    ):
        save_file(tensors | changed, path, metadata=metadata | header)
        with pytest.raises(ConceptError, match="cannot be read as a concept"):
            Concept.load(path)
    for json_header in (b"[]", b'{"__metadata__": null}'):
        with pytest.raises(ConceptError, match="cannot be read as a concept"):
            Concept.from_bytes(len(json_header).to_bytes(8, "little") + json_header)
    with pytest.raises(ConceptError, match="None cannot be read as a concept"):
        Concept.load(None)  # type: ignore[arg-type]
    with pytest.raises(ConceptError, match="name a file in a folder that exists"):
        concept.save(tmp_path / "nowhere" / "ada.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConceptError, match="name a file"):
        concept.save(tmp_path / "folder")
    assert not list(tmp_path.glob("*.partial"))


def test_every_error_is_one_of_ours() -> None:
    for error in (BaseModelError, ConceptError, ImageError, ParameterError, PromptError, WeightsError):
        assert issubclass(error, InstantBoothError)
