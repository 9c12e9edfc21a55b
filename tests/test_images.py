from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from instantbooth.errors import ImageError, ParameterError
from instantbooth.images import (
    OUTPUT_FORMATS,
    Augmentation,
    ImageLimits,
    augment,
    check_image,
    check_mask,
    crop_subject,
    decode_image,
    encode_image,
    encode_png,
    mask_background,
    mask_coverage,
    read_metadata,
    read_png_metadata,
    replace_background,
    subject_square,
)

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
RED = Image.new("RGB", (32, 32), (250, 10, 20))


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum + struct.pack(">I", 9) + b"IDAT"


def animation(file_format: str) -> bytes:
    return encoded(RED, file_format, save_all=True, append_images=[NOISE.resize((32, 32))])


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_allowed_format_decodes(file_format: str) -> None:
    picture = decode_image(encoded(RED, file_format))
    assert picture.mode == "RGB"
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(RED)).max() <= 8


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", r"ada is empty \(0 bytes\)"),
        ("text", "ada must be bytes, is str"),
        (b"no picture at all", "ada is not a picture in a known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "ada is not a picture"),
        (encoded(RED, "ICO"), "ada is not a picture in a known format; use one of JPEG, PNG"),
        (encoded(RED, "PPM"), "ada is not a picture"),
        (encoded(NOISE, "JPEG")[:-200], "ada is damaged or cut off"),
        (encoded(NOISE, "JPEG")[:-1], "ada is damaged or cut off"),
        (encoded(NOISE, "PNG")[:-200], "ada is damaged or cut off"),
        (encoded(NOISE, "WEBP")[:-200], "ada is "),
        (encoded(NOISE, "GIF")[:-200], "ada is damaged or cut off"),
        (encoded(NOISE, "BMP")[:-200], "ada is damaged or cut off"),
        (encoded(NOISE, "TIFF")[:-200], "ada is "),
        (png_header(8_000, 7_000), "ada has 8000x7000 pixels, at most 50 million"),
        (png_header(12_000, 12_000), "ada would decode to far more pixels"),
        (png_header(2**31 - 1, 2**31 - 1), "ada would decode to far more pixels"),
        (encoded(Image.new("RGB", (1, 1)), "PNG"), "ada has 1x1 pixels, both sides need at least 16"),
        (encoded(Image.new("RGB", (500, 15)), "PNG"), "ada has 500x15 pixels"),
        (bytes(20_000_001), "ada has 20.0 MB, at most 20 MB"),
        (animation("GIF"), "ada has more than one frame"),
        (animation("PNG"), "ada has more than one frame"),
        (animation("WEBP"), "ada has more than one frame"),
        (animation("TIFF"), "ada has more than one frame or page; save the one you mean"),
        (encoded(Image.new("F", (32, 32)), "TIFF"), "ada has the pixel format 'F'; convert it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bytes_that_are_no_usable_picture_are_refused(data: bytes, fault: str) -> None:
    with pytest.raises(ImageError, match=f"^{fault}"):
        decode_image(data, name="ada")


@given(
    file_format=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]),
    cut=st.integers(0, 400),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
)
def test_damaged_bytes_decode_or_raise_an_image_error(
    file_format: str, cut: int, edits: list[tuple[float, int]]
) -> None:
    data = bytearray(encoded(NOISE, file_format))
    for place, value in edits:
        data[int(place * len(data))] = value
    with contextlib.suppress(ImageError):
        assert decode_image(bytes(data[: len(data) - cut])).mode in ("RGB", "RGBA")


def test_a_cut_off_picture_is_never_filled_even_where_pillow_was_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="LOAD_TRUNCATED_IMAGES is on"):
        decode_image(encoded(NOISE, "JPEG")[:-200])


