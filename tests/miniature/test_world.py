"""The miniature world keeps its promises: pure pictures, captions that tell, subjects of a fair size."""

import dataclasses
import itertools

import numpy as np
import pytest

from instantbooth.errors import ParameterError
from instantbooth.miniature.world import ATTRIBUTES, NOUNS, SIZE, Identity, Scene, caption_of, render


def test_render_is_pure() -> None:
    scene = Scene.sample(np.random.default_rng(5))
    for noun, style in itertools.product(NOUNS, ATTRIBUTES["style"]):
        styled = dataclasses.replace(scene, style=style)
        first, second = (render(Identity.sample(noun, 11), styled) for _ in range(2))
        assert first.image.tobytes() == second.image.tobytes()
        assert first.mask.tobytes() == second.mask.tobytes()


def test_masks_hold_a_fair_share_of_the_picture() -> None:
    rng = np.random.default_rng(0)
    for seed in range(100):
        picture = render(Identity.sample(("person", "cat")[seed % 2], seed), Scene.sample(rng))
        mask = np.asarray(picture.mask)
        assert (picture.image.mode, picture.image.size, picture.mask.size) == ("RGB", (SIZE, SIZE), (SIZE, SIZE))
        assert set(np.unique(mask)) == {0, 255}
        assert 0.12 < (mask == 255).mean() < 0.65


def test_full_captions_tell_every_unusual_value() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = Scene.sample(rng)
        caption = scene.caption("person")
        for name, value in scene.attributes().items():
            usual = {"headwear": "none", "action": "none", "position": "center", "framing": "medium"}.get(name)
            assert (value in caption) == (value != usual)
        assert caption == caption_of(scene.attributes(), "person")
        assert len(caption.split()) <= 30
        assert set(scene.caption("person", rng).split()) <= set(caption.split()) | {"picture"}


def test_captions_refuse_what_the_world_does_not_have() -> None:
    with pytest.raises(ParameterError, match="mood"):
        caption_of({"mood": "happy"}, "cat")
    with pytest.raises(ParameterError, match="mars"):
        caption_of({"background": "mars"}, "cat")
    with pytest.raises(ParameterError, match="dog"):
        Identity.sample("dog", 1)


def test_identities_differ_and_stay() -> None:
    for noun in ("person", "cat"):
        people = [Identity.sample(noun, seed) for seed in range(50)]
        assert len({person.look for person in people}) == 50
        assert people == [Identity.sample(noun, seed) for seed in range(50)]
        assert all(2 <= len(person.description().split(", ")) <= 10 for person in people)


def test_the_same_scene_shows_two_identities_apart() -> None:
    scene = Scene()
    first, second = (np.asarray(render(Identity.sample("cat", seed), scene).image, float) for seed in (1, 2))
    assert np.abs(first - second).mean() > 2
