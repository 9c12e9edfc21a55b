"""Vector drawing on a supersampled canvas: colours, curves and a pen with its own frame of reference."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Points = npt.NDArray[np.float64]

SUPERSAMPLING = 4
_CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 28, False)), np.sin(np.linspace(0, 2 * np.pi, 28, False))], 1)


def mix(first: Color, second: Color, amount: float) -> Color:
    """The colour `amount` (0-1) of the way from the first to the second."""
    r, g, b = (min(255, max(0, round(x + (y - x) * amount))) for x, y in zip(first, second, strict=True))
    return r, g, b


def shade(color: Color, amount: float) -> Color:
    """Lighter (positive, towards warm white) or darker (negative, towards deep violet) by `amount` (-1 to 1)."""
    return mix(color, (255, 250, 236), amount) if amount > 0 else mix(color, (34, 20, 48), -amount)


def points(*pairs: tuple[float, float]) -> Points:
    """Corner points, shape (n, 2)."""
    return np.array(pairs, dtype=np.float64)


def both_sides(*pairs: tuple[float, float]) -> Points:
    """A closed outline, symmetric about x = 0, from its right half; corners on the axis count once."""
    half = points(*pairs)
    return np.concatenate([half, half[half[:, 0] > 0][::-1] * (-1.0, 1.0)])


def ellipse(x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> Points:
    """The outline of an ellipse; `tilt` in radians, shape (28, 2)."""
    cos, sin = np.cos(tilt), np.sin(tilt)
    turn = np.array([[cos, sin], [-sin, cos]])
    return np.asarray((_CIRCLE * (rx, ry)) @ turn + (x, y), dtype=np.float64)


def smooth(corners: Points, steps: int = 6) -> Points:
    """The closed Catmull-Rom curve through the corners, shape (n · steps, 2)."""
    t = np.linspace(0, 1, steps, False)[None, :, None]
    a, b, c, d = (np.roll(corners, shift, 0)[:, None] for shift in (1, 0, -1, -2))
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.asarray(curve.reshape(-1, 2))


class Pen:
    """Draws shapes given in local units onto a canvas, and keeps account of which pixels belong to the subject.

    The local frame is turned by `angle` (radians), scaled by `scale` (pixels of the final picture per unit) and moved
    to `origin` (pixels of the final picture). While `subject` is true what is drawn counts as subject in the mask.
    """

    def __init__(
        self,
        canvas: Image.Image,
        mask: Image.Image | None = None,
        *,
        origin: tuple[float, float] = (0.0, 0.0),
        scale: float = 1.0,
        angle: float = 0.0,
        light: float = -1.0,
    ) -> None:
        self._canvas, self._mask = canvas, mask
        self._draw = ImageDraw.Draw(canvas)
        self._mask_draw = ImageDraw.Draw(mask) if mask is not None else None
        self._scale, self._origin = scale * SUPERSAMPLING, np.array(origin) * SUPERSAMPLING
        cos, sin = np.cos(angle) * self._scale, np.sin(angle) * self._scale
        self._matrix = np.array([[cos, sin], [-sin, cos]])
        self.light = light
        self.subject = True

    def fill(self, outline: Points, color: Color) -> None:
        """A closed shape in one colour."""
        corners = (outline @ self._matrix + self._origin).ravel().tolist()
        self._draw.polygon(corners, fill=color)
        if self._mask_draw is not None:
            self._mask_draw.polygon(corners, fill=255 if self.subject else 0)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Color, tilt: float = 0.0) -> None:
        """A filled ellipse."""
        self.fill(ellipse(x, y, rx, ry, tilt), color)

    def soft(self, outline: Points, color: Color, depth: float = 0.22, steps: int = 4) -> None:
        """A closed shape lit from the upper left or right (`light` -1 or 1): nested tones, dark rim to bright heart."""
        low, high = outline.min(0), outline.max(0)
        centre, size = (low + high) / 2, high - low
        dark, bright = shade(color, -depth), shade(color, depth * 0.55)
        for step in range(steps):
            part = step / (steps - 1)
            shift = np.array([self.light * 0.055, -0.05]) * size * part
            self.fill((outline - centre) * (1 - 0.30 * part**1.2) + centre + shift, mix(dark, bright, part**0.7))

    def glow(self, x: float, y: float, rx: float, ry: float, inner: Color, outer: Color) -> None:
        """An ellipse that fades from the inner colour at its heart to the outer colour at its rim."""
        for part in (0.25, 0.5, 0.75, 1.0):
            self.ellipse(x, y, rx * (1.15 - part * 0.75), ry * (1.15 - part * 0.75), mix(outer, inner, part))

    def stroke(self, path: Sequence[tuple[float, float]], color: Color, width: float) -> None:
        """An open line of the given width with round ends."""
        corners = [tuple(p) for p in (np.array(path) @ self._matrix + self._origin).tolist()]
        pixels = max(1, round(width * self._scale))
        radius = pixels / 2
        for draw, ink in ((self._draw, color), (self._mask_draw, 255 if self.subject else 0)):
            if draw is None:
                continue
            draw.line(corners, fill=ink, width=pixels, joint="curve")
            for x, y in (corners[0], corners[-1]):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
