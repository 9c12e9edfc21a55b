"""Draws what a scene puts on a subject or into its hands: sweater, hats, arms, balloon, book."""

import numpy as np

from instantbooth.miniature.drawing import Color, Pen, both_sides, ellipse, mix, points, shade, smooth

CLOTHING: dict[str, Color] = {
    "red": (206, 40, 48),
    "blue": (42, 92, 206),
    "green": (48, 152, 72),
    "yellow": (248, 212, 52),
    "white": (244, 242, 240),
    "black": (44, 42, 50),
    "purple": (132, 62, 172),
    "orange": (246, 134, 32),
}
BALLOONS: tuple[Color, ...] = ((232, 52, 66), (252, 196, 48), (66, 158, 238), (244, 110, 170))


def clothing_color(name: str, shift: float) -> Color:
    """The colour of that name in a shade of its own; `shift` from -1 (darker) to 1 (lighter)."""
    return shade(CLOTHING[name], shift * (0.05 if name == "white" else 0.10))


def draw_body(pen: Pen, color: Color, skin: Color, chin: float) -> None:
    """Neck and sweater, around the head's centre; `chin` is the height of the head's lower edge."""
    top = chin - 1.5
    pen.fill(points((-5, top - 4), (5, top - 4), (6, top + 4), (-6, top + 4)), shade(skin, -0.24))
    outline = smooth(
        both_sides((5.5, top + 0.6), (10.5, top + 2.6), (15.8, top + 6.6), (17.6, top + 14), (18.2, 56), (6, 60))
    )
    pen.soft(outline, color, depth=0.24, steps=4)
    fold = shade(color, -0.3)
    for side in (-1, 1):
        pen.stroke([(side * 12.2, 48), (side * 12.2, top + 14), (side * 11.6, top + 10)], fold, 0.9)
    pen.fill(
        smooth(
            points(
                (-7.2, top + 0.6), (0, top + 3.0), (7.2, top + 0.6), (6.4, top + 4.2), (0, top + 6.2), (-6.4, top + 4.2)
            )
        ),
        shade(color, -0.22),
    )
    pen.fill(
        smooth(
            points(
                (-6.6, top + 0.4), (0, top + 2.6), (6.6, top + 0.4), (6.2, top + 2.2), (0, top + 4.2), (-6.2, top + 2.2)
            )
        ),
        shade(color, 0.16),
    )


def draw_hat(pen: Pen, name: str, width: float, brow: float) -> None:
    """A hat of that name on a head of half width `width`, its lower edge at height `brow`."""
    {"top hat": _draw_top_hat, "crown": _draw_crown, "beanie": _draw_beanie, "straw hat": _draw_straw_hat}[name](
        pen, width, brow
    )


def _draw_top_hat(pen: Pen, w: float, y: float) -> None:
    felt: Color = (52, 44, 64)
    crown = points((-w * 0.74, y - 15.5), (w * 0.74, y - 15.5), (w * 0.66, y), (-w * 0.66, y))
    pen.soft(crown, felt, depth=0.2, steps=3)
    pen.ellipse(0, y - 15.5, w * 0.74, 1.7, shade(felt, 0.16))
    pen.fill(
        points((-w * 0.685, y - 5.2), (w * 0.685, y - 5.2), (w * 0.66, y - 0.8), (-w * 0.66, y - 0.8)), (196, 42, 62)
    )
    pen.soft(ellipse(0, y, w * 1.16, 2.6), shade(felt, 0.05), depth=0.2, steps=2)


def _draw_crown(pen: Pen, w: float, y: float) -> None:
    gold: Color = (250, 196, 44)
    r, top = w * 0.84, y - 10.5
    spikes = points(
        (-r, y + 0.6),
        (-r * 1.12, top + 1),
        (-r * 0.55, y - 4.8),
        (0, top - 1.6),
        (r * 0.55, y - 4.8),
        (r * 1.12, top + 1),
        (r, y + 0.6),
        (0, y + 2.0),
    )
    pen.fill(spikes, shade(gold, -0.22))
    pen.fill((spikes - (0, y)) * 0.93 + (pen.light * 0.3, y - 0.3), gold)
    for x, height in ((-r * 1.12, top + 0.6), (0.0, top - 2), (r * 1.12, top + 0.6)):
        pen.ellipse(x, height, 1.7, 1.7, shade(gold, 0.3))
    pen.stroke([(-r * 0.96, y - 0.6), (0, y + 0.8), (r * 0.96, y - 0.6)], shade(gold, -0.2), 1.6)
    for x, jewel in ((-r * 0.55, (54, 140, 226)), (0.0, (216, 40, 66)), (r * 0.55, (54, 140, 226))):
        pen.ellipse(x, y - 2.9 + (0.5 if x == 0 else 0), 1.45, 1.6, jewel)


def _draw_beanie(pen: Pen, w: float, y: float) -> None:
    wool: Color = (222, 66, 92)
    r = w * 1.02
    angle = np.linspace(np.pi, 2 * np.pi, 17)
    dome = np.stack([r * np.cos(angle), y + 12.0 * np.sin(angle)], 1)
    pen.soft(dome, wool, depth=0.22, steps=3)
    for left in (-0.62, 0.0, 0.62):
        x = left * r
        pen.stroke([(x * 0.55, y - 10.8), (x, y - 3)], shade(wool, -0.16), 1.2)
    pen.soft(
        smooth(
            points(
                (-r * 1.04, y - 4.4),
                (0, y - 5.0),
                (r * 1.04, y - 4.4),
                (r * 1.05, y + 0.4),
                (0, y + 1.0),
                (-r * 1.05, y + 0.4),
            ),
            4,
        ),
        (250, 238, 226),
        depth=0.14,
        steps=3,
    )
    pen.soft(ellipse(0, y - 13.6, 3.7, 3.5), (250, 238, 226), depth=0.14, steps=3)


