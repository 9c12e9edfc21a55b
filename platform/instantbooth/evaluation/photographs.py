"""Real photographs as cases: a folder of identities (as PPR10K is laid out), or DreamBench with its own prompts."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

from PIL import Image

from instantbooth.errors import ImageError, ParameterError
from instantbooth.evaluation.cases import Case, Prompt, reconstruction_prompts
from instantbooth.evaluation.methods.interface import Reference
from instantbooth.images import check_mask, decode_reference
from instantbooth.model.segmentation import Segmenter
from instantbooth.prompts import CLASS_NOUNS, SUBJECT_FIELD

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
VALIDATION_SHARE = 5
"""One in so many identities is for validation."""
DREAMBENCH_PROMPTS = "prompts_and_classes.txt"
DREAMBENCH_COUNT = 25
"""Prompts for objects, and as many for live subjects."""
LIVE_CLASSES = ("cat", "dog")
"""Classes whose subjects take DreamBench's prompts for live subjects."""
PROMPTS = tuple(
    Prompt(kind=kind, text=text)
    for kind, text in (
        ("background", "a photo of a {subject} on the beach"),
        ("background", "a photo of a {subject} in front of the Eiffel Tower"),
        ("style", "a watercolor painting of a {subject}"),
        ("style", "a pencil sketch of a {subject}"),
        ("composition", "a photo of a {subject} wearing a red hat and reading a book"),
        ("composition", "a photo of a {subject} riding a bicycle in the snow"),
    )
)
"""For identities of a data set that has no prompts of its own."""

Split = Literal["test", "validation"]


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A subject by its files, none of which is read yet."""

    name: str
    number: int
    """Its place in the data set, whoever else is left out."""
    class_noun: str
    files: tuple[Path, ...]
    """Pictures that generated ones are compared with."""
    masks: tuple[Path, ...] = ()
    """Theirs, where there are any."""
    prompts: tuple[Prompt, ...]

    def case(self, references: int) -> Case:
        """Reads the pictures, of which methods are given the first ones.

        Raises ImageError for one that cannot be read or lacks its mask.
        """
        images = [decode_reference(file.read_bytes(), name=str(file)) for file in self.files]
        given = [Reference(image=image) for image in images[:references]]
        if self.masks:
            chosen = zip(images[:references], self.files, self.masks, strict=False)
            given = [Reference(image=image, mask=_mask(image, file, mask)) for image, file, mask in chosen]
        return Case(
            name=self.name,
            number=self.number,
            class_noun=self.class_noun,
            references=tuple(given),
            prompts=self.prompts,
            known=tuple(images),
        )


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Subjects, and what cannot be one."""

    subjects: list[Listed]
    dropped: dict[str, str]
    """Subject → why it is left out."""


def find_masks(case: Case, segmenter: Segmenter) -> Case:
    """The case with masks for those of its references that have none, if the segmenter knows its class at all.

    ImageError for a reference in which no subject is found.
    """
    if not any(case.class_noun in nouns for nouns in CLASS_NOUNS.values()):
        return case
    found = [
        each
        if each.mask is not None
        else replace(
            each, mask=segmenter.mask(each.image.convert("RGB"), case.class_noun, f"{case.name}, reference {number}")
        )
        for number, each in enumerate(case.references, start=1)
    ]
    return replace(case, references=tuple(found))


def list_identities(
    root: Path,
    *,
    split: Split = "test",
    class_noun: str = "person",
    pictures: int = 5,
    prompts: Sequence[Prompt] = PROMPTS,
    masks: Path | None = None,
) -> Dataset:
    """The split's identities that have enough pictures, of which the first ones by name are taken.

    Identities are folders of pictures, or, in one flat folder, the part of a name before its last "_" (0_3.tif is a
    picture of 0). `masks` is laid out as `root`, with PNG files. ParameterError where no identity is usable.
    """
    subjects: list[Listed] = []
    dropped: dict[str, str] = {}
    for number, (name, files) in enumerate(_identities(root)):
        if not name:
            dropped |= {file.name: "no identity stands before a '_' in its name" for file in files}
        elif split_of(name) != split:
            continue
        elif len(files) < pictures:
            dropped[name] = _too_few(files, pictures)
        else:
            chosen = tuple(files[:pictures])
            subjects.append(
                Listed(
                    name=name,
                    number=number,
                    class_noun=class_noun,
                    files=chosen,
                    masks=() if masks is None else tuple(masks / file.relative_to(root) for file in chosen),
                    prompts=(*prompts, *reconstruction_prompts()),
                )
            )
    return _checked(f"the {split} split of {root} (a fifth of its names is for validation)", subjects, dropped)