@pytest.mark.parametrize("check", [lambda image: check_image(image, name="ada"), None])
@pytest.mark.parametrize(
    ("source", "file_format", "colour"),
    [
        (RED.convert("CMYK"), "TIFF", (250, 10, 20)),
        (RED.convert("CMYK"), "JPEG", (250, 10, 20)),
        (RED.quantize(4), "PNG", (250, 10, 20)),
        (Image.new("LA", (32, 32), (90, 128)), "PNG", (90, 90, 90, 128)),
        (Image.new("RGBA", (32, 32), (1, 2, 3, 4)), "PNG", (1, 2, 3, 4)),
        (Image.new("L", (32, 32), 90), "PNG", (90, 90, 90)),
        (Image.new("1", (32, 32), 1), "PNG", (255, 255, 255)),
        (Image.fromarray(np.full((32, 32), 90 * 256 + 7, dtype=np.uint16)), "PNG", (90, 90, 90)),
        (Image.fromarray(np.full((32, 32), 90 * 256 + 7, dtype=np.uint16)), "TIFF", (90, 90, 90)),
    ],
)
def test_every_pixel_format_becomes_rgb_or_rgba(
    source: Image.Image, file_format: str, colour: tuple[int, ...], check: Callable[[Image.Image], Image.Image] | None
) -> None:
    picture = check(source) if check else decode_image(encoded(source, file_format))
    pixel = np.array(picture.getpixel((16, 16)))
    tolerance = 3 if file_format == "JPEG" else 0
    assert len(pixel) == len(colour)
    assert np.abs(pixel - colour).max() <= tolerance


def test_a_palette_with_transparency_keeps_it() -> None:
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([9, 8, 7, 250, 10, 20])
    palette.paste(1, (0, 0, 16, 32))
    picture = decode_image(encoded(palette, "PNG", transparency=0))
    assert picture.getpixel((20, 5)) == (9, 8, 7, 0)
    assert picture.getpixel((5, 5)) == (250, 10, 20, 255)


