"""The rules of curation, one function a step: each takes a pair, and returns it further on or raises Dropped.

Captions come before pictures: most pairs of a crawl name no subject, and reading a caption costs no decoding.
"""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from PIL import Image
from transformers import CLIPTokenizer

from instantbooth.errors import ImageError, ParameterError, PromptError
from instantbooth.images import ImageLimits, check_mask, decode_image, encode_png, mask_coverage
from instantbooth.prompts import CLASS_NOUNS, MAX_PROMPT_CHARS, SUBJECT_FIELD, expand, tokenize_subject
from pipelines.curation.duplicates import look_of
from pipelines.curation.pairs import Dropped, Pair, Reason

PARTS_SIDE = 128
NOUN = re.compile(r"[^\W\d_][\w' -]*")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a pair must be to be kept."""

    min_coverage: float = 0.1
    """Least share of the picture that the subject's mask covers (the paper's)."""
    max_coverage: float = 0.7
    """Largest share of the picture that the subject's mask covers (the paper's)."""
    second_subject: float = 0.25
    """A part of the mask apart from the largest is another subject from this share of the largest's area on."""
    min_side: int = 64
    """The picture's shorter side, in pixels; the side of the model's pictures is a good choice."""
    nouns: dict[str, str] = field(default_factory=dict)
    """More nouns by which captions name a subject, each with its class: `--rules.nouns bride person tabby cat`."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_coverage < self.max_coverage <= 1:
            raise ParameterError(
                f"coverage must rise within 0 to 1, is {self.min_coverage} to {self.max_coverage}; 0.1 to 0.7 is usual"
            )
        if not 0 < self.second_subject <= 1:
            raise ParameterError(f"second_subject must be over 0 and at most 1, is {self.second_subject}; try 0.25")
        if self.min_side < 16:
            raise ParameterError(f"min_side must be at least 16 pixels, is {self.min_side}; raise it")
        for word in [*self.nouns, *self.nouns.values()]:
            if not NOUN.fullmatch(word) or word != word.lower():
                raise ParameterError(f"nouns must be words in lower case, one is {word!r}; write for example bride")

    def classes(self) -> dict[str, str]:
        """Every noun with its class."""
        return {noun: name for name, nouns in CLASS_NOUNS.items() for noun in nouns} | self.nouns


def name_subject(pair: Pair, *, rules: Rules, tokenizer: CLIPTokenizer | None = None) -> Pair:
    """Finds the one class noun of the caption, as a whole word, and puts {subject} in its place.

    A caption that holds the placeholder token, which training puts there, is of no use. Given the tokenizer of a Stable
    Diffusion, its text encoder must reach the subject.
    """
    text = " ".join(pair.text.split())
    if not text:
        raise Dropped(Reason.NO_CAPTION, "the caption is missing or empty; write one that names the subject")
    if len(text) > MAX_PROMPT_CHARS:
        raise Dropped(
            Reason.UNUSABLE_CAPTION,
            f"the caption has {len(text)} characters, at most {MAX_PROMPT_CHARS} are used; shorten it",
        )
    classes = rules.classes()
    # Regardless of case "ı", "İ" and "ſ" match too, whose words are others: a gırl is none of the nouns.
    found = [match for match in _pattern(tuple(classes)).finditer(text) if match[0].lower() in classes]
    if not found:
        raise Dropped(Reason.NO_NOUN, f"{text!r} names no subject of a known class")
    if len(found) > 1:
        raise Dropped(Reason.SEVERAL_NAMED, f"{text!r} names {' and '.join(match[0] for match in found)}")
    noun = found[0][0].lower()
    caption = text[: found[0].start()] + SUBJECT_FIELD + text[found[0].end() :]
    try:
        prompt = expand(caption, noun)
        if tokenizer:
            tokenize_subject(tokenizer, prompt)
    except PromptError as error:
        raise Dropped(Reason.UNUSABLE_CAPTION, str(error)) from error
    return replace(pair, caption=caption, noun=noun, subject=classes[noun])


def decode(pair: Pair, *, rules: Rules) -> Pair:
    """Decodes the picture once, for its size, its perceptual hash and the mask that comes with it, if one does."""
    try:
        image = decode_image(pair.image, name=pair.name, limits=ImageLimits(min_side=1))
    except ImageError as error:
        raise Dropped(Reason.UNUSABLE_IMAGE, str(error)) from error
    if min(image.size) < rules.min_side:
        size = f"{image.width}x{image.height} pixels"
        raise Dropped(Reason.IMAGE_TOO_SMALL, f"{size}, both sides need at least {rules.min_side}")
    mask = _given_mask(pair, image)
    return replace(
        pair,
        width=image.width,
        height=image.height,
        look=look_of(image.convert("RGB")),
        mask=encode_png(mask) if mask else b"",
    )


def judge_mask(pair: Pair, *, rules: Rules) -> Pair:
    """The paper's filters: the subject covers neither too little nor too much of the picture, and it is one."""
    if not pair.mask:
        raise Dropped(Reason.NO_MASK, "the pair has no mask and no transparency; give masks, or name a segmenter")
    mask = Image.open(io.BytesIO(pair.mask))
    coverage = mask_coverage(mask)
    if coverage < rules.min_coverage:
        raise Dropped(Reason.SUBJECT_TOO_SMALL, f"covers {coverage:.1%}, at least {rules.min_coverage:.0%} is needed")
    if coverage > rules.max_coverage:
        raise Dropped(Reason.SUBJECT_TOO_LARGE, f"covers {coverage:.1%}, at most {rules.max_coverage:.0%} is used")
    largest, *others = part_areas(mask)
    if others and others[0] >= rules.second_subject * largest:
        share = f"{others[0] / largest:.0%} of the largest's area, under {rules.second_subject:.0%} is allowed"
        raise Dropped(Reason.SEVERAL_PICTURED, f"a second part of the mask has {share}")
    return replace(pair, coverage=coverage)


