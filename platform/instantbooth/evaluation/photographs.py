"""Real photographs as cases: a folder of identities (as PPR10K is laid out), or DreamBench with its own prompts."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from instantbooth.errors import ImageError, ParameterError
from instantbooth.evaluation.cases import Case, Prompt, reconstruction_prompts
from instantbooth.evaluation.methods.interface import Reference
from instantbooth.images import check_mask, decode_image
from instantbooth.prompts import CLASS_NOUNS, SUBJECT_FIELD

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
RECONSTRUCTIONS = 2
DREAMBENCH_PROMPTS = "prompts_and_classes.txt"
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


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Cases, and what cannot be one."""

    cases: list[Case]
    dropped: dict[str, str]
    """Subject → why it is left out."""


def read_identities(
    root: Path,
    *,
    class_noun: str = "person",
    references: int = 5,
    prompts: Sequence[Prompt] = PROMPTS,
    masks: Path | None = None,
) -> Dataset:
    """A case for each identity with enough pictures, of which the first ones by name are taken.

    Identities are folders of pictures, or, in one flat folder, the part of a name before its last "_" (0_3.tif is a
    picture of 0). `masks` is laid out as `root`, with PNG files. Raises ParameterError where no identity is usable, and
    ImageError for a picture that cannot be read.
    """
    cases: list[Case] = []
    dropped = {}
    for name, files in _identities(root):
        if len(files) < references:
            dropped[name] = f"{len(files)} pictures, {references} are needed"
            continue
        chosen = tuple(_reference(file, root, masks) for file in files[:references])
        cases.append(
            Case(
                name=name,
                number=len(cases),
                class_noun=class_noun,
                references=chosen,
                prompts=(*prompts, *reconstruction_prompts(RECONSTRUCTIONS)),
            )
        )
    return _checked(root, cases, dropped)


def read_dreambench(root: Path, *, references: int = 4, pictures_per_prompt: int = 4) -> Dataset:
    """DreamBench as it is published: a folder for each subject, beside prompts_and_classes.txt.

    Every subject has the 25 prompts of its kind, each `pictures_per_prompt` times. Subjects whose class no method here
    knows, or with too few pictures, are dropped. Raises ParameterError where the file is missing or none is usable.
    """
    classes, objects, live = _dreambench_file(root / DREAMBENCH_PROMPTS)
    known = {noun for nouns in CLASS_NOUNS.values() for noun in nouns}
    cases: list[Case] = []
    dropped = {}
    for name, noun in classes.items():
        files = _pictures(root / name)
        if noun not in known:
            dropped[name] = f"class {noun!r} is none of those that weights are trained for"
        elif len(files) < references:
            dropped[name] = f"{len(files)} pictures, {references} are needed"
        else:
            texts = live if noun in LIVE_CLASSES else objects
            prompts = [Prompt(kind="composition", text=text) for text in texts for _ in range(pictures_per_prompt)]
            chosen = tuple(_reference(file, root, None) for file in files[:references])
            cases.append(Case(name=name, number=len(cases), class_noun=noun, references=chosen, prompts=tuple(prompts)))
    return _checked(root, cases, dropped)


def _identities(root: Path) -> Iterator[tuple[str, list[Path]]]:
    if not root.is_dir():
        raise ParameterError(f"{root} is no folder; name one with a folder of pictures for each identity")
    folders = sorted(each for each in root.iterdir() if each.is_dir())
    if folders:
        yield from ((folder.name, _pictures(folder)) for folder in folders)
        return
    groups: dict[str, list[Path]] = {}
    for file in _pictures(root):
        groups.setdefault(file.stem.rpartition("_")[0], []).append(file)
    yield from sorted(groups.items())


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _reference(file: Path, root: Path, masks: Path | None) -> Reference:
    image = decode_image(file.read_bytes(), name=str(file))
    if masks is None:
        return Reference(image=image)
    path = (masks / file.relative_to(root)).with_suffix(".png")
    try:
        mask = decode_image(path.read_bytes(), name=str(path))
    except OSError as error:
        raise ImageError(f"{file} has no mask at {path} ({error}); add it, or pass no masks") from error
    return Reference(image=image, mask=check_mask(mask, image, str(path)))


def _checked(root: Path, cases: list[Case], dropped: dict[str, str]) -> Dataset:
    if not cases:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(dropped.items())[:5])
        raise ParameterError(f"{root} has no usable identity ({reasons or 'it holds no pictures'})")
    return Dataset(cases=cases, dropped=dropped)


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
    found = [re.findall(r"'([^']*\{0\} \{1\}[^']*)'\.format", part) for part in (objects, live)]
    if not classes or not all(found):
        raise ParameterError(
            f"{path} lists {len(classes)} subjects and no prompts for some; name DreamBench's own file"
        )
    prompts = [[text.replace("{0} {1}", SUBJECT_FIELD) for text in texts] for texts in found]
    return classes, prompts[0], prompts[1]