def test_a_photo_is_turned_upright_and_loses_its_exif() -> None:
    photo = Image.new("RGB", (40, 20))
    photo.paste((255, 255, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "taken at home"
    data = encoded(photo, "JPEG", exif=exif, quality=95)
    picture = decode_image(data)
    assert picture.size == (20, 40)
    assert picture.getpixel((10, 5)) == (255, 255, 255)
    assert not picture.info
    assert not picture.getexif()
    assert b"taken at home" not in encoded(picture, "JPEG")


def test_a_camera_picture_with_previews_behind_it_is_one_picture() -> None:
    data = encoded(RED, "MPO", save_all=True, append_images=[NOISE])
    assert decode_image(data).size == RED.size


def test_what_a_caller_passes_keeps_the_same_rules() -> None:
    cut_off = Image.open(io.BytesIO(encoded(NOISE, "JPEG")[:-200]))
    closed = Image.open(io.BytesIO(encoded(NOISE, "PNG")))
    closed.close()
    for image, fault in [
        ("ada.png", "ada must be a PIL image, is str; open it with PIL.Image.open"),
        (np.zeros((32, 32, 3)), "is ndarray"),
        (None, "is NoneType"),
        (Image.new("RGB", (1, 1)), "1x1 pixels"),
        (Image.new("RGB", (0, 0)), "0x0 pixels"),
        (Image.open(io.BytesIO(animation("GIF"))), "more than one frame"),
        (cut_off, "damaged or cut off"),
        (closed, "damaged or cut off"),
    ]:
        with pytest.raises(ImageError, match=fault):
            check_image(image, name="ada")
    original = Image.new("RGBA", (32, 32))
    checked = check_image(original, name="ada")
    checked.putpixel((0, 0), (1, 1, 1, 1))
    assert original.getpixel((0, 0)) == (0, 0, 0, 0)


def test_a_mask_fits_its_image_and_marks_something() -> None:
    image = Image.new("RGB", (100, 100))
    mask = Image.new("L", (100, 100))
    with pytest.raises(ImageError, match=r"mask marks 0\.00% of the picture as subject, at least 0.1% is needed"):
        check_mask(mask, image, "mask")
    with pytest.raises(ImageError, match="its brightest pixel is 1"):
        check_mask(Image.new("L", (100, 100), 1), image, "mask")
    with pytest.raises(ImageError, match="size 100x100, is 100x99"):
        check_mask(Image.new("L", (100, 99), 255), image, "mask")
    with pytest.raises(ImageError, match="partly transparent"):
        check_mask(Image.new("RGBA", (100, 100), (255, 255, 255, 9)), image, "mask")
    with pytest.raises(ImageError, match="must be a PIL image"):
        check_mask(np.ones((100, 100)), image, "mask")
    mask.paste(255, (10, 10, 15, 12))
    for source in (mask, mask.convert("RGB"), mask.convert("1"), decode_image(encoded(mask, "PNG"))):
        checked = check_mask(source, image, "mask")
        assert checked.mode == "L"
        assert mask_coverage(checked) == 0.001


def test_a_crop_is_a_square_around_the_subject_black_beyond_the_picture() -> None:
    image = Image.new("RGB", (100, 60), (200, 100, 50))
    mask = Image.new("L", (100, 60))
    mask.paste(255, (0, 20, 20, 60))
    cropped, cropped_mask = crop_subject(image, mask, margin=0.1)
    assert cropped.size == cropped_mask.size == (48, 48)
    assert mask_coverage(cropped_mask) == pytest.approx(20 * 40 / 48**2)
    assert cropped.getpixel((0, 24)) == (0, 0, 0)
    assert cropped.getpixel((24, 24)) == (200, 100, 50)
    with pytest.raises(ImageError, match="no subject"):
        crop_subject(image, Image.new("L", (100, 60)))


@given(looseness=st.floats(0, 1))
def test_a_loose_crop_holds_the_tight_one_and_no_more_than_the_picture(looseness: float) -> None:
    image, mask = Image.new("RGB", (100, 60), (200, 100, 50)), Image.new("L", (100, 60))
    mask.paste(255, (70, 20, 90, 40))
    cropped, cropped_mask = crop_subject(image, mask, looseness=looseness)
    assert 24 <= cropped.width == cropped.height <= 100
    assert np.asarray(cropped_mask).sum() == np.asarray(mask).sum(), "all of the subject is in it"


def test_the_loosest_crop_is_what_an_encoder_is_shown_without_a_mask() -> None:
    image, mask = Image.new("RGB", (100, 60), (200, 100, 50)), Image.new("L", (100, 60))
    mask.paste(255, (70, 20, 90, 40))
    assert crop_subject(image, mask, looseness=1)[0].tobytes() == subject_square(image, None).tobytes()
    with pytest.raises(ParameterError, match=r"looseness must be from 0 to 1, is 2"):
        crop_subject(image, mask, looseness=2)


def test_a_replaced_background_is_the_scene_without_whoever_is_in_it() -> None:
    image, scene = Image.new("RGB", (40, 40), (200, 100, 50)), Image.new("RGB", (20, 20), (0, 60, 120))
    mask, scene_mask = Image.new("L", (40, 40)), Image.new("L", (20, 20))
    mask.paste(255, (0, 0, 10, 40))
    scene.paste((255, 255, 255), (10, 0, 20, 20))
    scene_mask.paste(255, (10, 0, 20, 20))
    placed = np.asarray(replace_background(image, mask, scene, scene_mask))
    assert (placed[:, :10] == (200, 100, 50)).all()
    assert (placed[:, 10:] == (0, 60, 120)).all()
    scene_mask.paste(255, (0, 0, 20, 20))
    assert replace_background(image, mask, scene, scene_mask).getpixel((30, 30)) == (0, 0, 0)


def test_a_long_thin_subject_does_not_claim_gigabytes() -> None:
    image = Image.new("RGB", (1_000_000, 16), (9, 9, 9))
    cropped, cropped_mask = crop_subject(image, Image.new("L", image.size, 255))
    assert cropped.size == cropped_mask.size
    assert 2000 < cropped.width <= 2048


def test_masking_multiplies_by_mask_and_alpha() -> None:
    mask = Image.new("L", (32, 32), 255)
    mask.paste(0, (0, 0, 16, 32))
    picture = Image.new("RGBA", (32, 32), (200, 100, 50, 255))
    picture.putalpha(mask.rotate(90))
    masked = np.asarray(mask_background(picture, mask))
    expected = (np.asarray(mask) > 0) & (np.asarray(mask.rotate(90)) > 0)
    assert (masked == expected[..., None] * np.array([200, 100, 50])).all()


def portrait() -> Image.Image:
    picture = Image.new("RGB", (64, 64))
    picture.paste((180, 120, 90), (20, 12, 44, 60))
    return picture


def test_augmentation_is_a_pure_function_of_its_generator() -> None:
    picture = portrait()
    first, again = (augment(picture, np.random.default_rng(3)) for _ in range(2))
    assert first.tobytes() == again.tobytes()
    rng = np.random.default_rng(3)
    assert len({augment(picture, rng).tobytes() for _ in range(50)}) == 50
    assert picture.tobytes() == portrait().tobytes()


@given(seed=st.integers(0, 2**32))
def test_augmentation_keeps_size_background_subject_and_colour(seed: int) -> None:
    augmented = np.asarray(augment(portrait(), np.random.default_rng(seed))).astype(float)
    subject = augmented.sum(-1) > 250
    assert augmented.shape == (64, 64, 3)
    # At least half of the subject's pixels stay, and a crop only ever enlarges them.
    assert subject.sum() >= 0.45 * 24 * 48
    colour = np.median(augmented[subject], axis=0)
    assert colour[0] > colour[1] > colour[2]
    assert np.abs(colour / (180, 120, 90) - 1).max() < 0.35
    assert (augmented[~subject] <= (190 * 1.3, 130 * 1.3, 100 * 1.3)).all()


@given(seed=st.integers(0, 2**32))
def test_augmentation_keeps_the_subject_that_a_mask_marks_in_a_busy_picture(seed: int) -> None:
    picture, mask = Image.new("RGB", (64, 64), (0, 0, 200)), Image.new("L", (64, 64))
    picture.paste((200, 0, 0), (2, 2, 18, 18))
    mask.paste(255, (2, 2, 18, 18))
    augmented = np.asarray(augment(picture, np.random.default_rng(seed), mask=mask)).astype(int)
    subject = augmented[:, :, 0] > augmented[:, :, 2]
    assert subject.sum() >= 0.45 * 16 * 16


def test_augmentation_of_strength_zero_changes_nothing() -> None:
    still = Augmentation(
        crop_area=(1, 1), crop_ratio=(1, 1), rotation=0, flip=0, brightness=0, contrast=0, saturation=0
    )
    augmented = np.asarray(augment(portrait(), np.random.default_rng(0), settings=still)).astype(int)
    assert np.abs(augmented - np.asarray(portrait())).max() <= 1
    flipped = np.asarray(
        augment(
            portrait(),
            np.random.default_rng(0),
            settings=Augmentation(
                crop_area=(1, 1), crop_ratio=(1, 1), rotation=0, flip=1, brightness=0, contrast=0, saturation=0
            ),
        )
    ).astype(int)
    assert np.abs(flipped[:, ::-1] - np.asarray(portrait())).max() <= 1


@pytest.mark.parametrize(
    "bad", [{"crop_area": (0, 1)}, {"crop_ratio": (2, 1)}, {"flip": 2}, {"rotation": float("nan")}]
)
def test_augmentation_out_of_range_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=next(iter(bad))):
        Augmentation(**bad)  # type: ignore[arg-type]


@given(
    st.dictionaries(
        st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=79),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    )
)
def test_png_metadata_comes_back(metadata: dict[str, str]) -> None:
    data = encode_png(RED, metadata)
    assert read_png_metadata(data) == metadata
    assert decode_image(data).tobytes() == RED.tobytes()


