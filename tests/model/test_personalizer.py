"""The method's claims, on a tiny model with random weights, at float32."""

from pathlib import Path

import pytest
import torch

from instantbooth import Concept, Personalizer
from instantbooth.errors import ConceptError
from instantbooth.model.adapter import References, adapter_kwargs, attach, detach
from instantbooth.model.conditioning import batch_references, concept_keys_values
from instantbooth.model.denoise import denoise
from instantbooth.model.personalizer import Request
from instantbooth.model.subjects import SubjectEncoder
from instantbooth.prompts import expand, tokenize_subject
from tests.tiny import portrait, tiny_booth

PROMPT = "a photo of a {subject} at the beach"
MIXED_PROMPTS = [PROMPT, "a watercolor of a {subject}", "a {subject} wearing a crown"]
MIXED: dict[str, list[object]] = {
    "num_inference_steps": [4, 6, 5],
    "guidance_scale": [3.0, 1.0, 7.5],
    "negative_prompt": ["", "a cat", ""],
    "adapter_scale": [1.0, 0.4, 0.7],
    "concept_scale": [0.5, 1.0, 0.8],
    "sampler": ["ddim", "euler", "dpmsolver++"],
    "seed": [1, 2, 3],
}


@pytest.fixture(scope="module")
def concepts(booth: Personalizer) -> list[Concept]:
    """Three identities with 1, 3 and 2 reference images."""
    return [encode(booth, range(1)), encode(booth, range(3, 6)), encode(booth, range(8, 10))]


def encode(booth: Personalizer, seeds: range | list[int], noun: str = "person") -> Concept:
    images, masks = zip(*(portrait(seed) for seed in seeds), strict=True)
    return booth.encode(list(images), noun, list(masks))


def mixed_requests(booth: Personalizer, concepts: list[Concept]) -> list[Request]:
    return booth.requests(MIXED_PROMPTS, concepts, **MIXED)


def each_asked_for_alone(booth: Personalizer, concepts: list[Concept]) -> list[Request]:
    return [
        request
        for row, (prompt, concept) in enumerate(zip(MIXED_PROMPTS, concepts, strict=True))
        for request in booth.requests(prompt, concept, **{name: values[row] for name, values in MIXED.items()})
    ]


def unet_inputs(booth: Personalizer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 24, booth.base.text_width, generator=generator)
    return latents, torch.tensor([10, 700]), text


def test_a_closed_gate_leaves_the_base_exactly_as_it_was(tiny: Path, concepts: list[Concept]) -> None:
    booth = tiny_booth(tiny)
    for adapter in booth.trained.adapters.values():
        torch.nn.init.zeros_(adapter.gate)
    inputs = unet_inputs(booth)
    cached = [concept_keys_values(booth.trained.adapters, concept) for concept in concepts[:2]]
    kwargs = adapter_kwargs(batch_references(cached, torch.ones(2)))
    with torch.no_grad():
        adapted = booth.base.unet(*inputs, cross_attention_kwargs=kwargs).sample
        detach(booth.base.unet)
        bare = booth.base.unet(*inputs).sample
    assert torch.equal(adapted, bare)


def test_open_gates_change_the_picture(booth: Personalizer, concepts: list[Concept]) -> None:
    cached = [concept_keys_values(booth.trained.adapters, concept) for concept in concepts[:2]]
    with torch.no_grad():
        on, off = (
            booth.base.unet(
                *unet_inputs(booth),
                cross_attention_kwargs=adapter_kwargs(batch_references(cached, torch.full((2,), scale))),
            ).sample
            for scale in (1.0, 0.0)
        )
    assert (on - off).abs().max() > 1e-3


def test_adapter_scale_zero_is_the_base_with_the_concept_token_alone(tiny: Path, concepts: list[Concept]) -> None:
    booth = tiny_booth(tiny)
    off, on = (
        booth.requests([PROMPT] * 2, concepts[:2], adapter_scale=scale, num_inference_steps=4, **rest())
        for scale in (0, 1)
    )
    scaled, adapted = booth.sample(off), booth.sample(on)
    assert not torch.equal(scaled, adapted)
    detach(booth.base.unet)
    with torch.inference_mode():
        for bare in denoise(booth.base.unet, booth.rows(off)):
            pass
    assert torch.equal(scaled, bare)


