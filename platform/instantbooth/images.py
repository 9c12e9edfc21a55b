"""Pictures: decoding bytes from strangers, checking, cropping, masking, augmenting; files that carry their provenance.

Every picture that leaves this module is fully decoded, upright, 8 bits a channel, RGB or (where the source is
transparent) RGBA, without EXIF. A mask is "L": 255 is subject, 0 background; a pixel above 127 counts as subject.
"""

from __future__ import annotations

import io
import json
import math
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageChops, ImageFile, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo

from instantbooth.errors import ImageError, ParameterError, did_you_mean

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
OUTPUT_FORMATS = ("png", "webp", "jpeg")
MAX_REFERENCE_SIDE = 1024
"""Encoders look at 224 px around the subject: larger references are scaled down once, where they are decoded."""
QUALITY = 92
"""Of WebP and JPEG, where 100 is the best."""
SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16L", "I;16B"})
MODES = SIXTEEN_BIT_MODES | {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}

Pixels = npt.NDArray[np.float32]
Silhouette = npt.NDArray[np.bool_]

MIN_FOREGROUND = 0.001
MAX_CROP_SIDE = 2048
CROP_TRIES = 10
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

# warnings.catch_warnings swaps a global, which is not safe across threads.
_warning_filters = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What a picture may measure."""

    max_bytes: int = 20_000_000
    """Size of the encoded file, in bytes."""
    max_pixels: int = 50_000_000
    """Width times height; read from the header, before anything is decoded."""
    min_side: int = 16
    """The shorter side, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Strength of each random change to a conditioning picture. Hue is left alone: it is part of an identity."""

    crop_area: tuple[float, float] = (0.5, 1.0)
    """Share of the picture's area a crop keeps, from and to."""
    crop_ratio: tuple[float, float] = (0.8, 1.25)
    """Stretch of a crop (width over height, as a multiple of the picture's own), from and to."""
    min_subject: float = 0.5
    """Share of the subject's pixels a crop must keep; else another crop is drawn."""
    rotation: float = 15.0
    """Largest rotation to either side, in degrees."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    brightness: float = 0.15
    """Largest relative change of brightness."""
    contrast: float = 0.15
    """Largest relative change of contrast, about the subject's mean."""
    saturation: float = 0.15
    """Largest relative change of saturation."""

    def __post_init__(self) -> None:
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ParameterError(f"crop_area must rise within (0, 1], is {self.crop_area}; (0.5, 1.0) is the default")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ParameterError(f"crop_ratio must rise above 0, is {self.crop_ratio}; (0.8, 1.25) is the default")
        for field in ("min_subject", "flip", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, field) <= 1:
                raise ParameterError(f"{field} must be from 0 to 1, is {getattr(self, field)}; 0 turns it off")
        if not 0 <= self.rotation <= 180:
            raise ParameterError(f"rotation must be from 0 to 180 degrees, is {self.rotation}; 0 turns it off")


def decode_image(data: bytes, *, name: str = "image", limits: ImageLimits | None = None) -> Image.Image:
    """A picture from bytes that nobody vouches for.

    `name` is what errors call the picture. JPEG (its first picture, where a camera stored several), PNG, WebP, BMP,
    single-frame GIF and single-page TIFF are read.

    Raises ImageError for anything that cannot be decoded completely, or that breaks `limits`.
    """
    limits = limits or ImageLimits()
    with _open(data, name, limits) as picture:
        return _decoded(picture, name, limits)


def decode_reference(data: bytes, *, name: str = "image", limits: ImageLimits | None = None) -> Image.Image:
    """The same for a subject's reference or its mask: no larger than an encoder has a use for."""
    image = decode_image(data, name=name, limits=limits)
    image.thumbnail((MAX_REFERENCE_SIDE, MAX_REFERENCE_SIDE))
    return image


def check_image(image: object, *, name: str, limits: ImageLimits | None = None) -> Image.Image:
    """The same promises for a PIL image that a caller opened or made; the caller's image stays as it is.

    Raises ImageError where it is no PIL image, cannot be decoded completely, or breaks `limits`.
    """
    if not isinstance(image, Image.Image):
        raise ImageError(f"{name} must be a PIL image, is {type(image).__name__}; open it with PIL.Image.open(path)")
    return _decoded(image, name, limits or ImageLimits())


