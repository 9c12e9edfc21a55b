"""Moves the alias "champion" to the candidate, if it is no worse on validation identities; says why in the registry."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from instantbooth import Personalizer
from instantbooth.errors import ParameterError, WeightsError
from instantbooth.evaluation.miniature import Examination, draw_subjects, judges_of
from instantbooth.presets import tracking_uri
from instantbooth.tracking import CANDIDATE, CHAMPION, Registry, Version
from jobs import cli

GATES = ("identification_top1", "identity_similarity", "prompt_accuracy")


@dataclass(frozen=True, kw_only=True)
class PromoteConfig:
    """Who is judged against whom, and how strictly."""

    candidate: str = CANDIDATE
    """Alias, or number, of the version that may become champion."""
    tracking_uri: str = field(default_factory=tracking_uri)
    """MLflow: the registry. By default MLFLOW_TRACKING_URI."""
    identities: int = 16
    """Validation identities, with five references and four prompts each. They are the miniature world's."""
    tolerance: float = 0.02
    """A figure fails its gate where it is lower than the champion's by more than this."""
    floors: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Least identification_top1, identity_similarity and prompt_accuracy, champion or not."""
    judges: Path | None = None
    """Folder with the judges attributes/ and identity/; those beside the candidate's base if none is given."""

    def __post_init__(self) -> None:
        if self.identities < 1:
            raise ParameterError(f"identities must be at least 1, is {self.identities}; 16 is the default")


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
    judges = _judges(config, candidate)
    figures = {"candidate": _figures(config, candidate, judges)}
    if champion is not None:
        same = champion.number == candidate.number
        figures["champion"] = figures["candidate"] if same else _figures(config, champion, judges)
    failed, reasons = judge(figures["candidate"], figures.get("champion"), config)
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


def judge(
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


def _judges(config: PromoteConfig, candidate: Version) -> Path:
    """The folder of those named, else of the miniature that the candidate belongs to."""
    judges = config.judges or judges_of(candidate.base)
    if judges is None:
        raise ParameterError(
            f"{candidate.uri} belongs to {candidate.base}, which is no miniature with judges beside it; name judges "
            "that know its pictures: --judges"
        )
    return judges


def _figures(config: PromoteConfig, version: Version, judges: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        weights = Registry(config.tracking_uri).download(version, Path(scratch))
        booth = Personalizer.from_pretrained(version.base, image_encoder=version.image_encoder or None, weights=weights)
    exam = Examination(booth, judges, draw_subjects("validation", config.identities))
    pictures = exam.personalized(exam.concepts(5))
    values = (exam.identification_top1(pictures), exam.similarity(pictures), exam.prompt_accuracy(pictures))
    return {gate: round(value, 4) for gate, value in zip(GATES, values, strict=True)}


def run(config: PromoteConfig) -> None:
    """Prints the decision as JSON; exit status 1 where the candidate is refused."""
    decision = promote(config)
    print(json.dumps(vars(decision), indent=2))
    sys.exit(0 if decision.promoted else 1)


if __name__ == "__main__":
    cli.main(run, PromoteConfig, __doc__)