@pytest.mark.parametrize("tail", ["", " at the beach", " at the beach" * 12], ids=["short", "usual", "cut off"])
@pytest.mark.parametrize("placeholder", ["sks", "zwx"], ids=["one token", "several tokens"])
def test_the_concept_takes_the_placeholders_place_behind_the_text_encoder_and_no_other(
    tiny: Path, concepts: list[Concept], tail: str, placeholder: str
) -> None:
    booth = tiny_booth(tiny)
    booth.placeholder_token = placeholder
    prompt, scales = "a photo of a {subject}" + tail, {"concept_scale": 0.5, "adapter_scale": 1.0}
    row = booth.rows(booth.requests(prompt, concepts[0], num_inference_steps=4, **(rest() | scales)))[0]
    ids, position = tokenize_subject(booth.base.tokenizer, expand(prompt, "person", placeholder), placeholder)
    with torch.no_grad():
        plain = booth.base.encode_text(torch.tensor([ids]))[0]
    torch.testing.assert_close(row.prompt_embeds[position], 0.5 * concepts[0].concept_embedding[0])
    others = torch.arange(len(ids)) != position
    torch.testing.assert_close(row.prompt_embeds[others], plain[others])


def test_the_embedding_is_the_mean_and_the_features_are_the_concatenation(booth: Personalizer) -> None:
    together = encode(booth, range(3))
    alone = [encode(booth, [seed]) for seed in range(3)]
    mean = torch.stack([concept.concept_embedding for concept in alone]).mean(dim=0)
    torch.testing.assert_close(together.concept_embedding, mean)
    torch.testing.assert_close(together.patch_features, torch.cat([concept.patch_features for concept in alone]))
    assert together.patch_features.shape == (3 * 17, booth.base.text_width)


def test_subjects_encoded_together_become_what_each_becomes_alone(booth: Personalizer) -> None:
    pairs = [[portrait(10 * count + n) for n in range(count)] for count in (2, 1, 3)]
    subjects = [([image for image, _ in each], [mask for _, mask in each]) for each in pairs]
    encoder = booth.subject_encoder
    together = encoder.encode_subjects([encoder.prepare(images, "cat", masks) for images, masks in subjects])
    for concept, (images, masks) in zip(together, subjects, strict=True):
        alone = booth.encode(images, "cat", masks)
        assert (concept.class_noun, concept.image_digests) == (alone.class_noun, alone.image_digests)
        torch.testing.assert_close(concept.concept_embedding, alone.concept_embedding)
        torch.testing.assert_close(concept.patch_features, alone.patch_features)


def test_the_order_of_reference_images_does_not_matter(booth: Personalizer) -> None:
    latents = [
        booth.sample(booth.requests(PROMPT, encode(booth, order), num_inference_steps=4, adapter_scale=1, **rest()))
        for order in ([0, 1, 2], [2, 0, 1])
    ]
    torch.testing.assert_close(*latents, atol=1e-4, rtol=1e-4)


def rest() -> dict[str, object]:
    return {"guidance_scale": 3.0, "concept_scale": 1.0, "sampler": "ddim", "seed": 5}


def test_a_mixed_batch_equals_each_row_alone(booth: Personalizer, concepts: list[Concept]) -> None:
    requests = mixed_requests(booth, concepts)
    together = booth.sample(requests)
    alone = torch.cat([booth.sample([request]) for request in each_asked_for_alone(booth, concepts)])
    assert (together - alone).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("images", "guidance_scale", "steps", "tolerance"),
    [(3, 1.0, 6, 0.0), (1, 1.0, 6, 1e-4), (5, 1.0, 6, 1e-4), (3, 5.0, 6, 1e-4), (3, 1.0, 3, 1e-4)],
    ids=["same shape", "fewer images", "more images", "guided", "done earlier"],
)
def test_changing_one_row_leaves_the_others_as_they_were_to_the_bit_in_batches_of_one_shape(
    booth: Personalizer, concepts: list[Concept], images: int, guidance_scale: float, steps: int, tolerance: float
) -> None:
    first, second, third = mixed_requests(booth, concepts)
    before = booth.sample([first, second, third])
    changed = booth.requests(
        "man {subject}",
        encode(booth, range(20, 20 + images)),
        num_inference_steps=steps,
        adapter_scale=0.1,
        **(rest() | {"guidance_scale": guidance_scale}),
    )[0]
    after = booth.sample([first, changed, third])
    assert (before[0] - after[0]).abs().max() <= tolerance
    assert (before[2] - after[2]).abs().max() <= tolerance
    assert not torch.equal(before[1], after[1])


