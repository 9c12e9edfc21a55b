"""Each ablation changes what it says and nothing else, and a direction is only seen where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from instantbooth import Personalizer
from instantbooth.evaluation.ablations import (
    ABLATIONS,
    AGREES,
    FULL,
    GlobalOnly,
    InjectedBefore,
    ablated_objective,
    verdict,
)
from instantbooth.miniature.pairs import Pairs
from instantbooth.miniature.world import Scene
from instantbooth.prompts import tokenize_subject
from instantbooth.training.adapters import AdapterTrainingConfig
from tests.tiny import WIDTH, four_pictures, portrait, tiny_booth

CONFIG = AdapterTrainingConfig(text_dropout=0.0, image_dropout=0.0)


def batch(booth: Personalizer) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids, position = tokenize_subject(booth.base.tokenizer, "a photo of a sks cat at the beach")
    return {
        "latents": torch.randn(4, 4, 16, 16, generator=generator),
        "reference_pixels": torch.rand(4, 3, 32, 32, generator=generator),
        "subject_mask": torch.rand(4, 1, 16, 16, generator=generator),
        "input_ids": torch.tensor([ids] * 4),
        "bare_ids": torch.tensor([ids] * 4),
        "placeholder_position": torch.tensor([position] * 4),
        "bare_position": torch.tensor([position] * 4),
    }


def own(module: nn.Module, others: nn.Module) -> list[nn.Parameter]:
    theirs = {id(parameter) for parameter in others.parameters()}
    return [parameter for parameter in module.parameters() if id(parameter) not in theirs]


@pytest.mark.parametrize("name", ABLATIONS)
def test_gradients_reach_what_a_row_trains_and_nothing_else(name: str, tiny: Path) -> None:
    ablation = ABLATIONS[name]
    booth = tiny_booth(tiny, ablation.personalizer)
    objective, tuned = ablated_objective(booth, CONFIG, ablation)
    loss = objective(batch(booth), torch.Generator().manual_seed(0))
    loss.backward()
    parts = {
        "concept": list(booth.trained.encoders.concept.parameters()),
        "patch": list(booth.trained.encoders.patch.parameters()),
        "adapters": list(booth.trained.adapters.parameters()),
        "unet": own(booth.base.unet, booth.trained),
        "image_encoder": list(booth.image_encoder.parameters()),
        "text_encoder": list(booth.base.text_encoder.parameters()),
        "vae": list(booth.base.vae.parameters()),
    }
    reached = {part for part, found in parts.items() if any(p.grad is not None and p.grad.any() for p in found)}
    changes = {
        "global-only": ({"patch"}, set()),
        "no-adapter": ({"patch", "adapters"}, set()),
        "image-encoder-tuned": (set(), {"image_encoder"}),
        "unet-tuned": (set(), {"unet"}),
    }
    less, more = changes.get(name, (set(), set()))
    assert reached == {"concept", "patch", "adapters"} - less | more
    assert {id(p) for p in tuned} == {id(p) for part in more for p in parts[part]}
    trained = {id(p) for p in objective.parameters() if p.requires_grad}
    assert all(id(p) in trained for found in parts.values() for p in found if p.grad is not None)


def test_before_the_text_encoder_the_concept_is_a_word_among_words(tiny: Path) -> None:
    method, before = tiny_booth(tiny), tiny_booth(tiny, InjectedBefore)
    ids, position = tokenize_subject(method.base.tokenizer, "a photo of a sks cat")
    arguments = torch.tensor([ids, ids]), torch.tensor([position, position])
    concepts = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    after = torch.arange(len(ids)) > position

    theirs = method.prompt_embeds(*arguments, concepts)
    assert torch.equal(theirs[:, position], concepts)
    assert torch.equal(theirs[0, after], theirs[1, after])

    embeds = before.prompt_embeds(*arguments, concepts)
    assert not torch.allclose(embeds[:, position], concepts)
    # The text encoder is causal: what stands before V̂ does not know of it, what follows does.
    assert torch.equal(embeds[0, :position], embeds[1, :position])
    assert not torch.allclose(embeds[0, after], embeds[1, after])
    embeds[:, after].sum().backward()
    assert concepts.grad is not None
    assert concepts.grad.any()

    concept = before.encode([portrait(0)[0]], "cat")
    [row] = before.rows(before.requests("a photo of a {subject}", concept, concept_scale=0.5))
    with torch.no_grad():
        expected = before.prompt_embeds(*(each[:1] for each in arguments), concept.concept_embedding * 0.5)
    torch.testing.assert_close(row.prompt_embeds, expected[0])


def test_adapters_without_patches_are_fed_each_images_concept_embedding(tiny: Path) -> None:
    images = [portrait(seed)[0] for seed in range(3)]
    concept = tiny_booth(tiny, GlobalOnly).encode(images, "cat")
    assert concept.patch_features.shape == (3, WIDTH)
    torch.testing.assert_close(concept.patch_features.mean(dim=0, keepdim=True), concept.concept_embedding)
    full = tiny_booth(tiny).encode(images, "cat")
    assert full.patch_features.shape == (3 * 17, WIDTH)
    assert torch.equal(full.concept_embedding, concept.concept_embedding)


def test_without_adapters_the_concept_embedding_is_all_there_is(tiny: Path) -> None:
    booth = Personalizer.untrained(tiny / "base", image_encoder=tiny / "clip", device="cpu")
    objective, _ = ablated_objective(booth, CONFIG, ABLATIONS["no-adapter"])
    examples = batch(booth)
    losses = []
    for part in (None, booth.trained.encoders.patch, booth.trained.encoders.concept):
        if part is not None:
            nn.init.normal_(part.weight)
        losses.append(objective(examples, torch.Generator().manual_seed(1)).item())
    assert losses[0] == losses[1] != losses[2]


def test_without_the_mask_a_crop_holds_the_background() -> None:
    corpus = four_pictures(Scene(background="beach"))
    latents = torch.zeros(4, 4, 16, 16)
    (masked_rows, masked), (rows, whole) = (
        Pairs(corpus, latents, masked=each).draw(16, torch.Generator().manual_seed(0)) for each in (True, False)
    )
    assert rows == masked_rows
    crops, cut = whole.pop("reference_pixels"), masked.pop("reference_pixels")
    assert all(torch.equal(whole[name], masked[name]) for name in masked), "targets and their weights stay"
    hidden = (cut == 0).all(dim=1, keepdim=True).expand_as(crops)
    assert (crops >= cut - 1e-6).all()
    assert float(crops[hidden].mean()) > 0.2
    # Of the subject, only the edge is mixed with what lies behind it.
    assert float((crops - cut)[~hidden].median()) < 1e-6


def test_without_the_mask_framing_and_all_that_is_drawn_later_stay() -> None:
    corpus, latents = four_pictures(Scene(background="beach")), torch.zeros(4, 4, 16, 16)

    def drawn(*, masked: bool) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        _, batch = Pairs(corpus, latents, masked=masked, replaced_backgrounds=1.0).draw(64, generator)
        return batch["reference_pixels"], generator.get_state()

    (placed, state), (own, same_state) = drawn(masked=True), drawn(masked=False)
    assert torch.equal(state, same_state)
    # What shows the same in both is the subject, framed alike.
    alike = ((placed - own).abs().amax(dim=1) < 1e-3).float().mean(dim=(1, 2))
    assert 0.05 < float(alike.median()) < 0.9


def test_a_replaced_background_is_neither_black_nor_the_pictures_own() -> None:
    corpus, latents = four_pictures(Scene(background="beach")), torch.zeros(4, 4, 16, 16)

    def crops(share: float) -> Tensor:
        pairs = Pairs(corpus, latents, replaced_backgrounds=share)
        return pairs.draw(64, torch.Generator().manual_seed(0))[1]["reference_pixels"]

    def black(pixels: Tensor) -> float:
        """Share of the crops with a black border region, as a mask leaves it."""
        return float(((pixels == 0).all(dim=1).float().mean(dim=(1, 2)) > 0.2).float().mean())

    assert black(crops(0.0)) > 0.9
    assert black(crops(1.0)) < 0.2
    assert 0.3 < black(crops(0.5)) < 0.8


@pytest.mark.parametrize(
    ("reported", "low", "high", "word"),
    [
        (0.02, 0.01, 0.05, AGREES),
        (-0.02, -0.05, -0.01, AGREES),
        (0.02, -0.05, -0.01, "lower here"),
        (-0.02, 0.01, 0.05, "higher here"),
        (0.02, -0.01, 0.05, "no clear change"),
        (-0.02, -0.05, 0.01, "no clear change"),
        (0.0, -0.01, 0.015, AGREES),
        (0.0, -0.01, 0.03, "no clear change"),
        (0.0, 0.01, 0.03, "higher here"),
        (0.0, -0.03, -0.01, "lower here"),
    ],
)
def test_a_row_agrees_where_its_change_goes_the_papers_way(reported: float, low: float, high: float, word: str) -> None:
    assert verdict(reported, {"mean": (low + high) / 2, "low": low, "high": high}) == word


def test_rows_share_a_training_only_where_nothing_of_it_differs() -> None:
    trainings = [ablation.training for ablation in ABLATIONS.values()]
    assert len(trainings) == 8
    assert len(set(trainings)) == 7
    assert ABLATIONS["one-image"].training == ABLATIONS[FULL].training
