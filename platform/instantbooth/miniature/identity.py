"""Who is in the picture: the continuous looks of persons and cats, far richer than any caption tells."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from instantbooth.errors import ParameterError
from instantbooth.miniature.drawing import Color, mix

SKIN: tuple[Color, ...] = ((255, 226, 204), (243, 198, 162), (214, 156, 114), (160, 104, 70), (98, 62, 46))
SKIN_WORDS = ("pale skin", "fair skin", "tan skin", "brown skin", "dark skin")
HAIR: dict[str, Color] = {
    "black": (40, 34, 42),
    "brown": (104, 64, 40),
    "chestnut": (146, 78, 42),
    "red": (206, 90, 34),
    "blond": (236, 194, 96),
    "grey": (164, 164, 172),
    "white": (236, 232, 226),
    "purple": (132, 76, 184),
    "teal": (36, 152, 156),
    "pink": (238, 122, 166),
}
HAIR_STYLES = (
    "bald", "short", "side parted", "bob", "long straight", "curly", "bun", "pigtails", "mohawk"
)  # fmt: skip
EYES: dict[str, Color] = {
    "brown": (122, 70, 34),
    "green": (62, 154, 74),
    "blue": (58, 128, 214),
    "grey": (126, 142, 156),
    "amber": (222, 146, 32),
    "violet": (136, 84, 200),
}
FRAMES: dict[str, Color] = {
    "black": (38, 36, 46),
    "red": (206, 48, 56),
    "golden": (206, 158, 44),
    "blue": (44, 88, 190),
    "white": (244, 242, 238),
}
BEARDS = ("none", "moustache", "goatee", "full")
FUR: dict[str, Color] = {
    "white": (242, 238, 232),
    "black": (58, 54, 66),
    "ginger": (232, 144, 62),
    "grey": (146, 150, 160),
    "cream": (244, 216, 172),
    "brown": (142, 98, 66),
    "blue": (118, 152, 208),
    "lilac": (184, 154, 210),
}
PATTERNS = ("solid", "striped", "eye patch", "half mask", "white muzzle", "siamese")
CAT_EYES: dict[str, Color] = {
    "green": (110, 188, 70),
    "yellow": (240, 202, 52),
    "orange": (240, 142, 36),
    "blue": (72, 160, 232),
    "teal": (44, 176, 166),
    "violet": (162, 104, 216),
}


@dataclass(frozen=True, kw_only=True)
class Person:
    """A person's look. Lengths are pixels of a medium picture; positions are relative to the head's centre."""

    skin: Color
    skin_tone: float
    width: float
    height: float
    jaw: float
    squareness: float
    hair_style: str
    hair_name: str
    hair: Color
    hair_volume: float
    hair_length: float
    hairline: float
    parting: float
    tie: Color
    eye_name: str
    eye: Color
    eye_x: float
    eye_y: float
    eye_size: float
    eye_open: float
    lid: float
    brow_width: float
    brow_tilt: float
    brow_lift: float
    nose: float
    nose_y: float
    mouth_width: float
    mouth_y: float
    smile: float
    lip: Color
    glasses: str
    frame_name: str
    frame: Color
    frame_size: float
    beard: str
    beard_size: float
    moles: tuple[tuple[float, float, float], ...]
    freckles: float
    blush: float
    ear: float
    ear_y: float
    earrings: Color | None


@dataclass(frozen=True, kw_only=True)
class Cat:
    """A cat's look. Lengths are pixels of a medium picture; positions are relative to the head's centre."""

    fur_name: str
    fur: Color
    second_name: str
    second: Color
    pattern: str
    pattern_side: int
    pattern_size: float
    pattern_shift: float
    width: float
    height: float
    fluff: float
    ear: float
    ear_width: float
    ear_x: float
    ear_lean: float
    ear_round: float
    inner_ear: Color
    eye_name: str
    eye: Color
    eye_x: float
    eye_y: float
    eye_size: float
    eye_open: float
    eye_tilt: float
    pupil: float
    muzzle: float
    muzzle_y: float
    nose: Color
    nose_size: float
    whiskers: float
    whisker_tilt: float
    chin: float


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One person or cat, the same in every scene; `look` is a pure function of `class_noun` and `seed`."""

    class_noun: str
    seed: int
    look: Person | Cat

    @classmethod
    def sample(cls, class_noun: str, seed: int) -> Self:
        """The identity of that seed. Raises ParameterError for a class noun other than "person" or "cat"."""
        if class_noun not in ("person", "cat"):
            raise ParameterError(f"class_noun is {class_noun!r}; the miniature world has 'person' and 'cat': use one")
        rng = np.random.default_rng(np.random.SeedSequence([seed, 1 if class_noun == "person" else 2]))
        look = _sample_person(rng) if class_noun == "person" else _sample_cat(rng)
        return cls(class_noun=class_noun, seed=seed, look=look)

    def description(self) -> str:
        """The look in coarse words: comma separated phrases, always the same for one identity."""
        words = _describe_person(self.look) if isinstance(self.look, Person) else _describe_cat(self.look)
        return ", ".join(words)