def split_of(name: str) -> Split:
    """An identity's split, which follows from its name alone: whoever joins the data set or leaves it changes none."""
    chosen = int.from_bytes(sha256(name.encode()).digest()) % VALIDATION_SHARE == 0
    return "validation" if chosen else "test"


def list_dreambench(root: Path, *, pictures: int = 4, pictures_per_prompt: int = 4, any_class: bool = True) -> Dataset:
    """DreamBench as it is published: a folder for each subject, beside prompts_and_classes.txt.

    Every subject has the 25 prompts of its kind, each `pictures_per_prompt` times, and is compared with all of its
    pictures. Dropped are those with fewer than `pictures` and, unless `any_class`, those whose noun is in no class that
    InstantBooth's weights are trained for. Raises ParameterError where the list cannot be read or none is usable.
    """
    classes, objects, live = _dreambench_file(root / DREAMBENCH_PROMPTS)
    known = {noun for nouns in CLASS_NOUNS.values() for noun in nouns}
    subjects: list[Listed] = []
    dropped = {}
    for number, (name, noun) in enumerate(classes.items()):
        files = _pictures(root / name)
        if not any_class and noun not in known:
            dropped[name] = f"InstantBooth's weights know no {noun}; a table of other --methods keeps it"
        elif len(files) < pictures:
            dropped[name] = _too_few(files, pictures)
        else:
            texts = live if noun in LIVE_CLASSES else objects
            prompts = [Prompt(kind="composition", text=text) for text in texts for _ in range(pictures_per_prompt)]
            subjects.append(
                Listed(name=name, number=number, class_noun=noun, files=tuple(files), prompts=tuple(prompts))
            )
    return _checked(str(root), subjects, dropped)


def _identities(root: Path) -> Iterator[tuple[str, list[Path]]]:
    if not root.is_dir():
        raise ParameterError(f"{root} is no folder; name one with a folder of pictures for each identity")
    folders = sorted((each for each in root.iterdir() if each.is_dir()), key=_natural)
    if folders:
        yield from ((folder.name, _pictures(folder)) for folder in folders)
        return
    groups: dict[str, list[Path]] = {}
    for file in _pictures(root):
        groups.setdefault(file.stem.rpartition("_")[0], []).append(file)
    yield from groups.items()


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES), key=_natural)


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Orders names as people do: 2 before 10."""
    parts = [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]
    return parts, path.name


def _mask(image: Image.Image, file: Path, path: Path) -> Image.Image:
    path = path.with_suffix(".png")
    try:
        mask = decode_reference(path.read_bytes(), name=str(path))
    except OSError as error:
        raise ImageError(f"{file} has no mask at {path} ({error}); add it, or pass no masks") from error
    return check_mask(mask, image, str(path))


def _too_few(files: Sequence[Path], needed: int) -> str:
    return f"{len(files)} pictures, {needed} are needed"


def _checked(place: str, subjects: list[Listed], dropped: dict[str, str]) -> Dataset:
    if not subjects:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(dropped.items())[:5])
        raise ParameterError(f"{place} has no usable identity ({reasons or 'it holds no pictures'})")
    return Dataset(subjects=subjects, dropped=dropped)


def _dreambench_file(path: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """Class of each subject, the prompts for objects, and those for live subjects."""
    try:
        text = path.read_text()
        heading, _, rest = text.partition("Object Prompts")
        objects, _, live = rest.partition("Live Subject Prompts")
        lines = heading.partition("subject_name,class")[2].partition("Prompts")[0].strip().splitlines()
        classes = dict(csv.reader(lines))
    except (OSError, ValueError) as error:
        raise ParameterError(
            f"{path} cannot be read as DreamBench's list ({error}); name its dataset folder"
        ) from error
    if not classes:
        raise ParameterError(f"{path} lists no subjects; name DreamBench's own file")
    return classes, _prompts(path, "objects", objects), _prompts(path, "live subjects", live)


def _prompts(path: Path, kind: str, listed: str) -> list[str]:
    """One prompt a line. ParameterError for a line that is none, and unless there are as many as are published."""
    texts = []
    for line in re.findall(r"^.*\{0\}.*$", listed, re.MULTILINE):
        found = re.search(r"""(['"])(.*?\{0\} \{1\}.*?)\1\.format""", line)
        if found is None:
            raise ParameterError(
                f"{path} has a line that is no prompt: {line.strip()!r}; write '… {{0}} {{1}} …'.format("
            )
        texts.append(found[2].replace("{0} {1}", SUBJECT_FIELD))
    if len(texts) != DREAMBENCH_COUNT:
        raise ParameterError(
            f"{path} has {len(texts)} prompts for {kind}, DreamBench has {DREAMBENCH_COUNT}; name its own file"
        )
    return texts
