"""Pages that a job leaves: one file, pictures inside, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from instantbooth.images import encode_png

TEMPLATES = (Path(__file__).parent / "templates", Path(__file__).parent / "curation")


def render(template: str, **values: object) -> str:
    """The page that a template makes of these values; templates extend page.html.j2, which holds the style."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters["png_uri"] = png_uri
    return environment.get_template(template).render(values)


def png_uri(image: Image.Image) -> str:
    """A picture as it is, as the source of an <img>."""
    return f"data:image/png;base64,{base64.b64encode(encode_png(image)).decode()}"


def jpeg_uri(data: bytes) -> str:
    """JPEG bytes as the source of an <img>."""
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def thumbnail_uri(image: Image.Image, side: int) -> str:
    """A picture, scaled down to fit a square of `side` pixels, as the source of an <img>."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return jpeg_uri(buffer.getvalue())