def _pick(rng: np.random.Generator, names: tuple[str, ...], weights: tuple[float, ...] | None = None) -> str:
    share = None if weights is None else np.array(weights) / sum(weights)
    return names[int(rng.choice(len(names), p=share))]


def _tint(rng: np.random.Generator, color: Color, spread: float) -> Color:
    """The colour, a little lighter or darker and of a slightly different hue."""
    r, g, b = np.clip(np.array(color) * rng.uniform(0.86, 1.12) + rng.uniform(-spread, spread, 3), 0, 255).round()
    return int(r), int(g), int(b)


def _sample_person(rng: np.random.Generator) -> Person:
    u = rng.uniform
    tone = float(u(0, 4))
    step = min(3, int(tone))
    hair_name = _pick(rng, tuple(HAIR), (15, 15, 10, 12, 13, 7, 5, 8, 8, 8))
    hair_style = _pick(rng, HAIR_STYLES, (6, 12, 14, 12, 14, 14, 10, 10, 8))
    eye_name = _pick(rng, tuple(EYES))
    frame_name = _pick(rng, tuple(FRAMES))
    smooth_chin = hair_style in ("bob", "long straight", "bun", "pigtails")
    jewel = _tint(rng, ((236, 190, 60), (72, 176, 224), (226, 70, 96))[rng.integers(3)], 6)
    return Person(
        skin=_tint_skin(rng, mix(SKIN[step], SKIN[step + 1], tone - step)),
        skin_tone=tone,
        width=u(12.9, 14.4),
        height=u(13.8, 16.2),
        jaw=u(0.0, 1.0),
        squareness=u(2.0, 2.7),
        hair_style=hair_style,
        hair_name=hair_name,
        hair=_tint(rng, HAIR[hair_name], 9),
        hair_volume=u(0, 1),
        hair_length=u(0, 1),
        hairline=u(0, 1),
        parting=u(0.1, 0.65) * (1 if u() < 0.5 else -1),
        tie=_tint(rng, ((232, 66, 84), (70, 150, 232), (248, 202, 64), (92, 190, 120))[rng.integers(4)], 8),
        eye_name=eye_name,
        eye=_tint(rng, EYES[eye_name], 9),
        eye_x=u(5.1, 6.9),
        eye_y=u(0.6, 2.6),
        eye_size=u(2.75, 3.7),
        eye_open=u(0.82, 1.18),
        lid=u(-0.22, 0.22),
        brow_width=u(0.9, 2.2),
        brow_tilt=u(-0.32, 0.28),
        brow_lift=u(4.6, 5.9),
        nose=u(1.2, 2.5),
        nose_y=u(5.8, 7.0),
        mouth_width=u(2.8, 5.2),
        mouth_y=u(9.6, 10.8),
        smile=u(0.6, 2.1),
        lip=_tint(rng, ((176, 62, 66), (206, 60, 82), (150, 66, 60))[rng.integers(3)], 8),
        glasses=_pick(rng, ("none", "round", "square"), (11, 5, 5)),
        frame_name=frame_name,
        frame=_tint(rng, FRAMES[frame_name], 6),
        frame_size=u(4.3, 5.2),
        beard="none" if smooth_chin else _pick(rng, BEARDS, (10, 3, 3, 5)),
        beard_size=u(0, 1),
        moles=tuple((float(u(-9, 9)), float(u(4, 9)), float(u(0.85, 1.25))) for _ in range(rng.integers(1, 3)))
        if u() < 0.4
        else (),
        freckles=float(u(0.75, 1.0)) if u() < 0.27 else 0.0,
        blush=u(0.0, 0.55),
        ear=u(2.1, 3.8),
        ear_y=u(0.5, 3.0),
        earrings=jewel if u() < 0.3 else None,
    )


