"""Draws a person's hair, in units of pixels of a medium picture around the head's centre."""

import numpy as np

from instantbooth.miniature.drawing import Color, Pen, Points, both_sides, ellipse, mix, points, shade, smooth
from instantbooth.miniature.identity import Person


def draw_back_hair(pen: Pen, look: Person, hat: bool) -> None:
    """The hair that falls behind the face."""
    w, h, style = look.width, look.height, look.hair_style
    under = shade(look.hair, -0.24)
    if style == "bob":
        wide, low = w + 2.2 + look.hair_volume * 2.2, 6.5 + look.hair_length * 5
        pen.soft(
            smooth(both_sides((0, -h - 1.5), (w * 0.62, -h * 0.96), (wide, -2), (wide + 0.8, low), (w - 3, low + 2))),
            under,
        )
    elif style == "long straight":
        wide, low = w + 1.3 + look.hair_volume * 1.5, 17 + look.hair_length * 7
        pen.soft(
            smooth(
                both_sides(
                    (0, -h - 1.5),
                    (w * 0.62, -h * 0.96),
                    (wide, -2),
                    (wide + 0.8, low * 0.6),
                    (wide - 1.5, low * 0.9),
                    (w * 0.55, low + 1.5),
                )
            ),
            under,
        )
    elif style == "curly":
        pen.soft(_curls(look, hat), under, steps=3)
    elif style == "pigtails":
        length = 5.5 + look.hair_length * 4
        for side in (-1, 1):
            x = side * (w + 3.6)
            pen.soft(ellipse(x + side, 3 + length * 0.7, 3.6 + look.hair_volume * 1.2, length, -side * 0.16), look.hair)
            pen.ellipse(x - side * 0.6, -1.5, 2.2, 2.0, look.tie)
    elif style == "bun" and not hat:
        size = 4.8 + look.hair_volume * 1.8
        pen.soft(ellipse(look.parting * 5, -h - size * 0.62, size, size * 0.9), look.hair)
        pen.ellipse(look.parting * 5, -h - 0.8, size * 0.62, 1.3, look.tie)


def draw_front_hair(pen: Pen, look: Person, hat: bool) -> None:
    """The hair on the skull; under a hat it lies flat."""
    w, h, style = look.width, look.height, look.hair_style
    if style == "bald":
        pen.glow(pen.light * w * 0.32, -h * 0.62, 3.6, 2.0, shade(look.skin, 0.6), shade(look.skin, 0.2))
        return
    if style == "mohawk":
        _draw_mohawk(pen, look, hat)
        return
    pen.soft(_cap(look, hat), look.hair, depth=0.26, steps=4)
    _draw_shine(pen, look, hat)
    if style in ("bob", "long straight", "curly"):
        _draw_locks(pen, look)


def _curls(look: Person, hat: bool) -> Points:
    spread, low = 2.4 + look.hair_volume * 2.9, 5 + look.hair_length * 7
    angle = np.linspace(0, 2 * np.pi, 72, False)
    bump = 1 + 0.055 * np.abs(np.sin(angle * 6.5))
    x = (look.width + spread) * np.cos(angle) * bump
    y = np.where(np.sin(angle) > 0, low + 4, look.height + spread) * np.sin(angle) * bump
    return np.stack([x, np.maximum(y, -look.height * 0.62) if hat else y], 1)


def _cap(look: Person, hat: bool) -> Points:
    """The hair on the skull: from temple over the top to the other temple and back along the hairline."""
    w, h, style = look.width, look.height, look.hair_style
    lift = {"short": 1.0 + look.hair_volume * 2.2, "curly": 2.8 + look.hair_volume * 2, "bun": 0.9}.get(
        style, 1.6 + look.hair_volume
    )
    temple = {"short": -0.06, "side parted": 0.02, "bun": -0.12, "pigtails": 0.0}.get(style, 0.1) * h
    angle = np.linspace(np.pi * 0.99, np.pi * 2.01, 15)
    outer = np.stack(
        [(w + 1.0) * np.cos(angle), (h + (0.8 if hat else lift)) * np.sin(angle) + temple * np.abs(np.cos(angle)) ** 3],
        1,
    )
    return np.concatenate([outer, _hairline(look, temple)])


