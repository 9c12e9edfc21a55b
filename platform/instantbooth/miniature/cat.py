"""Draws a cat's head, in units of pixels of a medium picture around the head's centre."""

from instantbooth.miniature.drawing import Color, Pen, Points, both_sides, ellipse, points, shade, smooth
from instantbooth.miniature.identity import Cat


def draw_cat_ears(pen: Pen, look: Cat) -> None:
    """Both ears, with their roots inside the head."""
    color = look.second if look.pattern == "siamese" else look.fur
    for side in (-1, 1):
        shaded = color
        if look.pattern == "half mask" and side == look.pattern_side:
            shaded = look.second
        pen.soft(_ear(look, side, 1.0), shaded, depth=0.2, steps=3)
        pen.fill(_ear(look, side, 0.58), shade(look.inner_ear, -0.08))


def draw_cat(pen: Pen, look: Cat, gaze: tuple[float, float]) -> None:
    """The head without ears."""
    face = _head_outline(look)
    pen.soft(face, look.fur, depth=0.18, steps=5)
    _draw_pattern(pen, look, face)
    for side in (-1, 1):
        _draw_eye(pen, look, side, gaze)
    _draw_muzzle(pen, look)


def _head_outline(look: Cat) -> Points:
    """The head without ears, a smooth closed curve."""
    w, h, fluff = look.width, look.height, look.fluff
    return smooth(
        both_sides(
            (0, -h),
            (w * 0.62, -h * 0.88),
            (w * 0.97, -h * 0.25),
            (w + fluff * 1.2, h * 0.26),
            (w * 0.93 + fluff * 2.2, h * 0.52),
            (w * 0.62, h * 0.86),
            (w * 0.25, h * 1.0),
        ),
        4,
    )


def _ear(look: Cat, side: int, size: float) -> Points:
    x, base = look.ear_x * look.width, -look.height * 0.62
    half, tall = look.ear_width * size, (look.ear + 2.5) * size
    lean = look.ear_lean * tall
    tip = 0.16 + 0.5 * look.ear_round
    y = base - (1 - size) * 2.2
    corners = (
        (x - half, y),
        (x - half * (0.5 + 0.2 * look.ear_round) + lean * 0.5, y - tall * 0.62),
        (x - half * tip * 0.5 + lean, y - tall * 0.98),
        (x + half * tip * 0.5 + lean, y - tall),
        (x + half * (0.7 + 0.1 * look.ear_round) + lean * 0.6, y - tall * 0.5),
        (x + half + 1.0 * size, y + 3 * size),
    )
    return smooth(points(*((side * px, py) for px, py in corners)), 4)


def _draw_pattern(pen: Pen, look: Cat, face: Points) -> None:
    w, h, side, size = look.width, look.height, look.pattern_side, look.pattern_size
    color = look.second
    if look.pattern == "striped":
        for x, length in ((-4.6, 4.2), (0.0, 6.0), (4.6, 4.2)):
            length *= 0.85 + 0.4 * size
            x += look.pattern_shift * 0.6
            pen.stroke([(x * 1.12, -h * 0.86), (x, -h * 0.86 + length)], color, 1.7 + 0.8 * size)
        for y in (1.2, 4.6):
            for s in (-1, 1):
                pen.stroke([(s * w * 0.93, y), (s * (w * 0.93 - 2.6 - 1.6 * size), y + 0.5)], color, 1.6 + 0.5 * size)
    elif look.pattern == "eye patch":
        x, y = side * (look.eye_x + 0.5), look.eye_y - 0.2 + look.pattern_shift
        pen.soft(ellipse(x, y, 5.4 + size * 1.1, 5.6 + size * 1.6, side * 0.3), color, depth=0.1, steps=2)
    elif look.pattern == "half mask":
        x0 = look.pattern_shift * 1.2
        half = face[face[:, 0] * side >= x0 * side]
        order = half if side > 0 else half[half[:, 1].argsort()]
        pen.soft(order, color, depth=0.12, steps=2)
    elif look.pattern == "siamese":
        pen.glow(0, look.muzzle_y - 1, w * (0.52 + 0.16 * size), h * (0.58 + 0.1 * size), color, shade(look.fur, -0.1))
    elif look.pattern == "white muzzle":
        blaze = both_sides(
            (0, -h * (0.5 + 0.3 * size)),
            (1.4 + size, -2),
            (look.muzzle + 1.5, look.muzzle_y - 1.4),
            (look.muzzle + 3.2, look.muzzle_y + 3.2),
            (3, h * 0.96),
        )
        pen.fill(smooth(blaze), color)


def _draw_eye(pen: Pen, look: Cat, side: int, gaze: tuple[float, float]) -> None:
    x, y, rx = side * look.eye_x, look.eye_y, look.eye_size
    ry, tilt = rx * look.eye_open, -side * look.eye_tilt
    pen.ellipse(x, y - 0.1, rx + 0.75, ry + 0.75, (40, 30, 40), tilt)
    pen.ellipse(x, y, rx, ry, shade(look.eye, -0.22), tilt)
    pen.ellipse(x, y + 0.35, rx * 0.88, ry * 0.84, shade(look.eye, 0.12), tilt)
    ix, iy = x + gaze[0] * 0.7, y + gaze[1] * 0.4
    pen.ellipse(ix, iy, rx * look.pupil, ry * 0.86, (24, 18, 26))
    pen.ellipse(ix - rx * 0.3, iy - ry * 0.4, 0.95, 0.95, (255, 255, 255))


def _draw_muzzle(pen: Pen, look: Cat) -> None:
    m, y, n = look.muzzle, look.muzzle_y, look.nose_size
    if look.pattern == "white muzzle":
        light: Color = look.second
    elif look.pattern == "siamese":
        light = shade(look.second, 0.12)
    else:
        light = shade(look.fur, 0.42)
    for side in (-1, 1):
        pen.ellipse(side * m * 0.62, y + 1.5, m * 0.86, m * 0.66, light)
    pen.ellipse(0, y + 2.4 + look.chin, m * 0.6, 2.2, light)
    ink = (66, 40, 48) if sum(light) > 260 else (150, 120, 130)
    pen.stroke(
        [(-m * 0.72, y + 2.6), (-m * 0.36, y + 3.3), (0, y + 2.2), (m * 0.36, y + 3.3), (m * 0.72, y + 2.6)], ink, 0.95
    )
    pen.stroke([(0, y + 0.4), (0, y + 2.2)], ink, 0.95)
    pen.soft(
        smooth(both_sides((0, y - n * 0.5), (n * 0.9, y - n * 0.5), (n * 0.75, y + n * 0.1), (0, y + n * 0.75))),
        look.nose,
        depth=0.1,
        steps=2,
    )
    whisker = (250, 248, 244) if sum(look.fur) < 480 else (120, 104, 108)
    for side in (-1, 1):
        for rise in (-0.9, 1.0):
            start = (side * (m * 0.9 + 0.8), y + 1.2 + rise * 0.6)
            end = (side * (m * 0.9 + look.whiskers), y + 1.0 + rise * 1.8 - look.whisker_tilt * 5)
            pen.stroke([start, end], whisker, 0.6)