def check_mask(mask: object, image: Image.Image, name: str) -> Image.Image:
    """A mask as "L", of the size of its (checked) image and with at least 0.1 % of it subject.

    Colour masks are read by brightness. Raises ImageError for a partly transparent one, which could mean either.
    """
    checked = check_image(mask, name=name, limits=ImageLimits(min_side=1))
    if checked.mode == "RGBA" and checked.getchannel("A").getextrema() != (255, 255):
        raise ImageError(
            f"{name} is partly transparent, and a mask has one channel; pass mask.getchannel('A') or mask.convert('L')"
        )
    if checked.size != image.size:
        raise ImageError(
            f"{name} must have its image's size {_extent(image)}, is {_extent(checked)}; resize it to its image"
        )
    single = checked.convert("L")
    coverage = mask_coverage(single)
    if coverage < MIN_FOREGROUND:
        raise ImageError(
            f"{name} marks {coverage:.2%} of the picture as subject, at least {MIN_FOREGROUND:.1%} is needed"
            f" (255 is subject; its brightest pixel is {single.getextrema()[1]}); pass another mask, or none"
        )
    return single


def mask_coverage(mask: Image.Image) -> float:
    """Share of a mask's pixels that are subject, from 0 to 1."""
    return float((np.asarray(mask) > 127).mean())


def crop_subject(
    image: Image.Image, mask: Image.Image, *, margin: float = 0.1, looseness: float = 0.0
) -> tuple[Image.Image, Image.Image]:
    """Image and mask cut to one square around the subject, black (mask: 0) where it leaves the picture.

    The square's side is the longer side of the subject's bounding box, plus `margin` of it on either side; by its
    `looseness` it is on the way from there (0) to the square that holds the whole picture (1). One over 2048 px is
    scaled down to that, so a long thin picture cannot claim gigabytes.

    Raises ImageError for a mask without subject, ParameterError for a margin or looseness outside 0 to 1.
    """
    for name, value in (("margin", margin), ("looseness", looseness)):
        if not 0 <= value <= 1:
            raise ParameterError(f"{name} must be from 0 to 1, is {value}; leave it out for the usual crop")
    box = mask.point([0] * 128 + [255] * 128).getbbox()
    if box is None:
        raise ImageError("the mask marks no subject to crop; pass another mask, or none")
    left, top, right, bottom = box
    tight = max(right - left, bottom - top) * (1 + 2 * margin)
    side = math.ceil(tight + looseness * (max(image.size) - tight))
    if side > MAX_CROP_SIDE:
        scale = MAX_CROP_SIDE / side
        size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
        return crop_subject(image.resize(size), mask.resize(size), margin=margin, looseness=looseness)
    across, down = left + right, top + bottom
    left = math.floor(across + looseness * (image.width - across) - side) // 2
    top = math.floor(down + looseness * (image.height - down) - side) // 2
    square = (left, top, left + side, top + side)
    return image.crop(square), mask.crop(square)


def mask_background(image: Image.Image, mask: Image.Image) -> Image.Image:
    """x := x · mask: the background turns black. An alpha channel is multiplied in too; the result is RGB."""
    if image.mode == "RGBA":
        mask = ImageChops.multiply(mask, image.getchannel("A"))
    return Image.composite(image.convert("RGB"), Image.new("RGB", image.size), mask)


def replace_background(
    image: Image.Image, mask: Image.Image, scene: Image.Image, scene_mask: Image.Image
) -> Image.Image:
    """The subject before another picture, which is stretched to this one's size; RGB.

    Whoever is in the scene is painted over with the mean colour of the rest of it.
    """
    behind, hidden = np.asarray(scene.convert("RGB")), np.asarray(scene_mask.convert("L")) > 127
    mean = behind[~hidden].mean(axis=0) if not hidden.all() else np.zeros(3)
    emptied = Image.fromarray(np.where(hidden[:, :, None], mean, behind).astype(np.uint8)).resize(image.size)
    return Image.composite(image.convert("RGB"), emptied, mask)


def subject_square(image: Image.Image, mask: Image.Image | None) -> Image.Image:
    """What an image encoder is shown of a reference, RGB and square: its subject on black, as in training.

    Without a mask it is the whole picture, with black bars where it is not square.
    """
    if mask is not None:
        return mask_background(*crop_subject(image, mask))
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    return square