def _hairline(look: Person, temple: float) -> Points:
    """Where the hair ends on the forehead, from the right temple (at that height) to the left one, shape (n, 2)."""
    w, h, style = look.width, look.height, look.hair_style
    f = -h * (0.44 + 0.24 * look.hairline)
    if style in ("bob", "long straight"):
        inner = [
            (w - 2.2, temple - 0.5),
            (w - 3.0, f * 0.8),
            (5, f),
            (-5, f),
            (3 - w, f * 0.8),
            (2.2 - w, temple - 0.5),
        ]
    elif style == "side parted":
        p = look.parting * w
        low, high = (w - 2.0, temple - 1), (w - 3.2, f * 0.72)
        inner = [
            low,
            high,
            ((w - 3 + p) / 2, f * 0.98),
            (p, -h * 0.84),
            ((3 - w + p) / 2, f * 0.98),
            (-high[0], high[1]),
            (-low[0], low[1]),
        ]
    elif style == "pigtails":
        inner = [
            (w - 1.8, temple - 1),
            (w - 3.4, f * 0.8),
            (4, f * 1.04),
            (0, -h * 0.86),
            (-4, f * 1.04),
            (3.4 - w, f * 0.8),
            (1.8 - w, temple - 1),
        ]
    elif style == "curly":
        inner = [
            (w - 1.6, temple),
            (w - 3.5, f * 0.7),
            (6, f * 0.98),
            (2, f * 0.84),
            (-2, f),
            (-6, f * 0.86),
            (3.5 - w, f * 0.75),
            (1.6 - w, temple),
        ]
    else:
        inner = [
            (w - 1.4, temple - 1),
            (w - 2.8, f * 0.75),
            (5.5, f * 1.12),
            (0, f * 1.22),
            (-5.5, f * 1.12),
            (2.8 - w, f * 0.75),
            (1.4 - w, temple - 1),
        ]
    return np.array(inner)


def _draw_shine(pen: Pen, look: Person, hat: bool) -> None:
    if hat:
        return
    w, h = look.width, look.height
    tone = shade(look.hair, 0.24)
    x = pen.light * w * 0.42
    pen.stroke(
        [(x - 3.6, -h * 0.80), (x, -h * 0.93), (x + 3.6, -h * 0.88)]
        if pen.light < 0
        else [(x - 3.6, -h * 0.88), (x, -h * 0.93), (x + 3.6, -h * 0.80)],
        tone,
        1.5,
    )


def _draw_locks(pen: Pen, look: Person) -> None:
    w = look.width
    low = {
        "bob": 5 + look.hair_length * 4.5,
        "long straight": 14 + look.hair_length * 6,
        "curly": 3.0 + look.hair_length * 4,
    }[look.hair_style]
    out = w + (2.6 if look.hair_style == "curly" else 1.2)
    for side in (-1, 1):
        lock = points(
            (side * (w - 2.4), -3.5),
            (side * out, -3),
            (side * (out + 1.2), low * 0.6),
            (side * out, low),
            (side * (w - 1.6), low * 0.9),
            (side * (w - 0.6), low * 0.3),
        )
        pen.soft(smooth(lock), look.hair, depth=0.2, steps=3)


def _draw_mohawk(pen: Pen, look: Person, hat: bool) -> None:
    w, h = look.width, look.height
    stubble: Color = mix(look.skin, look.hair, 0.34)
    angle = np.linspace(np.pi * 1.04, np.pi * 1.96, 13)
    outer = np.stack([(w + 0.2) * np.cos(angle), (h + 0.3) * np.sin(angle)], 1)
    pen.fill(
        np.concatenate([outer, points((w - 2.2, -h * 0.3), (6, -h * 0.66), (-6, -h * 0.66), (2.2 - w, -h * 0.3))]),
        stubble,
    )
    if hat:
        pen.soft(smooth(both_sides((3.4, -h * 0.9), (2.6, -h * 0.42), (0, -h * 0.34))), look.hair, steps=3)
        return
    tall = h + 4.5 + look.hair_volume * 4
    pen.soft(
        smooth(
            both_sides(
                (0, -tall), (2.4, -tall + 1), (4.2 + look.hair_length, -h * 0.9), (3.0, -h * 0.5), (0, -h * 0.42)
            )
        ),
        look.hair,
        depth=0.26,
    )
