"""What the figures of an evaluation mean, on cases whose answer is known."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from instantbooth.errors import ParameterError, WeightsError
from instantbooth.evaluation.judges import AttributeJudge, IdentityJudge
from instantbooth.evaluation.metrics import bootstrap_interval, identification_top1, prompt_accuracy, reconstruction

ATTRIBUTES = {"subject": ("person", "cat"), "clothing": ("red", "green", "blue")}
NARROW = (8, 16)


def pictures(count):
    noise = np.random.default_rng(count).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


@pytest.fixture
def judge():
    torch.manual_seed(0)
    return AttributeJudge(ATTRIBUTES, widths=NARROW).eval()


def test_prompt_accuracy_counts_only_the_attributes_that_a_prompt_names(judge):
    images = pictures(3)
    seen = judge.predict(images)
    wrong = next(color for color in ATTRIBUTES["clothing"] if color != seen[1]["clothing"])
    wanted = [seen[0], {"clothing": wrong}, {}]
    assert prompt_accuracy(judge, images, wanted) == pytest.approx(2 / 3)


def test_prompt_accuracy_refuses_what_the_judge_cannot_see(judge):
    with pytest.raises(ParameterError, match="'pink'"):
        prompt_accuracy(judge, pictures(1), [{"clothing": "pink"}])
    with pytest.raises(ParameterError, match="2 images but 1"):
        prompt_accuracy(judge, pictures(2), [{}])


def test_identification_finds_the_nearest_mean_reference_at_any_length():
    directions = torch.eye(4)
    gallery = normalize(
        directions[:, None] + 0.3 * torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    generated = directions * torch.tensor([[1.0], [9.0], [0.1], [1.0]])
    assert identification_top1(generated, torch.arange(4), gallery) == 1.0
    assert identification_top1(generated, torch.tensor([0, 1, 3, 2]), gallery) == 0.5


def test_a_subject_reconstructed_exactly_scores_one():
    vision = {"image_size": 64, "patch_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 10}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision | {"num_attention_heads": 2})).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    picture, other = pictures(2)
    assert reconstruction(clip, processor, [picture], [picture, picture]).item() == pytest.approx(1, abs=1e-5)
    assert reconstruction(clip, processor, [picture], [picture, other]).item() < 1


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    identities = np.repeat(np.arange(30), 8)
    covered = 0
    for trial in range(200):
        values = rng.normal(size=30)[identities] + rng.normal(size=240)
        interval = bootstrap_interval(values.reshape(30, 8).mean(axis=1), resamples=400, seed=trial)
        covered += interval.low <= 0 <= interval.high
    assert 0.89 <= covered / 200 <= 0.98


@pytest.mark.parametrize("values", [[], 1.0, [[1.0, 2.0]]])
def test_an_interval_is_of_one_row_of_values(values):
    with pytest.raises(ParameterError, match="must be one row"):
        bootstrap_interval(values)


def test_saved_judges_judge_the_same(judge, tmp_path):
    judge.save(tmp_path / "attributes")
    loaded = AttributeJudge.load(tmp_path / "attributes")
    assert loaded.predict(pictures(4)) == judge.predict(pictures(4))
    assert loaded.attributes == judge.attributes

    identity = IdentityJudge(widths=NARROW).eval()
    identity.save(tmp_path / "identity")
    embeddings = IdentityJudge.load(tmp_path / "identity").embed(pictures(4))
    assert torch.equal(embeddings, identity.embed(pictures(4)))
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(4))


def test_a_folder_without_the_judge_is_refused(judge, tmp_path):
    judge.save(tmp_path / "attributes")
    with pytest.raises(WeightsError, match="holds no IdentityJudge"):
        IdentityJudge.load(tmp_path / "attributes")
    with pytest.raises(WeightsError, match="nowhere"):
        AttributeJudge.load(tmp_path / "nowhere")
