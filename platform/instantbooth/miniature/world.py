"""The miniature world: pictures of persons and cats that a small model can learn and that judges can check."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from instantbooth.miniature.backgrounds import DARK_PLACES, draw_background
from instantbooth.miniature.cat import draw_cat, draw_cat_ears
from instantbooth.miniature.drawing import SUPERSAMPLING, Color, Pen
from instantbooth.miniature.hair import draw_back_hair
from instantbooth.miniature.identity import Identity, Person
from instantbooth.miniature.person import draw_person
from instantbooth.miniature.scene import ATTRIBUTES, NOUNS, Scene, caption_of
from instantbooth.miniature.styles import compose
from instantbooth.miniature.wardrobe import (
    BALLOONS,
    clothing_color,
    draw_arm,
    draw_balloon,
    draw_body,
    draw_book,
    draw_fist,
    draw_hat,
    draw_open_hand,
)

__all__ = ["ATTRIBUTES", "NOUNS", "SIZE", "Identity", "Picture", "Scene", "caption_of", "render", "render_empty"]

SIZE = 64
CLOSE_UP_SCALE = 1.28
HEAD_X = {
    "medium": {"left": 18.5, "center": 32.0, "right": 45.5},
    "close-up": {"left": 23.0, "center": 32.0, "right": 41.0},
}
HEAD_Y = 31.5


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A rendered scene: `image` RGB and `mask` L (0 or 255: subject with clothes and hat), both SIZE x SIZE."""

    image: Image.Image
    mask: Image.Image


def render(identity: Identity, scene: Scene) -> Picture:
    """The identity in the scene; the same arguments give the same bits."""
    wide = (SIZE * SUPERSAMPLING,) * 2
    figure, mask = Image.new("RGBA", wide, (0, 0, 0, 0)), Image.new("L", wide, 0)
    scale = scene.zoom * (CLOSE_UP_SCALE if scene.framing == "close-up" else 1.0)
    origin = (HEAD_X[scene.framing][scene.position] + scene.dx, HEAD_Y + scene.dy)
    light = 1.0 if scene.mirrored else -1.0
    body = Pen(figure, mask, origin=origin, scale=scale, angle=scene.tilt * 0.2, light=light)
    head = Pen(figure, mask, origin=origin, scale=scale, angle=scene.tilt, light=light)
    _draw_figure(identity, scene, body, head, origin, scale)
    covered = mask.reduce(SUPERSAMPLING).point([0] * 128 + [255] * 128)
    return Picture(image=_compose(scene, figure), mask=covered)


def render_empty(scene: Scene) -> Image.Image:
    """The scene's background and style, and nobody in it."""
    return _compose(scene, Image.new("RGBA", (SIZE * SUPERSAMPLING,) * 2, (0, 0, 0, 0)))


def _compose(scene: Scene, figure: Image.Image) -> Image.Image:
    return compose(
        scene.style,
        draw_background(scene.background, SIZE, scene.seed, scene.mirrored),
        figure,
        light=scene.light,
        dark=scene.background in DARK_PLACES,
        left=not scene.mirrored,
        seed=scene.seed,
    )


def _draw_figure(
    identity: Identity, scene: Scene, body: Pen, head: Pen, origin: tuple[float, float], scale: float
) -> None:
    look = identity.look
    hat = scene.headwear != "none"
    gaze = (scene.gaze, 1.0 if scene.action == "reading a book" else 0.0)
    skin = look.skin if isinstance(look, Person) else look.fur
    color = clothing_color(scene.clothing, scene.shade)
    draw_body(body, color, skin, look.height)
    if isinstance(look, Person):
        draw_back_hair(head, look, hat)
        draw_person(head, look, hat, gaze)
        if hat:
            draw_hat(head, scene.headwear, look.width, -look.height * 0.54)
    else:
        draw_cat_ears(head, look)
        draw_cat(head, look, gaze)
        if hat:
            draw_hat(head, scene.headwear, look.width * 0.66, -look.height * 0.66)
    if scene.action != "none":
        paw = None if isinstance(look, Person) else look.inner_ear
        _draw_action(scene, body, origin, scale, look.height, color, skin, paw)


def _draw_action(
    scene: Scene,
    pen: Pen,
    origin: tuple[float, float],
    scale: float,
    chin: float,
    sleeve: Color,
    skin: Color,
    paw: Color | None,
) -> None:
    side = {"left": 1, "right": -1, "center": -1 if scene.mirrored else 1}[scene.position]

    def inside(x: float, y: float, margin: float) -> tuple[float, float]:
        """The local point, moved as far as needed to keep that margin (local units) to the picture's edges."""
        room = [
            np.clip(at + o / scale, margin, SIZE / scale - margin) - o / scale
            for at, o in zip((x, y), origin, strict=True)
        ]
        return float(room[0]), float(room[1])

    shoulder = (side * 14.5, chin + 13.0)
    if scene.action == "waving":
        x, y = inside(side * 22.0, 3.0, 5.2)
        draw_arm(pen, shoulder, (x - side * 0.5, y + 6.0), sleeve)
        draw_open_hand(pen, x, y, skin, side, paw)
    elif scene.action == "holding a balloon":
        x, y = inside(side * 19.5, chin + 4.0, 4.0)
        color = BALLOONS[scene.seed % len(BALLOONS)]
        at = inside(side * 22.0, -12.0, 7.6)
        pen.subject = False
        draw_balloon(pen, *at, 6.8, (x, y), color)
        pen.subject = True
        draw_arm(pen, shoulder, (x - side * 1.5, y + 3.5), sleeve)
        draw_fist(pen, x, y, skin)
    else:
        x, y = 0.0, inside(0.0, chin + 9.5, 6.2)[1]
        pen.subject = False
        draw_book(pen, x, y, ((150, 44, 58), (40, 84, 130), (52, 110, 78))[scene.seed % 3])
        pen.subject = True
        for hand in (-1, 1):
            draw_fist(pen, x + hand * 11.2, y + 2.2, skin)
