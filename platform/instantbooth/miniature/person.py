"""Draws a person's head, in units of pixels of a medium picture around the head's centre."""

import numpy as np

from instantbooth.miniature.drawing import Pen, Points, both_sides, ellipse, mix, points, shade, smooth
from instantbooth.miniature.hair import draw_front_hair
from instantbooth.miniature.identity import Person


def draw_person(pen: Pen, look: Person, hat: bool, gaze: tuple[float, float]) -> None:
    """The head with its face and the hair in front of it."""
    _draw_ears(pen, look)
    face = _face_outline(look)
    pen.soft(face, look.skin, depth=0.17, steps=5)
    _draw_complexion(pen, look)
    if look.beard != "none":
        _draw_beard(pen, look)
    _draw_mouth(pen, look)
    _draw_nose(pen, look)
    for side in (-1, 1):
        _draw_eye(pen, look, side, gaze)
    draw_front_hair(pen, look, hat)
    for side in (-1, 1):
        _draw_brow(pen, look, side)
    if look.glasses != "none":
        _draw_glasses(pen, look)


def _face_outline(look: Person) -> Points:
    """The head without hair, shape (36, 2)."""
    angle = np.linspace(0, 2 * np.pi, 36, False)
    cos, sin = np.cos(angle), np.sin(angle)
    power = 2 / look.squareness
    x = look.width * np.sign(cos) * np.abs(cos) ** power
    y = look.height * np.sign(sin) * np.abs(sin) ** power
    x = x * np.where(y > 0, 1 - 0.30 * look.jaw * (y / look.height) ** 2, 1)
    return np.stack([x, y], 1)


def _draw_eye(pen: Pen, look: Person, side: int, gaze: tuple[float, float]) -> None:
    x, y, rx = side * look.eye_x, look.eye_y, look.eye_size
    ry = rx * look.eye_open
    dark = (44, 30, 40)
    pen.ellipse(x, y - 0.25, rx + 0.5, ry + 0.55, shade(look.skin, -0.42), side * look.lid)
    pen.ellipse(x, y, rx, ry, (255, 253, 248), side * look.lid)
    iris = min(rx, ry) * 0.84
    ix, iy = x + gaze[0] * (rx - iris) * 0.9, y + gaze[1] * 0.5 + 0.15
    pen.ellipse(ix, iy, iris, iris, shade(look.eye, -0.34))
    pen.ellipse(ix, iy + 0.2, iris * 0.82, iris * 0.82, shade(look.eye, 0.1))
    pen.ellipse(ix, iy, iris * 0.45, iris * 0.45, (24, 18, 26))
    pen.ellipse(ix - iris * 0.36, iy - iris * 0.42, iris * 0.3, iris * 0.3, (255, 255, 255))
    tilt = side * look.lid * rx
    pen.stroke(
        [
            (x - rx, y - ry * 0.42 - tilt),
            (x - rx * 0.5, y - ry * 0.92 - tilt / 2),
            (x + rx * 0.5, y - ry * 0.92 + tilt / 2),
            (x + rx, y - ry * 0.42 + tilt),
        ],
        dark,
        0.85,
    )


def _draw_ears(pen: Pen, look: Person) -> None:
    for side in (-1, 1):
        x = side * (look.width + look.ear * 0.25)
        pen.ellipse(x, look.ear_y, look.ear * 0.95, look.ear * 1.25, shade(look.skin, -0.14))
        pen.ellipse(
            x - side * 0.2,
            look.ear_y,
            look.ear * 0.5,
            look.ear * 0.75,
            mix(shade(look.skin, -0.2), (220, 90, 80), 0.22),
        )
        if look.earrings:
            pen.ellipse(x + side * 0.4, look.ear_y + look.ear * 1.25 + 1.0, 1.55, 1.55, shade(look.earrings, -0.2))
            pen.ellipse(x + side * 0.2, look.ear_y + look.ear * 1.25 + 0.8, 1.05, 1.05, shade(look.earrings, 0.2))


def _draw_complexion(pen: Pen, look: Person) -> None:
    rosy = mix(look.skin, (236, 84, 86), 0.1 + look.blush * 0.5)
    for side in (-1, 1):
        pen.glow(side * (look.eye_x + 2.0), look.nose_y + 1.0, 3.4, 2.4, rosy, mix(look.skin, rosy, 0.25))
        if look.freckles:
            for dx, dy in ((-1.9, -0.6), (0.3, 0.7), (2.3, -0.5)):
                pen.ellipse(
                    side * (look.eye_x + 1.0 + dx),
                    look.nose_y + dy,
                    look.freckles,
                    look.freckles,
                    mix(shade(look.skin, -0.3), (168, 74, 30), 0.45),
                )
    for x, y, size in look.moles:
        pen.ellipse(x, y, size, size, (66, 36, 34))


