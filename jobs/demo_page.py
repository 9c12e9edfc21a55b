"""What the demo shows: a self-contained page and a contact sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from instantbooth.prompts import SUBJECT_FIELD
from pipelines.page import render

TILE = 192
GAP = 10
HEAD = 84
PAPER, INK, MUTED = (250, 248, 244), (38, 36, 33), (122, 117, 109)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One row of the manifest with its pictures."""

    id: str
    references: Sequence[Image.Image]
    prompts: Sequence[str]
    kinds: Sequence[str]
    """What each prompt asks for: a background, a style, …"""
    pictures: Sequence[Image.Image]
    """One for each prompt."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A training curve, scaled into a box of WIDTH × HEIGHT for SVG."""

    points: Sequence[tuple[int, float]]
    """(step, loss)."""
    width: int = field(default=720, init=False)
    height: int = field(default=180, init=False)

    @property
    def low(self) -> float:
        """Least loss."""
        return min(loss for _, loss in self.points)

    @property
    def high(self) -> float:
        """Largest loss."""
        return max(loss for _, loss in self.points)

    @property
    def steps(self) -> int:
        """The last step."""
        return self.points[-1][0]

    def path(self, smoothing: float = 0.0) -> str:
        """SVG points of the curve, or of its exponential average."""
        height = self.high - self.low or 1.0
        average, placed = self.points[0][1], []
        for step, loss in self.points:
            average = smoothing * average + (1 - smoothing) * loss
            x, y = self.width * step / self.steps, self.height * (self.high - average) / height
            placed.append(f"{x:.1f},{y:.1f}")
        return " ".join(placed)


def write_page(
    path: Path,
    *,
    subjects: Sequence[Subject],
    curve: Curve,
    curation: Mapping[str, object],
    failures: Sequence[Mapping[str, object]],
    summary: Mapping[str, object],
) -> None:
    """Writes the report; pictures are inside, and nothing is loaded from elsewhere.

    `curation` is an ingestion's report, `failures` the records of rows without pictures, `summary` what summary.json
    says.
    """
    page = render("demo.html.j2", subjects=subjects, curve=curve, curation=curation, failures=failures, summary=summary)
    path.write_text(page)


def write_contact_sheet(path: Path, subjects: Sequence[Subject]) -> None:
    """Writes a PNG with one line a subject: references left, pictures right. All subjects must share their prompts.

    Without subjects there is none afterwards: an earlier one would show what is not in the report.
    """
    path.unlink(missing_ok=True)
    if not subjects:
        return
    first = subjects[0]
    references, prompts = len(first.references), len(first.prompts)
    left = GAP + references * (TILE + GAP)
    width = left + 2 * GAP + prompts * (TILE + GAP)
    sheet = Image.new("RGB", (width, HEAD + len(subjects) * (TILE + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, (GAP, HEAD), "reference images", MUTED)
    for column, prompt in enumerate(first.prompts):
        _write(pen, (left + 2 * GAP + column * (TILE + GAP), HEAD), prompt.replace(SUBJECT_FIELD, "…"), INK)
    for line, subject in enumerate(subjects):
        y = HEAD + line * (TILE + GAP)
        for column, image in enumerate([*subject.references, *subject.pictures]):
            x = GAP + column * (TILE + GAP) + (2 * GAP if column >= references else 0)
            sheet.paste(image.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS), (x, y))
    pen.line([(left + GAP // 2, GAP), (left + GAP // 2, sheet.height - GAP)], fill=(214, 208, 198), width=2)
    sheet.save(path)


def _write(pen: ImageDraw.ImageDraw, below: tuple[int, int], text: str, color: tuple[int, int, int]) -> None:
    """Wraps text over a tile, its last line just above."""
    lines = textwrap.wrap(text, 26)
    font = ImageFont.load_default(size=14)
    for number, line in enumerate(lines):
        pen.text((below[0], below[1] - 19 * (len(lines) - number) - 3), line, fill=color, font=font)