def _tint_skin(rng: np.random.Generator, color: Color) -> Color:
    warm = rng.uniform(-8, 8)
    r, g, b = np.clip(np.array(color) + (warm * 0.4, rng.uniform(-4, 4), -warm), 0, 255).round()
    return int(r), int(g), int(b)


def _sample_cat(rng: np.random.Generator) -> Cat:
    u = rng.uniform
    fur_name = _pick(rng, tuple(FUR), (12, 12, 16, 13, 12, 12, 8, 7))
    pattern = _pick(rng, PATTERNS, (12, 20, 18, 18, 16, 16))
    dark = sum(FUR[fur_name]) < 330
    second_name = "white" if dark else _pick(rng, ("black", "brown", "grey") if fur_name != "grey" else ("black",))
    if pattern == "white muzzle" or (pattern in ("half mask", "eye patch") and fur_name != "white" and u() < 0.5):
        second_name = "cream" if fur_name == "white" else "white"
    if pattern == "half mask" and fur_name in ("white", "cream") and u() < 0.5:
        second_name = "ginger"
    eye_name = _pick(rng, tuple(CAT_EYES))
    return Cat(
        fur_name=fur_name,
        fur=_tint(rng, FUR[fur_name], 9),
        second_name=second_name,
        second=_tint(rng, FUR[second_name], 7),
        pattern=pattern,
        pattern_side=1 if u() < 0.5 else -1,
        pattern_size=u(0, 1),
        pattern_shift=u(-1, 1),
        width=u(13.0, 15.0),
        height=u(11.4, 13.6),
        fluff=u(0, 1),
        ear=u(7.0, 11.5),
        ear_width=u(4.2, 6.4),
        ear_x=u(0.52, 0.72),
        ear_lean=u(-0.05, 0.32),
        ear_round=u(0, 1),
        inner_ear=_tint(rng, ((244, 164, 168), (226, 138, 150), (206, 150, 140))[rng.integers(3)], 8),
        eye_name=eye_name,
        eye=_tint(rng, CAT_EYES[eye_name], 9),
        eye_x=u(5.2, 7.2),
        eye_y=u(-1.8, 0.6),
        eye_size=u(3.1, 4.3),
        eye_open=u(0.72, 1.08),
        eye_tilt=u(-0.12, 0.45),
        pupil=u(0.28, 0.66),
        muzzle=u(3.0, 4.6),
        muzzle_y=u(5.2, 6.4),
        nose=_tint(rng, ((238, 134, 148), (196, 96, 92), (78, 58, 66))[rng.integers(3)], 8),
        nose_size=u(1.5, 2.5),
        whiskers=u(7.0, 10.5),
        whisker_tilt=u(-0.25, 0.35),
        chin=u(0, 1),
    )


def _describe_person(look: Person) -> list[str]:
    words = [SKIN_WORDS[round(look.skin_tone)]]
    words.append("bald" if look.hair_style == "bald" else f"{look.hair_style} {look.hair_name} hair")
    words.append(f"{look.eye_name} eyes")
    if look.glasses != "none":
        words.append(f"{look.glasses} {look.frame_name} glasses")
    if look.beard != "none":
        words.append({"full": "a full beard"}.get(look.beard, f"a {look.beard}"))
    if look.freckles:
        words.append("freckles")
    if look.moles:
        words.append("a mole" if len(look.moles) == 1 else "moles")
    if look.earrings:
        words.append("earrings")
    if look.brow_width > 1.7:
        words.append("thick brows")
    return words


def _describe_cat(look: Cat) -> list[str]:
    pattern = {
        "solid": "solid fur",
        "striped": f"{look.second_name} stripes",
        "eye patch": f"a {look.second_name} eye patch",
        "half mask": f"a {look.second_name} half mask",
        "white muzzle": f"a {look.second_name} muzzle",
        "siamese": f"{look.second_name} points",
    }[look.pattern]
    words = [f"{look.fur_name} fur", pattern, f"{look.eye_name} eyes"]
    words.append("large ears" if look.ear > 9.8 else "small ears" if look.ear < 8.4 else "medium ears")
    if look.fluff > 0.6:
        words.append("fluffy cheeks")
    return words