def part_areas(mask: Image.Image) -> list[int]:
    """Areas of a mask's connected parts, the largest first, in cells of a 128x128 grid; a cell touches 8 others.

    Runs of cells in each row are joined with the runs of the row above that they touch.
    """
    grid = np.asarray(mask.resize((PARTS_SIDE, PARTS_SIDE), Image.Resampling.BOX)) > 127
    numbers = itertools.count()
    areas: dict[int, int] = {}
    above: list[tuple[int, int, int]] = []
    for cells in grid:
        runs: list[tuple[int, int, int]] = []
        for start, end in np.flatnonzero(np.diff(cells, prepend=False, append=False)).reshape(-1, 2).tolist():
            touched = {part for first, past, part in above if first <= end and start <= past}
            joined = min(touched, default=next(numbers))
            areas[joined] = end - start + sum(areas.pop(part) for part in touched)
            above, runs = (
                [(first, past, joined if part in touched else part) for first, past, part in row]
                for row in (above, runs)
            )
            runs.append((start, end, joined))
        above = runs
    return sorted(areas.values(), reverse=True) or [0]


def _given_mask(pair: Pair, image: Image.Image) -> Image.Image | None:
    """The mask that the source has for the picture, else the picture's transparency, if any of it is transparent."""
    if pair.given_mask:
        try:
            mask = decode_image(pair.given_mask, name="the mask", limits=ImageLimits(min_side=1))
            return check_mask(mask, image, "the mask")
        except ImageError as error:
            raise Dropped(Reason.UNUSABLE_MASK, str(error)) from error
    if image.mode == "RGBA" and image.getchannel("A").getextrema()[0] < 255:
        return image.getchannel("A")
    return None


@lru_cache
def _pattern(nouns: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the nouns as a word of its own: not in "manual", nor in "man-made"."""
    longest_first = sorted(nouns, key=len, reverse=True)
    return re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, longest_first))})(?![\w-])", re.IGNORECASE)
