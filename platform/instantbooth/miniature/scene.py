"""What a caption tells: attributes, scenes sampled from them, and the sentences that name them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from instantbooth.errors import ParameterError

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "subject": ("person", "cat"),
    "style": ("photo", "pencil drawing", "pixel art", "watercolor"),
    "background": (
        "beach",
        "forest",
        "city at night",
        "snow",
        "desert",
        "living room",
        "flower meadow",
        "moon",
    ),
    "clothing": ("red", "blue", "green", "yellow", "white", "black", "purple", "orange"),
    "headwear": ("none", "top hat", "crown", "beanie", "straw hat"),
    "action": ("none", "waving", "holding a balloon", "reading a book"),
    "position": ("left", "center", "right"),
    "framing": ("medium", "close-up"),
}
NOUNS: dict[str, tuple[str, ...]] = {
    "person": ("person", "man", "woman", "boy", "girl", "lady"),
    "cat": ("cat", "kitten"),
}
PLACES = {
    "beach": "at the beach",
    "forest": "in the forest",
    "city at night": "in the city at night",
    "snow": "in the snow",
    "desert": "in the desert",
    "living room": "in the living room",
    "flower meadow": "in a flower meadow",
    "moon": "on the moon",
}
UNSAID = {"headwear": "none", "action": "none", "position": "center", "framing": "medium"}
DROP_PROBABILITY = 0.15


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One value for every attribute but the subject, and nuisance that no caption tells.

    `tilt` is the head's, in radians; `gaze` -1 to 1; `dx`, `dy` in pixels; `zoom` a factor around 1; `light` from cool
    (-1) to warm (1); `shade` of the clothing colour, -1 to 1; `seed` places what is in the background; `mirrored` puts
    light and action on the other side.
    """

    style: str = "photo"
    background: str = "beach"
    clothing: str = "red"
    headwear: str = "none"
    action: str = "none"
    position: str = "center"
    framing: str = "medium"
    tilt: float = 0.0
    gaze: float = 0.0
    dx: float = 0.0
    dy: float = 0.0
    zoom: float = 1.0
    light: float = 0.0
    shade: float = 0.0
    seed: int = 0
    mirrored: bool = False

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Self:
        """A scene drawn uniformly over the attributes' values."""
        chosen = {
            name: values[int(rng.integers(len(values)))] for name, values in ATTRIBUTES.items() if name != "subject"
        }
        return cls(
            **chosen,
            tilt=float(rng.uniform(-0.14, 0.14)),
            gaze=float(rng.uniform(-1, 1)),
            dx=float(rng.uniform(-1.7, 1.7)),
            dy=float(rng.uniform(-1.2, 1.2)),
            zoom=float(rng.uniform(0.96, 1.04)),
            light=float(rng.uniform(-1, 1)),
            shade=float(rng.uniform(-1, 1)),
            seed=int(rng.integers(2**31)),
            mirrored=bool(rng.random() < 0.5),
        )

    def attributes(self) -> dict[str, str]:
        """Attribute name to value, without the subject."""
        return {name: getattr(self, name) for name in ATTRIBUTES if name != "subject"}

    def caption(self, noun: str, rng: np.random.Generator | None = None) -> str:
        """The scene in words. With `rng`, some phrases are left out and their order varies."""
        said = self.attributes()
        if rng is None:
            return caption_of(said, noun)
        said = {name: value for name, value in said.items() if name == "style" or rng.random() >= DROP_PROBABILITY}
        return _sentence(said, noun, place_first=bool(rng.random() < 0.25), position_first=bool(rng.random() < 0.25))


def caption_of(attributes: Mapping[str, str], noun: str) -> str:
    """A sentence that names just these attributes (`subject` is told by the noun; what is usual stays unsaid).

    Raises ParameterError for an attribute or a value that the world does not have.
    """
    for name, value in attributes.items():
        if name not in ATTRIBUTES:
            raise ParameterError(f"attribute {name!r} is unknown; the miniature world has {', '.join(ATTRIBUTES)}")
        if value not in ATTRIBUTES[name]:
            raise ParameterError(f"{name} is {value!r}; use one of {', '.join(ATTRIBUTES[name])}")
    return _sentence(attributes, noun)


def _sentence(attributes: Mapping[str, str], noun: str, place_first: bool = False, position_first: bool = False) -> str:
    said = {name: value for name, value in attributes.items() if UNSAID.get(name) != value}
    framing = "close-up " if "framing" in said else ""
    opening = f"a {framing}{said.get('style', 'picture')} of a {noun}"
    clothes = []
    if "clothing" in said:
        clothes.append(f"{_article(said['clothing'])} {said['clothing']} sweater")
    if "headwear" in said:
        clothes.append(f"a {said['headwear']}")
    phrases = [f"wearing {' and '.join(clothes)}"] if clothes else []
    if "action" in said:
        phrases.append(said["action"])
    if "background" in said:
        phrases.insert(0 if place_first else len(phrases), PLACES[said["background"]])
    if "position" in said:
        phrases.insert(0 if position_first else len(phrases), f"on the {said['position']}")
    return " ".join([opening, *phrases])


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