def augment(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    settings: Augmentation | None = None,
    mask: Image.Image | None = None,
) -> Image.Image:
    """A conditioning picture (RGB, cropped) changed at random: colour, rotation, crop, flip. Size stays.

    The paper's heavy augmentation, which keeps a model from copying its reference's pose and place. Black stays black.
    The subject, of which a crop keeps enough, is what `mask` marks, else all that is not black. The same state of `rng`
    gives the same picture. 0.7 ms at 64x64, 7 ms at 224x224.
    """
    settings = settings or Augmentation()
    pixels = np.asarray(image, dtype=np.float32)
    seen = pixels.max(axis=-1) > 0
    if seen.any():
        pixels = _jitter(pixels, seen, rng, settings)
    coloured = Image.fromarray(pixels.astype(np.uint8))
    geometry = _draw_geometry(seen if mask is None else np.asarray(mask) > 127, rng, settings)
    return coloured.transform(image.size, Image.Transform.AFFINE, geometry, Image.Resampling.BILINEAR)


def encode_image(
    image: Image.Image, metadata: Mapping[str, str], *, image_format: str = "png", quality: int = QUALITY
) -> bytes:
    """Bytes in one of OUTPUT_FORMATS that carry `metadata`; `read_metadata` gives it back.

    A PNG holds it as text chunks, the others, of this `quality`, as a JSON object in EXIF's ImageDescription. Raises
    ParameterError for another format.
    """
    if image_format not in OUTPUT_FORMATS:
        raise ParameterError(
            f"image_format {image_format!r} is not written here. {did_you_mean(image_format, OUTPUT_FORMATS)}"
        )
    if image_format == "png":
        return encode_png(image, metadata)
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(dict(metadata))
    buffer = io.BytesIO()
    image.save(buffer, image_format.upper(), quality=quality, exif=exif)
    return buffer.getvalue()


def read_metadata(data: bytes, *, name: str = "image") -> dict[str, str]:
    """What `encode_image` embedded; empty where there is nothing of the kind. Raises ImageError for no picture."""
    limits = ImageLimits(min_side=1)
    with _open(data, name, limits) as picture:
        _check_header(picture, name, limits)
        if picture.format == "PNG":
            return read_png_metadata(data, name=name)
        with _as_image_error(name):
            described = json.loads(picture.getexif().get(ExifTags.Base.ImageDescription, "{}"))
            return {str(key): str(text) for key, text in described.items()}


