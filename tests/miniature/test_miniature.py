"""The shipped miniature: it is whole, small, and does what it is shipped for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from instantbooth import Concept, Personalizer
from instantbooth.errors import ImageError
from instantbooth.evaluation.judges import AttributeJudge, IdentityJudge
from instantbooth.evaluation.metrics import identification_top1, prompt_accuracy
from instantbooth.evaluation.miniature import Examination, draw_subjects, told
from instantbooth.miniature.corpus import identity_of, subject_seed
from instantbooth.miniature.world import Picture, Scene, render
from instantbooth.presets import miniature_folder
from jobs.benchmarks.serve import SUBJECT

SUBJECTS = 6


@pytest.fixture(scope="module")
def miniature() -> Personalizer:
    return Personalizer.from_pretrained("miniature", device="cpu")


@pytest.fixture(scope="module")
def exam(miniature: Personalizer) -> Examination:
    return Examination(miniature, miniature_folder() / "judges", draw_subjects("validation", SUBJECTS, prompts=2))


def photos(number: int, count: int) -> list[Picture]:
    seed = subject_seed("validation", number)
    rng = np.random.default_rng(seed)
    return [render(identity_of(seed), replace(Scene.sample(rng), style="photo")) for _ in range(count)]


def test_the_weights_are_shipped_whole_within_40_mb() -> None:
    files = [file for file in miniature_folder().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40e6
    assert {"base", "clip", "segmenter", "adapters", "judges", "RECORD.json"} <= {
        file.relative_to(miniature_folder()).parts[0] for file in files
    }


def test_pictures_follow_their_prompts_and_their_subjects(exam: Examination) -> None:
    images = exam.personalized(exam.concepts(5))
    assert images[0].size == (64, 64)
    # Chance is about 0.2; the full figures come from `python -m jobs.evaluate miniature`.
    assert exam.prompt_accuracy(images) >= 0.5
    to_subjects = exam.identity.embed(images) @ exam.gallery.mean(dim=1).T
    own = exam.owners[:, None] == torch.arange(SUBJECTS)
    # Subjects alternate between persons and cats: to be nearer to one's own than to others of the class is identity.
    others = (exam.owners[:, None] % 2 == torch.arange(SUBJECTS) % 2) & ~own
    assert to_subjects[own].mean() > to_subjects[others].mean()


def test_another_subject_gives_another_picture(miniature: Personalizer, exam: Examination) -> None:
    concepts = exam.concepts(2)
    first, second = miniature.generate(["a photo of a {subject}"] * 2, [concepts[0], concepts[2]], seed=3)
    assert np.abs(np.asarray(first, int) - np.asarray(second, int)).mean() > 3


def test_the_segmenter_finds_the_subject_where_no_mask_is_given(miniature: Personalizer) -> None:
    segmenter = miniature.subject_encoder.segmenter
    assert segmenter is not None
    for number, noun in ((0, "woman"), (1, "kitten")):
        for photo in photos(number, 3):
            found = np.asarray(segmenter.mask(photo.image, noun)) > 127
            wanted = np.asarray(photo.mask) > 127
            assert (found & wanted).sum() / (found | wanted).sum() > 0.6


def test_a_picture_without_subject_is_refused(miniature: Personalizer) -> None:
    with pytest.raises(ImageError, match="image 2: no cat found"):
        miniature.encode([photos(1, 1)[0].image, Image.new("RGB", (64, 64), "white")], "cat")


def test_the_endpoints_benchmark_shows_a_subject_by_its_alpha_channel(miniature: Personalizer) -> None:
    assert isinstance(miniature.encode([SUBJECT]), Concept)


def test_an_alpha_channel_that_hides_nothing_is_no_mask(miniature: Personalizer) -> None:
    photo = photos(0, 1)[0].image
    assert miniature.encode([photo.convert("RGBA")]).digest == miniature.encode([photo]).digest


def test_concepts_survive_the_disk(miniature: Personalizer, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("concepts") / "ada.safetensors"
    photo = photos(0, 1)[0]
    concept = miniature.encode([photo.image], "person", [photo.mask])
    concept.save(path)
    assert Concept.load(path).digest == concept.digest


def test_the_judges_tell_renders_of_identities_they_never_saw() -> None:
    judges = miniature_folder() / "judges"
    renders = [photos(number, 3) for number in range(12)]
    identity = IdentityJudge.load(judges / "identity")
    gallery = identity.embed([row[0].image for row in renders])[:, None]
    probes = identity.embed([row[1].image for row in renders])
    assert identification_top1(probes, torch.arange(len(renders)), gallery) >= 0.9
    rng = np.random.default_rng(5)
    scenes = [Scene.sample(rng) for _ in range(12)]
    pictures = [render(identity_of(subject_seed("validation", 0)), scene).image for scene in scenes]
    judge = AttributeJudge.load(judges / "attributes")
    assert prompt_accuracy(judge, pictures, [scene.attributes() for scene in scenes]) >= 0.95


def test_only_what_a_caption_says_is_judged() -> None:
    said = told({"style": "watercolor", "headwear": "none", "position": "center", "clothing": "red"})
    assert said == {"style": "watercolor", "clothing": "red"}
