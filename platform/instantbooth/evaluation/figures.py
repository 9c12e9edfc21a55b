"""Figures of what the methods made: judged picture by picture, then averaged over subjects, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import BaseImageProcessor, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from instantbooth.errors import ParameterError, WeightsError
from instantbooth.evaluation.cases import KINDS, RECONSTRUCTION, Case
from instantbooth.evaluation.cells import Cell
from instantbooth.evaluation.judges import AttributeJudge
from instantbooth.evaluation.metrics import (
    attributes_seen,
    bootstrap_interval,
    nearest_identity,
    reconstruction,
    text_alignment,
)
from instantbooth.model.loading import load_whole

COLUMNS: Mapping[str, str] = {
    "alignment": "Alignment ↑",
    "prompt_accuracy": "Prompt accuracy ↑",
    "face_distance": "Face distance ↓",
    "face_similarity": "Face similarity ↑",
    "identification": "Identification ↑",
    "reconstruction": "Reconstruction ↑",
    "clip_i": "CLIP-I ↑",
    "dino": "DINO ↑",
}
"""Figures of pictures, and how tables head them. Alignment is what DreamBench calls CLIP-T."""
TIMES: Mapping[str, str] = {
    "seconds": "Seconds to one picture ↓",
    "seconds_all": "Seconds for all pictures ↓",
}
"""Times of a subject, end to end."""


class Embedder(Protocol):
    """Whatever tells subjects apart: the miniature's judge, a face embedder, or DINO."""

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings [N, D] of unit length."""
        ...


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Who judges; none of them has met the subjects."""

    clip: CLIPModel
    """May be the one whose image encoder methods read."""
    processor: BaseImageProcessor
    tokenizer: CLIPTokenizer
    identity: Embedder
    attributes: AttributeJudge | None = None
    """None where nobody knows attributes: outside the miniature world."""
    dino: Embedder | None = None
    """For DreamBench's figure of that name."""

    @classmethod
    def load(
        cls,
        clip: Path,
        identity: Embedder,
        *,
        attributes: AttributeJudge | None = None,
        dino: Embedder | None = None,
    ) -> Judges:
        """The others, and a whole CLIP from its folder. WeightsError where that is none."""
        try:
            model = load_whole(CLIPModel, clip).eval()
            processor = CLIPImageProcessorPil.from_pretrained(clip)
            tokenizer = CLIPTokenizer.from_pretrained(clip)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise WeightsError(f"{clip} holds no whole CLIP to judge by ({error}); name a CLIP folder") from error
        return cls(
            clip=model,
            processor=processor,
            tokenizer=tokenizer,
            identity=identity,
            attributes=attributes,
            dino=dino,
        )


@dataclass(frozen=True, kw_only=True)
class Value:
    """One figure of one picture, or of one subject."""

    column: str
    case: int
    """The subject's place among the cases."""
    kind: str
    """Of the prompt; empty for what is a subject's."""
    value: float


class Gallery:
    """Identities among which a generated picture must be recognised."""

    def __init__(self, embedder: Embedder, cases: Sequence[Case]) -> None:
        """Pictures of the cases to judge, which come first, and of others."""
        self.embeddings = [embedder.embed(case.compared) for case in cases]


def judge(judges: Judges, gallery: Gallery, cases: Sequence[Case], cells: Sequence[Cell]) -> list[Value]:
    """All figures of one method: those of its pictures, by `judge_pictures`, and its times. A cell for each case."""
    values = judge_pictures(judges, gallery, cases, [cell.pictures for cell in cells])
    for number, cell in enumerate(cells):
        values.append(_value("seconds", number, "", cell.seconds.first_picture))
        values.append(_value("seconds_all", number, "", cell.seconds.all_pictures))
        values.append(_value("seconds_fit", number, "", cell.seconds.fit))
        sampled = cell.seconds.all_pictures - cell.seconds.fit
        values.append(_value("seconds_picture", number, "", sampled / len(cell.pictures)))
    return values


