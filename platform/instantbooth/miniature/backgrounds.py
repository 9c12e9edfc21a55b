"""Draws the places a scene can be at, on a canvas of 64 x 64 units."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from instantbooth.miniature.drawing import SUPERSAMPLING, Color, Pen, ellipse, mix, points, shade, smooth

DARK_PLACES = frozenset({"city at night", "moon"})


def draw_background(place: str, size: int, seed: int, mirrored: bool) -> Image.Image:
    """The place, RGB, `size` · SUPERSAMPLING pixels wide and high; `seed` varies where things stand."""
    draw: dict[str, Callable[[np.random.Generator, int], Image.Image]] = {
        "beach": _beach,
        "forest": _forest,
        "city at night": _city_at_night,
        "snow": _snow,
        "desert": _desert,
        "living room": _living_room,
        "flower meadow": _flower_meadow,
        "moon": _moon,
    }
    image = draw[place](np.random.default_rng(seed), size * SUPERSAMPLING)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def _sky(size: int, *stops: tuple[float, Color]) -> Image.Image:
    """A vertical gradient through colours at heights given from 0 (top) to 1."""
    at = np.linspace(0, 1, 64)
    heights, colors = zip(*stops, strict=True)
    column = np.stack([np.interp(at, heights, [c[i] for c in colors]) for i in range(3)], 1)
    return Image.fromarray(column.round().astype(np.uint8)[:, None]).resize((size, size), Image.Resampling.BILINEAR)


def _hills(pen: Pen, rng: np.random.Generator, y: float, height: float, color: Color) -> None:
    phase, wave = rng.uniform(0, 6.28), rng.uniform(0.09, 0.14)
    x = np.linspace(-2, 66, 18)
    ridge = np.stack([x, y - height * np.sin(x * wave + phase)], 1)
    pen.fill(np.concatenate([ridge, points((66, 66), (-2, 66))]), color)


def _cloud(pen: Pen, x: float, y: float, size: float, color: Color) -> None:
    for dx, dy, r in ((-1.3, 0.2, 0.8), (0, -0.3, 1.15), (1.3, 0.2, 0.85)):
        pen.ellipse(x + dx * size, y + dy * size, r * size * 1.1, r * size * 0.8, color)


def _beach(rng: np.random.Generator, size: int) -> Image.Image:
    image = _sky(size, (0, (98, 190, 240)), (0.5, (206, 238, 250)))
    pen = Pen(image)
    horizon = rng.uniform(29, 33)
    sun = rng.uniform(46, 58)
    pen.glow(sun, rng.uniform(7, 12), 6.5, 6.5, (255, 246, 190), (214, 234, 224))
    _cloud(pen, rng.uniform(6, 30), rng.uniform(6, 14), 3.4, (250, 252, 252))
    shore = horizon + rng.uniform(13, 16)
    for step in range(5):
        pen.fill(
            points((0, horizon + step * 3), (64, horizon + step * 3), (64, 64), (0, 64)),
            mix((28, 122, 196), (84, 206, 214), step / 4),
        )
    _hills(pen, rng, shore - 1.6, 1.2, (240, 250, 246))
    _hills(pen, rng, shore + 0.4, 1.0, (246, 218, 158))
    _hills(pen, rng, shore + 9, 1.2, (234, 198, 132))
    trunk = rng.uniform(3, 9)
    pen.stroke([(trunk, shore + 4), (trunk + 1, 30), (trunk + 4, 18)], (150, 104, 66), 2.6)
    for dx, dy in ((-9, 3), (-7, -4), (0, -7), (7, -4), (9, 3)):
        leaf = points(
            (trunk + 4, 18),
            (trunk + 4 + dx * 0.6, 16.5 + dy * 0.9),
            (trunk + 4 + dx, 18 + dy + 2),
            (trunk + 4 + dx * 0.5, 19.5 + dy * 0.6),
        )
        pen.fill(smooth(leaf, 4), (46, 150, 84) if dy < 0 else (34, 124, 72))
    return image


def _forest(rng: np.random.Generator, size: int) -> Image.Image:
    image = _sky(size, (0, (120, 176, 96)), (0.45, (196, 222, 136)), (1, (150, 190, 100)))
    pen = Pen(image)
    for row, (color, trunk, base) in enumerate(
        (((104, 164, 88), (120, 110, 72), 44.0), ((46, 108, 62), (92, 62, 44), 52.0))
    ):
        for place in range(5 - row):
            x = place * (15 + 5 * row) + rng.uniform(-3, 3)
            wide = 2.2 + row * 1.4
            pen.fill(
                points((x - wide / 2, 0), (x + wide / 2, 0), (x + wide * 0.8, base), (x - wide * 0.8, base)), trunk
            )
            for dx, dy, r in ((-5, 5, 7), (4, 3, 8), (0, -3, 8)):
                pen.soft(ellipse(x + dx, dy + row * 2 + rng.uniform(0, 4), r, r * 0.85), color, depth=0.12, steps=2)
    _hills(pen, rng, 47, 1.5, (74, 132, 62))
    _hills(pen, rng, 54, 1.5, (48, 102, 54))
    for x in (rng.uniform(3, 12), rng.uniform(50, 60)):
        pen.fill(points((x - 1.2, 52), (x + 1.2, 52), (x + 1.4, 58), (x - 1.4, 58)), (244, 232, 212))
        pen.fill(smooth(points((x - 4, 52.5), (x - 2.6, 48.5), (x + 2.6, 48.5), (x + 4, 52.5)), 4), (210, 62, 52))
    return image


def _city_at_night(rng: np.random.Generator, size: int) -> Image.Image:
    image = _sky(size, (0, (22, 24, 66)), (0.6, (72, 54, 120)), (1, (116, 74, 132)))
    pen = Pen(image)
    pen.glow(rng.uniform(10, 54), rng.uniform(6, 10), 4.4, 4.4, (255, 248, 214), (80, 76, 128))
    for color, low, high, wide in (((52, 48, 104), 14, 30, 8.0), ((30, 30, 70), 24, 42, 11.0)):
        x = -rng.uniform(0, 5)
        while x < 64:
            width, top = wide + rng.uniform(-1.5, 1.5), rng.uniform(low, high)
            pen.fill(points((x, top), (x + width, top), (x + width, 66), (x, 66)), color)
            for wy in np.arange(top + 2.2, 64, 5.0):
                for wx in np.arange(x + 1.4, x + width - 2.6, 3.6):
                    if rng.random() < 0.62:
                        pen.fill(
                            points((wx, wy), (wx + 2.1, wy), (wx + 2.1, wy + 2.6), (wx, wy + 2.6)), (255, 212, 104)
                        )
            x += width + 0.6
    return image


def _pine(pen: Pen, x: float, y: float, tall: float, color: Color) -> None:
    pen.fill(points((x - 0.9, y - 2), (x + 0.9, y - 2), (x + 0.9, y + 2), (x - 0.9, y + 2)), (112, 84, 70))
    for step in range(3):
        top, wide = y - tall + step * tall * 0.26, tall * (0.2 + step * 0.09)
        pen.fill(
            points((x, top), (x + wide, top + tall * 0.42), (x - wide, top + tall * 0.42)), shade(color, -0.05 * step)
        )
        pen.fill(
            points((x, top), (x + wide * 0.5, top + tall * 0.2), (x - wide * 0.5, top + tall * 0.2)), (240, 247, 252)
        )


def _snow(rng: np.random.Generator, size: int) -> Image.Image:
    image = _sky(size, (0, (158, 188, 222)), (0.6, (222, 232, 244)))
    pen = Pen(image)
    _hills(pen, rng, 36, 4.0, (198, 214, 234))
    for place in range(4):
        x = 5 + place * 18 + rng.uniform(-4, 4)
        _pine(pen, x, 42 + rng.uniform(-1, 2), rng.uniform(18, 25), (76, 128, 122))
    _hills(pen, rng, 43, 2.0, (232, 240, 250))
    _hills(pen, rng, 53, 2.0, (248, 250, 254))
    for x, y in zip(rng.uniform(0, 64, 20), rng.uniform(0, 62, 20), strict=True):
        pen.ellipse(x, y, 1.25, 1.25, (255, 255, 255))
    return image


def _desert(rng: np.random.Generator, size: int) -> Image.Image:
    image = _sky(size, (0, (242, 150, 84)), (0.55, (254, 220, 152)))
    pen = Pen(image)
    pen.glow(rng.uniform(38, 56), rng.uniform(10, 16), 7.5, 7.5, (255, 250, 214), (252, 196, 122))
    mesa = rng.uniform(2, 34)
    pen.fill(points((mesa - 4, 40), (mesa, 25), (mesa + 15, 25), (mesa + 19, 40)), (206, 112, 72))
    pen.fill(points((mesa + 9, 40), (mesa + 11, 25), (mesa + 15, 25), (mesa + 19, 40)), (180, 90, 64))
    _hills(pen, rng, 38, 2.4, (226, 158, 92))
    _hills(pen, rng, 45, 2.6, (214, 138, 76))
    _hills(pen, rng, 54, 2.2, (196, 118, 64))
    for x, tall in ((rng.uniform(3, 9), 22.0), (rng.uniform(55, 60), 16.0)):
        green: Color = (64, 132, 84)
        pen.stroke([(x, 50), (x, 50 - tall)], green, 4.0)
        for side, lift in ((-1, 0.45), (1, 0.62)):
            y = 50 - tall * lift
            pen.stroke([(x, y), (x + side * 4.5, y), (x + side * 4.5, y - tall * 0.25)], green, 2.6)
        pen.stroke([(x - 0.8, 48), (x - 0.8, 50 - tall)], (98, 164, 104), 1.0)
    return image


def _living_room(rng: np.random.Generator, size: int) -> Image.Image:
    image = _sky(size, (0, (226, 178, 160)), (1, (238, 200, 178)))
    pen = Pen(image)
    shift = rng.uniform(0, 8)
    for x in np.arange(-8 + shift, 64, 8):
        pen.fill(points((x, 0), (x + 4, 0), (x + 4, 48), (x, 48)), (232, 190, 170))
    pen.fill(points((0, 50), (64, 50), (64, 64), (0, 64)), (150, 96, 66))
    pen.fill(points((0, 49), (64, 49), (64, 51), (0, 51)), (246, 232, 216))
    x = rng.uniform(2, 8)
    pen.fill(points((x, 5), (x + 18, 5), (x + 18, 27), (x, 27)), (250, 244, 234))
    pen.fill(points((x + 1.8, 6.8), (x + 16.2, 6.8), (x + 16.2, 25.2), (x + 1.8, 25.2)), (156, 212, 240))
    pen.fill(points((x + 1.8, 19), (x + 8, 16), (x + 16.2, 20), (x + 16.2, 25.2), (x + 1.8, 25.2)), (132, 190, 122))
    pen.fill(points((x + 8.2, 5), (x + 9.8, 5), (x + 9.8, 27), (x + 8.2, 27)), (250, 244, 234))
    pen.fill(points((x, 15), (x + 18, 15), (x + 18, 16.6), (x, 16.6)), (250, 244, 234))
    lamp = rng.uniform(52, 58)
    pen.glow(lamp, 17, 12, 12, (255, 236, 190), (234, 194, 170))
    pen.stroke([(lamp, 20), (lamp, 50)], (110, 76, 62), 1.5)
    pen.fill(points((lamp - 3.4, 11), (lamp + 3.4, 11), (lamp + 6.2, 20.5), (lamp - 6.2, 20.5)), (255, 222, 140))
    sofa: Color = (70, 138, 140)
    pen.soft(smooth(points((6, 37), (32, 35), (58, 37), (60, 58), (4, 58)), 5), shade(sofa, -0.1), depth=0.1, steps=2)
    for side in (3, 61):
        pen.soft(ellipse(side, 50, 5.6, 8), sofa, depth=0.14, steps=3)
    return image


def _flower_meadow(rng: np.random.Generator, size: int) -> Image.Image:
    image = _sky(size, (0, (126, 206, 246)), (0.5, (226, 244, 244)))
    pen = Pen(image)
    _cloud(pen, rng.uniform(6, 26), rng.uniform(6, 13), 3.2, (255, 255, 255))
    _cloud(pen, rng.uniform(40, 60), rng.uniform(8, 16), 2.6, (255, 255, 255))
    _hills(pen, rng, 30, 3.0, (156, 212, 116))
    _hills(pen, rng, 36, 2.0, (124, 194, 88))
    colors: tuple[Color, ...] = ((244, 92, 132), (255, 214, 70), (252, 252, 250), (170, 112, 222), (240, 80, 64))
    for row, y in enumerate((37.0, 44.0, 51.5, 59.5)):
        _hills(pen, rng, y + 1, 0.8, mix((116, 188, 82), (66, 146, 64), row / 3))
        r = 1.35 + row * 0.3
        for x in np.arange(rng.uniform(0, 6), 66, 6.2 + row * 0.8):
            color, lift = colors[int(rng.integers(len(colors)))], rng.uniform(-1.6, 1.6)
            for turn in np.arange(5) * 1.2566:
                pen.ellipse(x + np.cos(turn) * r, y + lift + np.sin(turn) * r, r * 0.85, r * 0.85, color)
            pen.ellipse(x, y + lift, r * 0.72, r * 0.72, (255, 196, 56) if color != colors[1] else (226, 120, 40))
    return image


def _moon(rng: np.random.Generator, size: int) -> Image.Image:
    image = _sky(size, (0, (12, 12, 28)), (0.7, (34, 32, 62)))
    pen = Pen(image)
    for x, y in zip(rng.uniform(0, 64, 24), rng.uniform(0, 40, 24), strict=True):
        r = rng.uniform(0.6, 1.0)
        pen.ellipse(x, y, r, r, (255, 250, 222))
    x, y = rng.uniform(9, 17), rng.uniform(10, 15)
    pen.soft(ellipse(x, y, 8.4, 8.4), (48, 124, 212), depth=0.3, steps=3)
    pen.fill(
        smooth(points((x - 5, y - 3), (x - 1, y - 5.4), (x + 1.6, y - 2), (x - 1, y + 1.4), (x - 4, y + 1)), 5),
        (88, 178, 98),
    )
    pen.fill(smooth(points((x + 1.5, y + 1), (x + 5, y + 1.6), (x + 3.6, y + 5), (x + 0.8, y + 4)), 5), (88, 178, 98))
    pen.stroke([(x - 2, y + 3.6), (x + 0.5, y + 4.2)], (240, 246, 252), 1.4)
    _hills(pen, rng, 41, 2.0, (134, 134, 146))
    _hills(pen, rng, 47, 1.6, (172, 170, 178))
    for _ in range(6):
        cx, cy = rng.uniform(0, 64), rng.uniform(48, 63)
        r = rng.uniform(2.4, 4.6)
        pen.ellipse(cx, cy, r, r * 0.5, (128, 126, 138))
        pen.ellipse(cx, cy + 0.5, r * 0.84, r * 0.36, (150, 148, 158))
    return image