def encode_png(image: Image.Image, metadata: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """PNG bytes with `metadata` as text chunks (tEXt, and iTXt beyond Latin-1).

    Raises ParameterError for a key that is not 1 to 79 printable Latin-1 characters, or text that UTF-8 cannot hold.
    """
    chunks = PngInfo()
    for key, text in metadata.items():
        if not (0 < len(key) < 80 and key.isprintable() and key == key.strip() and max(key) <= "\xff"):
            raise ParameterError(f"a PNG key must be 1 to 79 printable Latin-1 characters, is {key!r}; shorten it")
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise ParameterError(f"PNG text must hold no NUL and no lone surrogate, {key} is {text!r}; remove it")
        chunks.add_text(key, text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_png_metadata(data: bytes, *, name: str = "image") -> dict[str, str]:
    """The text chunks of a PNG. Raises ImageError where `data` is none."""
    limits = ImageLimits(min_side=1)
    with _open(data, name, limits, formats=("PNG",)) as picture:
        _check_header(picture, name, limits)
        with _as_image_error(name):
            return {key: str(text) for key, text in cast(PngImageFile, picture).text.items()}


def _open(data: bytes, name: str, limits: ImageLimits, formats: tuple[str, ...] = FORMATS) -> ImageFile.ImageFile:
    if not isinstance(data, bytes):
        raise ImageError(f"{name} must be bytes, is {type(data).__name__}; read the file in binary mode")
    if not data:
        raise ImageError(f"{name} is empty (0 bytes); upload it again")
    if len(data) > limits.max_bytes:
        raise ImageError(
            f"{name} has {len(data) / 1e6:.1f} MB, at most {limits.max_bytes / 1e6:.0f} MB are read; resize it"
        )
    with _as_image_error(name), _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=formats)


def _decoded(picture: Image.Image, name: str, limits: ImageLimits) -> Image.Image:
    _check_header(picture, name, limits)
    with _as_image_error(name):
        # Tells a single frame from many at the second one, where n_frames would walk through all. A camera's MPO is a
        # JPEG with previews or depth behind the picture, not an animation.
        several = picture.format != "MPO" and bool(getattr(picture, "is_animated", False))
    if several:
        raise ImageError(f"{name} has more than one frame or page; save the one you mean as a PNG or JPEG")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError(
            f"{name} cannot be checked while PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which fills cut-off pictures"
            " with grey; set it to False"
        )
    with _as_image_error(name):
        return _eight_bit(ImageOps.exif_transpose(picture))


def _check_header(picture: Image.Image, name: str, limits: ImageLimits) -> None:
    if picture.width * picture.height > limits.max_pixels:
        raise ImageError(
            f"{name} has {_extent(picture)} pixels, at most {limits.max_pixels / 1e6:.0f} million are read; resize it"
        )
    if min(picture.size) < limits.min_side:
        raise ImageError(
            f"{name} has {_extent(picture)} pixels, both sides need at least {limits.min_side}; pass a larger picture"
        )
    if picture.mode not in MODES:
        raise ImageError(f"{name} has the pixel format {picture.mode!r}; convert it to 8-bit RGB")


def _eight_bit(picture: Image.Image) -> Image.Image:
    if picture.mode in SIXTEEN_BIT_MODES:
        # Pillow's own conversion clips at 255 instead of scaling.
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    converted = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    converted.info = {}
    return converted


@contextmanager
def _as_image_error(name: str) -> Iterator[None]:
    """Pillow answers hostile bytes with OSError, SyntaxError, ValueError, struct.error, zlib.error and more."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} would decode to far more pixels than a picture has ({error}); resize it") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture in a known format; use one of {', '.join(FORMATS)}") from error
    except Exception as error:
        raise ImageError(
            f"{name} is damaged or cut off ({type(error).__name__}: {error}); export or upload it again"
        ) from error


def _extent(picture: Image.Image) -> str:
    return f"{picture.width}x{picture.height}"


def _jitter(pixels: Pixels, seen: Silhouette, rng: np.random.Generator, settings: Augmentation) -> Pixels:
    """Colour jitter of the pixels seen, all others are black; [H, W, 3] float32 in 0 to 255."""
    strengths = np.array([settings.brightness, settings.contrast, settings.saturation])
    brightness, contrast, saturation = (1 + strengths * rng.uniform(-1, 1, size=3)).astype(np.float32)
    colours = pixels[seen] * brightness
    mean = colours.mean()
    colours = mean + contrast * (colours - mean)
    grey = (colours @ LUMA)[:, None]
    jittered = np.zeros_like(pixels)
    jittered[seen] = np.clip(grey + saturation * (colours - grey) + 0.5, 0, 255)
    return jittered


def _draw_geometry(
    subject: Silhouette, rng: np.random.Generator, settings: Augmentation
) -> tuple[float, float, float, float, float, float]:
    """Output to input pixels: a flipped, rotated, resized crop that keeps enough of the subject."""
    height, width = subject.shape
    mirror = -1 if rng.random() < settings.flip else 1
    silhouette = Image.fromarray(subject.astype(np.uint8))
    count = int(subject.sum())
    for _ in range(CROP_TRIES):
        area = rng.uniform(*settings.crop_area)
        stretch = math.exp(rng.uniform(*np.log(settings.crop_ratio)))
        scale_x, scale_y = min(1.0, math.sqrt(area * stretch)), min(1.0, math.sqrt(area / stretch))
        centre_x, centre_y = (rng.uniform(scale / 2, 1 - scale / 2) for scale in (scale_x, scale_y))
        angle = math.radians(rng.uniform(-settings.rotation, settings.rotation))
        across = (scale_x * mirror * math.cos(angle), scale_x * mirror * math.sin(angle))
        down = (-scale_y * math.sin(angle), scale_y * math.cos(angle))
        geometry = _affine(across, down, (centre_x * width, centre_y * height), (width, height))
        seen = silhouette.transform((width, height), Image.Transform.AFFINE, geometry, Image.Resampling.NEAREST)
        if np.asarray(seen).sum() * scale_x * scale_y >= settings.min_subject * count:
            return geometry
    return _affine((mirror, 0.0), (0.0, 1.0), (width / 2, height / 2), (width, height))


def _affine(
    across: tuple[float, float], down: tuple[float, float], centre: tuple[float, float], size: tuple[int, int]
) -> tuple[float, float, float, float, float, float]:
    """The map that sends one output pixel to the right by `across`, one down by `down`, and the middle to `centre`."""
    half_width, half_height = size[0] / 2, size[1] / 2
    return (
        across[0],
        down[0],
        centre[0] - across[0] * half_width - down[0] * half_height,
        across[1],
        down[1],
        centre[1] - across[1] * half_width - down[1] * half_height,
    )