def test_saved_keys_and_values_equal_the_papers_equation(booth: Personalizer, concepts: list[Concept]) -> None:
    for adapter in booth.trained.adapters.values():
        width = adapter.to_q.in_features
        y = torch.randn(2, 64, width, generator=torch.Generator().manual_seed(2))
        cached = [concept_keys_values(booth.trained.adapters, concept) for concept in (concepts[0], concepts[1])]
        scale = torch.tensor([1.0, 0.3])
        with torch.no_grad():
            fast = adapter(y, batch_references(cached, scale))
            features = [concepts[0].patch_features[None], concepts[1].patch_features[None]]
            slow = [adapter.equation(y[i : i + 1], features[i], scale[i]) for i in range(2)]
        torch.testing.assert_close(fast, torch.cat(slow), atol=1e-5, rtol=1e-5)


def test_rows_behind_the_references_pass_unchanged(booth: Personalizer, concepts: list[Concept]) -> None:
    adapter = next(iter(booth.trained.adapters.values()))
    y = torch.randn(3, 64, adapter.to_q.in_features)
    cached = [concept_keys_values(booth.trained.adapters, concepts[0])]
    with torch.no_grad():
        assert torch.equal(adapter(y, batch_references(cached, torch.ones(1)))[1:], y[1:])


def test_saved_weights_and_concepts_give_bit_identical_pictures(
    tiny: Path, booth: Personalizer, concepts: list[Concept], tmp_path: Path
) -> None:
    booth.save_weights(tmp_path / "weights")
    again = Personalizer.from_pretrained(
        tiny / "base", weights=tmp_path / "weights", image_encoder=tiny / "clip", device="cpu"
    )
    concepts[1].save(tmp_path / "ada.safetensors")
    reloaded = Concept.load(tmp_path / "ada.safetensors")
    assert (reloaded.class_noun, reloaded.image_digests) == ("person", concepts[1].image_digests)
    pictures = [
        each.generate(PROMPT, concept, num_inference_steps=4, num_images_per_prompt=2, seed=7)
        for each, concept in ((booth, concepts[1]), (again, reloaded))
    ]
    assert [p.tobytes() for p in pictures[0]] == [p.tobytes() for p in pictures[1]]
    assert pictures[0][0].tobytes() != pictures[0][1].tobytes()


def test_the_encoder_alone_makes_the_same_concepts_without_the_base(
    tiny: Path, booth: Personalizer, tmp_path: Path
) -> None:
    booth.save_weights(tmp_path / "weights")
    alone = SubjectEncoder.from_pretrained(
        "miniature", weights=tmp_path / "weights", image_encoder=tiny / "clip", device="cpu"
    )
    image, mask = portrait(0)
    assert alone.encode([image], "cat", [mask]).digest == booth.encode([image], "cat", [mask]).digest


def test_concepts_of_other_encoders_are_refused(tiny: Path, concepts: list[Concept]) -> None:
    other = tiny_booth(tiny)
    with torch.no_grad():
        other.trained.encoders.concept.weight.mul_(1.01)
    with pytest.raises(ConceptError, match="encode the reference images again"):
        other.generate(PROMPT, concepts[0])


def test_adapters_sit_in_every_transformer_block_and_come_out_again(tiny: Path) -> None:
    booth = tiny_booth(tiny)
    unet = booth.base.unet
    before = {name for name, _ in unet.named_modules() if "fuser" not in name and "position_net" not in name}
    assert len(booth.trained.adapters) == 4
    detach(unet)
    assert {name for name, _ in unet.named_modules()} == before
    assert len(attach(unet, 32)) == 4


def test_an_untrained_adapter_attends_as_the_self_attention_before_it(tiny: Path) -> None:
    unet = Personalizer.untrained(tiny / "base", image_encoder=tiny / "clip", device="cpu").base.unet
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    y, nothing, scale = torch.randn(2, 16, block.norm1.normalized_shape[0]), torch.empty(2, 0, 32), torch.ones(2, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(block.fuser.equation(y, nothing, scale), y)
        block.fuser.gate.fill_(100.0)
        torch.testing.assert_close(block.fuser.equation(y, nothing, scale) - y, block.attn1(block.norm1(y)))


def test_training_and_inference_agree_on_the_adapter(booth: Personalizer, concepts: list[Concept]) -> None:
    cached = batch_references([concept_keys_values(booth.trained.adapters, concepts[0])] * 2, torch.ones(2))
    features = References(scale=torch.ones(2, 1, 1), patch_features=concepts[0].patch_features.expand(2, -1, -1))
    with torch.no_grad():
        outputs = [
            booth.base.unet(*unet_inputs(booth), cross_attention_kwargs=adapter_kwargs(each)).sample
            for each in (cached, features)
        ]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
