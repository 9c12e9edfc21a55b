"""Moves the alias "champion" to the candidate, if it is no worse on validation identities; says why in the registry."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from instantbooth import Personalizer
from instantbooth.errors import ParameterError, WeightsError
from instantbooth.evaluation.figures import judge_pictures, table_row
from instantbooth.evaluation.methods.interface import Sampling
from instantbooth.evaluation.methods.personalizer import InstantBooth
from instantbooth.evaluation.miniature import Examination, draw_subjects, judges_of
from instantbooth.presets import tracking_uri
from instantbooth.tracking import CANDIDATE, CHAMPION, Registry, Version
from jobs import cli
from jobs.evaluation.protocol import Photographs, Protocol, refuse_unused

GATES = ("identification_top1", "identity_similarity", "prompt_accuracy")
"""Figures that decide; the last is the attribute judge's, or of photographs CLIP's text alignment."""
JUDGED = ("identification", "face_similarity", "alignment")
"""The columns of an evaluation of photographs that they are."""
UNUSED = ("base", "layout", "dino", "pictures_per_prompt")
"""Of the options for photographs: a version knows its base, and DreamBench's subjects are all for the test."""

Examiner = Callable[[Personalizer], dict[str, float]]
"""Measures the GATES of a model."""


@dataclass(frozen=True, kw_only=True)
class PromoteConfig:
    """Who is judged against whom, and how strictly."""

    candidate: str = CANDIDATE
    """Alias, or number, of the version that may become champion."""
    tracking_uri: str = field(default_factory=tracking_uri)
    """MLflow: the registry. By default MLFLOW_TRACKING_URI."""
    identities: int = 16
    """Validation identities: of the miniature, with five references and four prompts each, or of the photographs."""
    photographs: cli.Flat[Photographs] = Photographs()
    """For versions whose base pictures the real world."""
    tolerance: float = 0.02
    """A figure fails its gate where it is lower than the champion's by more than this."""
    floors: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Least identification_top1, identity_similarity and prompt_accuracy, champion or not."""
    judges: Path | None = None
    """Folder with the miniature's judges attributes/ and identity/; those beside the candidate's base by default."""

    def __post_init__(self) -> None:
        if self.identities < 1:
            raise ParameterError(f"identities must be at least 1, is {self.identities}; 16 is the default")
        if self.photographs.data is None:
            every = [each.name for each in fields(Photographs)]
            refuse_unused(self.photographs, every, "is for photographs, and there are none without --data")
        refuse_unused(self.photographs, UNUSED, "is for jobs.evaluate")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What became of the candidate."""

    candidate: str
    champion: str | None
    """The champion before; None where there was none."""
    promoted: bool
    reasons: list[str]
    """One sentence a gate."""
    figures: dict[str, dict[str, float]]
    """"candidate" and "champion" → figure → value."""


def promote(config: PromoteConfig) -> Decision:
    """Examines both versions on the same identities, prompts and seeds, and moves the alias if no gate fails.

    What is promoted is the version that was examined, whatever the candidate's alias names by then. Raises WeightsError
    where there is no candidate, ParameterError where nobody can judge it, TrackingError where the registry could not be
    asked: then no alias moves.
    """
    registry = Registry(config.tracking_uri)
    candidate = registry.version(config.candidate)
    champion = registry.find(CHAMPION)
    for version in (candidate, champion):
        if version is not None and not version.base:
            raise WeightsError(f"{version.uri} does not say which base it was trained for; register it by a training")
    examiner = _on_miniature(config, candidate) if config.photographs.data is None else _on_photographs(config)
    figures = {"candidate": _figures(config, candidate, examiner)}
    if champion is not None:
        same = champion.number == candidate.number
        figures["champion"] = figures["candidate"] if same else _figures(config, champion, examiner)
    failed, reasons = weigh(figures["candidate"], figures.get("champion"), config)
    decision = Decision(
        candidate=candidate.uri,
        champion=champion.uri if champion else None,
        promoted=not failed,
        reasons=reasons,
        figures=figures,
    )
    registry.note(candidate, promotion="promoted" if decision.promoted else "refused", reasons="\n".join(reasons))
    if decision.promoted:
        registry.point(CHAMPION, candidate)
    return decision


def weigh(
    candidate: dict[str, float], champion: dict[str, float] | None, config: PromoteConfig
) -> tuple[list[str], list[str]]:
    """The gates that fail, and a sentence on every gate."""
    failed, reasons = [], []
    for gate, floor in zip(GATES, config.floors, strict=True):
        least = floor if champion is None else max(floor, champion[gate] - config.tolerance)
        passes = candidate[gate] >= least
        against = f"champion {champion[gate]:.4f}" if champion else "no champion"
        verdict = "passes" if passes else "fails"
        reasons.append(f"{gate} {candidate[gate]:.4f} {verdict}: at least {least:.4f} ({against})")
        if not passes:
            failed.append(gate)
    return failed, reasons


def _on_miniature(config: PromoteConfig, candidate: Version) -> Examiner:
    """By the judges that are named, else by those of the miniature that the candidate belongs to."""
    judges = config.judges or judges_of(candidate.base)
    if judges is None:
        raise ParameterError(
            f"{candidate.uri} belongs to {candidate.base}, which is no miniature with judges beside it; name "
            "photographs to judge by (--data, --face), or judges that know its pictures (--judges)"
        )
    subjects = draw_subjects("validation", config.identities)

    def examine(booth: Personalizer) -> dict[str, float]:
        exam = Examination(booth, judges, subjects)
        pictures = exam.personalized(exam.concepts(5))
        values = (exam.identification_top1(pictures), exam.similarity(pictures), exam.prompt_accuracy(pictures))
        return dict(zip(GATES, values, strict=True))

    return examine


def _on_photographs(config: PromoteConfig) -> Examiner:
    """By the protocol of `jobs.evaluate`, on the validation split."""
    protocol = Protocol(photographs=config.photographs, split="validation", identities=config.identities)
    judges, gallery, cases = protocol.judges, protocol.judged_against, protocol.cases
    masked = all(reference.mask is not None for case in cases for reference in case.references)

    def examine(booth: Personalizer) -> dict[str, float]:
        sampling = Sampling(**{each.name: getattr(booth.defaults, each.name) for each in fields(Sampling)})
        method = InstantBooth(booth, sampling, masked=masked)
        pictures = [
            method.generate(method.fit(case.references, case.class_noun), case.texts, case.seeds) for case in cases
        ]
        row = table_row(judge_pictures(judges, gallery, cases, pictures))
        return {gate: row[column]["mean"] for gate, column in zip(GATES, JUDGED, strict=True)}

    return examine


def _figures(config: PromoteConfig, version: Version, examiner: Examiner) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        weights = Registry(config.tracking_uri).download(version, Path(scratch))
        booth = Personalizer.from_pretrained(version.base, image_encoder=version.image_encoder or None, weights=weights)
    return {gate: round(value, 4) for gate, value in examiner(booth).items()}


def run(config: PromoteConfig) -> None:
    """Prints the decision as JSON; exit status 1 where the candidate is refused."""
    decision = promote(config)
    print(json.dumps(vars(decision), indent=2))
    sys.exit(0 if decision.promoted else 1)


if __name__ == "__main__":
    cli.main(run, PromoteConfig, __doc__)