def judge_pictures(
    judges: Judges, gallery: Gallery, cases: Sequence[Case], pictures: Sequence[Sequence[Image.Image]]
) -> list[Value]:
    """The figures of pictures, one for each prompt of the cases, which are the first of the gallery.

    Reconstruction is judged on the pictures of the subject alone, everything else on those of the three kinds.
    """
    if len(cases) != len(pictures) or len(cases) > len(gallery.embeddings):
        raise ParameterError(
            f"there are {len(cases)} cases, pictures of {len(pictures)} and a gallery of {len(gallery.embeddings)}; "
            "pass pictures of each case, and a gallery that holds all of them"
        )
    values = []
    for number, (case, own) in enumerate(zip(cases, pictures, strict=True)):
        values += _judge_prompts(judges, gallery, number, case, own)
        alone = [picture for picture, prompt in zip(own, case.prompts, strict=True) if prompt.kind == RECONSTRUCTION]
        if alone:
            similar = reconstruction(judges.clip, judges.processor, alone, case.compared)
            values += [_value("reconstruction", number, RECONSTRUCTION, each) for each in similar.tolist()]
    return values


def table_row(values: Sequence[Value]) -> dict[str, Any]:
    """Column → mean over subjects, of each one's mean, with its 95 % interval; `by_kind` has each kind's."""
    of_kind = {kind: [each for each in values if each.kind == kind] for kind in KINDS}
    return {**_intervals(values), "by_kind": {kind: _intervals(chosen) for kind, chosen in of_kind.items()}}


def ranked(values: Sequence[Value], column: str) -> list[tuple[int, float]]:
    """(subject, its mean) in a column, the highest first."""
    return sorted(_subject_means(values, column).items(), key=lambda item: -item[1])


def difference(values: Sequence[Value], others: Sequence[Value]) -> dict[str, Any]:
    """Column → mean and 95 % interval of what the first have more than the others, subject by subject.

    The same subjects were pictured by both, so this is far surer than a comparison of two intervals. Raises
    ParameterError where the subjects are not the same.
    """
    found = {}
    for column in COLUMNS:
        mine, theirs = (_subject_means(each, column) for each in (values, others))
        if mine.keys() != theirs.keys():
            raise ParameterError(
                f"{column} was judged for subjects {sorted(mine)} and {sorted(theirs)}; judge the same"
            )
        if mine:
            found[column] = asdict(bootstrap_interval([mine[case] - theirs[case] for case in mine]))
    return found


def _intervals(values: Sequence[Value]) -> dict[str, dict[str, float]]:
    columns = dict.fromkeys(each.column for each in values)
    return {column: asdict(bootstrap_interval(list(_subject_means(values, column).values()))) for column in columns}


def _subject_means(values: Sequence[Value], column: str) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for each in values:
        if each.column == column:
            found.setdefault(each.case, []).append(each.value)
    return {case: sum(numbers) / len(numbers) for case, numbers in found.items()}


def _judge_prompts(
    judges: Judges, gallery: Gallery, number: int, case: Case, made: Sequence[Image.Image]
) -> list[Value]:
    chosen = [n for n, prompt in enumerate(case.prompts) if prompt.kind != RECONSTRUCTION]
    pictures, kinds = [made[n] for n in chosen], [case.prompts[n].kind for n in chosen]
    if not pictures:
        return []
    embedded = judges.identity.embed(pictures)
    own = gallery.embeddings[number]
    texts = [case.plain_texts[n] for n in chosen]
    columns = {
        "alignment": text_alignment(judges.clip, judges.processor, judges.tokenizer, pictures, texts),
        "face_distance": torch.cdist(embedded, own).mean(dim=1),
        "face_similarity": (embedded @ own.T).mean(dim=1),
        "clip_i": reconstruction(judges.clip, judges.processor, pictures, case.compared),
        "identification": (nearest_identity(embedded, gallery.embeddings) == number).float(),
    }
    if judges.dino is not None:
        columns["dino"] = (judges.dino.embed(pictures) @ judges.dino.embed(case.compared).T).mean(dim=1)
    values = [
        _value(column, number, kind, each)
        for column, figures in columns.items()
        for kind, each in zip(kinds, figures.tolist(), strict=True)
    ]
    if judges.attributes is not None:
        seen = attributes_seen(judges.attributes, pictures, [case.prompts[n].wanted for n in chosen])
        pairs = zip(kinds, seen, strict=True)
        values += [_value("prompt_accuracy", number, kind, hit) for kind, hits in pairs for hit in hits]
    return values


def _value(column: str, case: int, kind: str, value: float) -> Value:
    return Value(column=column, case=case, kind=kind, value=float(value))