@pytest.mark.parametrize("metadata", [{"": "x"}, {"k" * 80: "x"}, {"a\0b": "x"}, {"a": "x\0"}, {"a": "\ud800"}])
def test_png_metadata_that_does_not_fit_is_refused(metadata: dict[str, str]) -> None:
    with pytest.raises(ParameterError, match="PNG"):
        encode_png(RED, metadata)
    with pytest.raises(ImageError):
        read_png_metadata(encoded(RED, "JPEG"))


@pytest.mark.parametrize("image_format", OUTPUT_FORMATS)
def test_every_output_format_carries_its_provenance(image_format: str) -> None:
    metadata = {"prompt": "a photo of a {subject} «à la mer» 海", "seed": "7"}
    data = encode_image(RED, metadata, image_format=image_format)
    assert Image.open(io.BytesIO(data)).format == image_format.upper()
    assert read_metadata(data) == metadata
    assert np.abs(np.asarray(decode_image(data), dtype=int) - np.asarray(RED, dtype=int)).max() <= 8


def test_another_output_format_is_refused() -> None:
    with pytest.raises(ParameterError, match="Did you mean 'jpeg'"):
        encode_image(RED, {}, image_format="jpg")


def test_limits_are_the_callers_to_choose() -> None:
    assert decode_image(encoded(Image.new("RGB", (2, 2)), "PNG"), limits=ImageLimits(min_side=1)).size == (2, 2)