def _draw_beard(pen: Pen, look: Person) -> None:
    w, h, y = look.width, look.height, look.mouth_y
    color = shade(look.hair, -0.06)
    if look.beard == "full":
        narrow = 1 - 0.24 * look.jaw
        drop = h + 1.2 + look.beard_size * 3.5
        side = (w * 1.0, 3), (w * 0.98, 6.5), (w * 0.86 * narrow, h * 0.74), (w * 0.45 * narrow, drop - 0.8), (0, drop)
        inner = (3, y - 2.4), (w * 0.52, y - 1.8), (w * 0.78, 4.5)
        right = [*side, *((-x, v) for x, v in side[-2::-1]), *((-x, v) for x, v in inner[::-1]), *inner]
        pen.soft(smooth(points(*right), 4), color, depth=0.14, steps=2)
        pen.ellipse(0, y + 0.4, look.mouth_width + 0.7, 1.9, shade(look.skin, -0.1))
    if look.beard == "goatee":
        pen.soft(
            smooth(
                both_sides(
                    (0, y + 2.1),
                    (2.6 + look.beard_size, y + 2.3),
                    (2.2 + look.beard_size, h - 0.6),
                    (0, h + 1.6 + look.beard_size * 1.5),
                )
            ),
            color,
            depth=0.12,
            steps=2,
        )
    if look.beard == "moustache":
        span = look.mouth_width + 0.8 + look.beard_size
        pen.fill(
            smooth(
                both_sides(
                    (0, y - 2.6), (span * 0.5, y - 3.0), (span + 0.8, y - 0.5), (span * 0.5, y - 0.5), (0, y - 1.0)
                )
            ),
            color,
        )


def _draw_mouth(pen: Pen, look: Person) -> None:
    m, y, s = look.mouth_width, look.mouth_y, look.smile
    pen.stroke(
        [(-m, y - s * 0.55), (-m * 0.5, y + s * 0.3), (0, y + s * 0.55), (m * 0.5, y + s * 0.3), (m, y - s * 0.55)],
        mix(look.lip, (70, 20, 30), 0.25),
        1.25,
    )
    pen.stroke([(-m * 0.4, y + s * 0.5 + 1.0), (m * 0.4, y + s * 0.5 + 1.0)], mix(look.lip, look.skin, 0.45), 0.9)


def _draw_nose(pen: Pen, look: Person) -> None:
    n, y = look.nose, look.nose_y
    pen.ellipse(0, y, n * 1.05, n * 0.82, mix(shade(look.skin, -0.24), (206, 84, 70), 0.24))
    pen.ellipse(pen.light * 0.25, y - 0.45, n * 0.74, n * 0.56, mix(shade(look.skin, 0.16), (236, 120, 100), 0.12))


def _draw_brow(pen: Pen, look: Person, side: int) -> None:
    y = look.eye_y - look.brow_lift
    color = shade(look.hair, -0.3) if look.hair_name not in ("white", "grey") else shade(look.hair, -0.42)
    rise = look.brow_tilt * 2.6
    x = look.eye_x
    pen.stroke(
        [(side * (x - 2.6), y + rise), (side * x, y - 0.7), (side * (x + 2.8), y - rise + 0.3)], color, look.brow_width
    )


def _draw_glasses(pen: Pen, look: Person) -> None:
    r = look.frame_size
    for side in (-1, 1):
        x, y = side * max(look.eye_x, r + 0.5), look.eye_y
        ring = (
            ellipse(x, y, r, r)
            if look.glasses == "round"
            else points(
                (x - r, y - r * 0.78), (x + r, y - r * 0.78), (x + r * 0.9, y + r * 0.86), (x - r * 0.9, y + r * 0.86)
            )
        )
        pen.stroke([*map(tuple, ring), tuple(ring[0]), tuple(ring[1])], look.frame, 1.35)
        pen.stroke([(x + side * r, y - 0.6), (side * look.width, y - 1.2)], look.frame, 1.2)
    inner = max(look.eye_x, r + 0.5) - r
    pen.stroke([(-inner, look.eye_y - 0.6), (inner, look.eye_y - 0.6)], look.frame, 1.3)
