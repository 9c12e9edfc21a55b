"""Judges models: `miniature` the shipped one beside its bars, `table1` all methods on the same subjects.

`tune` finds the methods' settings on validation identities, `frontier` and `references` vary InstantBooth's strengths
and number of pictures, `ablations` trains it with one part changed after the other, `report` makes a page of it all.
What one run finished the next one finds.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from instantbooth import Personalizer
from instantbooth.errors import ParameterError
from instantbooth.evaluation.judges import AttributeJudge, IdentityJudge
from instantbooth.evaluation.miniature import BARS, Examination, draw_subjects, examine
from instantbooth.miniature.corpus import render_corpus
from instantbooth.miniature.judging import attribute_accuracy, verification_auc
from instantbooth.presets import miniature_folder, miniature_preset
from jobs import cli
from jobs.evaluation.ablations import ablations
from jobs.evaluation.frontier import frontier
from jobs.evaluation.references import references
from jobs.evaluation.report import report
from jobs.evaluation.table1 import table1
from jobs.evaluation.tune import tune


@dataclass(frozen=True, kw_only=True)
class MiniatureExamination:
    """Which miniature to judge, and on how much."""

    folder: Path | None = None
    """A miniature built elsewhere (its base/, clip/, adapters/, judges/ …); the shipped one if not given."""
    weights: Path | None = None
    """Other trained weights for it."""
    identities: int = 50
    """Held-out identities, with five references and four prompts each."""
    split: Literal["test", "validation"] = "test"
    """Which held-out identities; choose parameters on validation."""
    output: Path = Path("out/evaluate")
    """Where the pictures' grid and the figures go."""

    def __post_init__(self) -> None:
        if self.identities < 2:
            raise ParameterError(f"identities must be at least 2 to tell apart, is {self.identities}; raise it")


def miniature(options: cli.Flat[MiniatureExamination]) -> None:
    """Prints the figures as JSON; exit status 1 where one misses its bar."""
    cli.make_folder(options.output)
    folder = options.folder or miniature_folder()
    preset = miniature_preset(folder)
    booth = Personalizer.from_pretrained(
        preset.base, weights=options.weights or preset.weights, image_encoder=preset.image_encoder
    )
    exam = Examination(booth, folder / "judges", draw_subjects(options.split, options.identities))
    figures, pictures = examine(exam)
    figures |= judge_figures(folder / "judges", options.output)
    missed = [name for name, bar in BARS.items() if figures[name] < bar]
    if figures["identification_top1"] <= figures["identification_top1_one_reference"]:
        missed.append("five references better than one")
    grid(exam, pictures).save(options.output / "miniature.png")
    result = {
        "split": options.split,
        "identities": options.identities,
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "bars": BARS,
        "missed": missed,
    }
    (options.output / "miniature.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(1 if missed else 0)


def judge_figures(judges: Path, output: Path) -> dict[str, float]:
    """The judges' own accuracy, on identities and scenes neither of them has seen."""
    corpus = render_corpus("judging-held-out", 200, 6, output / "corpora")
    accuracy = attribute_accuracy(AttributeJudge.load(judges / "attributes"), corpus)
    return {
        "attribute_judge_accuracy": sum(accuracy.values()) / len(accuracy),
        "identity_judge_auc": verification_auc(IdentityJudge.load(judges / "identity"), corpus),
    }


def grid(exam: Examination, images: list[Image.Image], *, subjects: int = 12, scale: int = 2) -> Image.Image:
    """Three references of each subject beside the pictures of its prompts."""
    rows = []
    for number in range(min(subjects, len(exam.subjects))):
        own = [image for image, owner in zip(images, exam.owners.tolist(), strict=True) if owner == number]
        rows.append([picture.image for picture in exam.subjects[number].references[:3]] + own)
    side = rows[0][0].width * scale
    sheet = Image.new("RGB", (side * len(rows[0]), side * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x * side, y * side))
    return sheet


COMMANDS = {
    "miniature": miniature,
    "table1": table1,
    "tune": tune,
    "frontier": frontier,
    "references": references,
    "ablations": ablations,
    "report": report,
}

if __name__ == "__main__":
    cli.commands(COMMANDS, __doc__)