def _draw_straw_hat(pen: Pen, w: float, y: float) -> None:
    straw: Color = (236, 206, 132)
    pen.fill(ellipse(0, y + 0.2, w * 1.42, 3.9), shade(straw, -0.3))
    pen.soft(ellipse(0, y - 0.4, w * 1.42, 3.6), straw, depth=0.12, steps=3)
    dome = smooth(both_sides((w * 0.3, y - 10.6), (w * 0.68, y - 8.6), (w * 0.8, y - 1.2), (w * 0.3, y + 0.8)), 5)
    pen.soft(dome, straw, depth=0.2, steps=3)
    band = points(
        (-w * 0.80, y - 4.4), (0, y - 3.2), (w * 0.80, y - 4.4), (w * 0.82, y - 1.0), (0, y + 0.6), (-w * 0.82, y - 1.0)
    )
    pen.fill(smooth(band, 4), (66, 134, 198))


def draw_arm(pen: Pen, start: tuple[float, float], hand: tuple[float, float], color: Color) -> None:
    """A sleeve from shoulder to wrist with its cuff."""
    pen.stroke([start, hand], shade(color, -0.26), 8.2)
    pen.stroke([start, hand], color, 6.6)
    along = np.array(hand) - start
    cuff = np.array(start) + along * (1 - 1.2 / max(1.0, float(np.hypot(*along))))
    across = np.array([-along[1], along[0]]) / max(1.0, float(np.hypot(*along))) * 2.4
    pen.stroke([tuple(cuff - across), tuple(cuff + across)], shade(color, -0.28), 2.2)


def draw_open_hand(pen: Pen, x: float, y: float, skin: Color, side: int, paw: Color | None) -> None:
    """A hand held up, fingers spread; a paw with pads in that colour where one is given."""
    rim = shade(skin, -0.32)
    fan = (-0.75, -0.25, 0.25, 0.75) if paw is None else (-0.6, 0.0, 0.6)
    reach, thick = (7.2, 1.9) if paw is None else (4.4, 3.0)
    for ink, extra in ((rim, 1.1), (skin, 0.0)):
        for turn in fan:
            pen.stroke([(x, y), (x + np.sin(turn) * reach, y - np.cos(turn) * reach)], ink, thick + extra)
        if paw is None:
            pen.stroke([(x, y + 1), (x - side * 4.6, y - 0.6)], ink, thick + extra)
        pen.ellipse(x, y, 3.6 + extra / 2, 3.7 + extra / 2, ink)
    if paw is not None:
        pen.ellipse(x, y + 0.9, 2.1, 1.7, paw)
        for turn in fan:
            pen.ellipse(x + np.sin(turn) * 4.2, y - np.cos(turn) * 4.2, 0.95, 1.05, paw)


def draw_fist(pen: Pen, x: float, y: float, skin: Color) -> None:
    """A closed hand or paw."""
    pen.ellipse(x, y, 3.6, 3.4, shade(skin, -0.32))
    pen.ellipse(x, y, 3.0, 2.8, skin)
    for dx in (-1.1, 0.9):
        pen.stroke([(x + dx, y - 0.4), (x + dx, y + 1.4)], shade(skin, -0.25), 0.7)


def draw_balloon(pen: Pen, x: float, y: float, size: float, hand: tuple[float, float], color: Color) -> None:
    """A balloon of half width `size` and the string that leads to the hand."""
    pen.stroke([(x, y + size), ((x + hand[0]) / 2 + 0.8, (y + hand[1]) / 2 + 3), hand], (250, 246, 238), 0.9)
    pen.fill(points((x - 1.5, y + size * 1.3), (x + 1.5, y + size * 1.3), (x, y + size * 0.9)), shade(color, -0.25))
    pen.soft(ellipse(x, y, size, size * 1.14), color, depth=0.26, steps=4)
    pen.ellipse(
        x + pen.light * size * 0.4, y - size * 0.46, size * 0.2, size * 0.28, mix(color, (255, 255, 255), 0.75), 0.5
    )


def draw_book(pen: Pen, x: float, y: float, cover: Color) -> None:
    """An open book, 23 wide and 11 high, around its centre."""
    pen.fill(
        points((x - 12, y - 5.6), (x, y - 3.8), (x + 12, y - 5.6), (x + 12, y + 5.2), (x, y + 7), (x - 12, y + 5.2)),
        cover,
    )
    for side, tone in ((-1, (255, 251, 238)), (1, (240, 230, 208))):
        page = ((0.3, -3.9), (4, -6.0), (10.6, -6.2), (10.6, 3.6), (4, 3.7), (0.3, 5.4))
        pen.fill(points(*((x + side * px, y + py) for px, py in page)), tone)
        for row in (-3.2, -0.6, 2.0):
            pen.stroke([(x + side * 2.8, y + row), (x + side * 8.6, y + row - 0.4)], (184, 168, 156), 0.9)
