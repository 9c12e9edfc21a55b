"""Turns a background and what stands before it into a finished picture of one of four styles."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from instantbooth.miniature.drawing import SUPERSAMPLING

Pixels = npt.NDArray[np.floating[Any]]
PAPER = np.array([250, 243, 226], np.float32)
GRAPHITE = np.array([70, 58, 64], np.float32)


def compose(
    style: str, background: Image.Image, figure: Image.Image, *, light: float, dark: bool, left: bool, seed: int
) -> Image.Image:
    """The finished RGB picture, a factor SUPERSAMPLING smaller than its layers.

    `background` is RGB, `figure` RGBA; `light` from cool (-1) to warm (1); `dark` says that the place is a dark one;
    `left` says where the light comes from; `seed` places the blots of a watercolour.
    """
    back = np.asarray(background.reduce(SUPERSAMPLING), np.float32)
    front_image = figure.reduce(SUPERSAMPLING)
    front = np.asarray(front_image, np.float32)
    alpha = front[..., 3:] / 255
    if style == "photo":
        back = _blurred(back, 0.75)
    spread = np.asarray(front_image.getchannel("A").filter(ImageFilter.GaussianBlur(2.2)), np.float32)[..., None] / 255
    around = back + (255 - back) * spread * 0.22 if dark else back * (1 - spread * 0.30)
    pixels = around * (1 - alpha) + front[..., :3] * alpha
    finish: dict[str, Callable[[], Pixels]] = {
        "photo": lambda: _photo(pixels, light, left),
        "pencil drawing": lambda: _pencil_drawing(pixels, alpha),
        "pixel art": lambda: _pixel_art(pixels, alpha),
        "watercolor": lambda: _watercolor(pixels, alpha, seed),
    }
    return Image.fromarray(finish[style]().clip(0, 255).round().astype(np.uint8))


def _blurred(pixels: Pixels, radius: float) -> Pixels:
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32)


def _grid(size: int) -> tuple[Pixels, Pixels]:
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    return axis[None, :, None], axis[:, None, None]


def _photo(pixels: Pixels, light: float, left: bool) -> Pixels:
    x, y = _grid(len(pixels))
    lit = 1.03 - 0.11 * ((x if left else -x) + y * 0.6) - 0.10 * (x * x + y * y)
    warmth = np.array([1 + 0.045 * light, 1 + 0.01 * light, 1 - 0.055 * light], np.float32)
    return np.asarray(pixels * lit * warmth)


def _edges(pixels: Pixels) -> Pixels:
    """Strength of edges from 0 to 1, shape (size, size, 1)."""
    padded = np.pad(pixels.mean(-1), 1, mode="edge")
    dx, dy = padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1]
    return np.asarray(np.clip((np.hypot(dx, dy) - 14) / 95, 0, 1), np.float32)[..., None]


def _pencil_drawing(pixels: Pixels, alpha: Pixels) -> Pixels:
    x, y = _grid(len(pixels))
    strength = 0.52 + 0.20 * alpha
    hatching = 1 + (0.13 - 0.05 * alpha) * np.sin((x + y) * len(pixels) / 2 * (2 * np.pi / 4.5))
    fade = 1 - np.clip(np.maximum(np.abs(x), np.abs(y)) - 0.80, 0, 1) * 2.6 * (1 - alpha * 0.7)
    drawn = PAPER + (pixels - PAPER) * strength * hatching * fade
    line = np.maximum(_edges(pixels) * (0.62 - 0.27 * alpha), _edges(alpha * 150) * 0.66) * fade
    return np.asarray(drawn + (GRAPHITE - drawn) * line, np.float32)


def _pixel_art(pixels: Pixels, alpha: Pixels) -> Pixels:
    size = len(pixels) // 2
    crisp = pixels + (pixels - _blurred(pixels, 1.6)) * 0.7
    small = crisp.reshape(size, 2, size, 2, 3).mean((1, 3))
    inside = np.pad(alpha.reshape(size, 2, size, 2).mean((1, 3)) > 0.5, 1, mode="edge")
    near = inside[2:, 1:-1] | inside[:-2, 1:-1] | inside[1:-1, 2:] | inside[1:-1, :-2]
    small[near & ~inside[1:-1, 1:-1]] = (36, 28, 52)
    grey = small.mean(-1, keepdims=True)
    vivid = grey + (small - grey) * 1.18
    levels = np.asarray((vivid.clip(0, 255) / 25.5).round() * 25.5)
    return levels.repeat(2, 0).repeat(2, 1)


def _watercolor(pixels: Pixels, alpha: Pixels, seed: int) -> Pixels:
    size = len(pixels)
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.uniform(0, 255, (9, 9)).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    blots = np.asarray(noise, np.float32)[..., None] / 255 - 0.5
    x, y = _grid(size)
    soft = _blurred(pixels, 1.1) * 0.55 + pixels * 0.45
    paint = 255 - (255 - soft) * (0.88 + 0.16 * blots)
    reach = np.sqrt(x**4 + y**4) ** 0.5 + blots * 0.22
    edge = np.clip((reach - 0.86) * 5, 0, 1) * (1 - 0.55 * alpha)
    return np.asarray(paint + (np.array([254, 252, 247], np.float32) - paint) * edge, np.float32)
