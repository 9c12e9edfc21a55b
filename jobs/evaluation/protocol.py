"""Options that every table shares: which models, which subjects and prompts, how pictures are sampled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from instantbooth.config import GenerationDefaults, WeightsConfig
from instantbooth.errors import ParameterError
from instantbooth.evaluation.cases import Case
from instantbooth.evaluation.figures import Gallery, Judges
from instantbooth.evaluation.methods.interface import Sampling
from instantbooth.evaluation.methods.registry import METHODS, Parts, Settings, check_methods
from instantbooth.evaluation.miniature_cases import draw_cases
from instantbooth.model.weights import CONFIG_FILE
from instantbooth.presets import ModelPreset, miniature_folder, miniature_preset

GALLERY_REFERENCES = 5
"""Pictures of each subject that a generated one is compared with."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Which models, subjects and prompts; the same for every method."""

    output: str = "out/eval"
    """Folder, or s3://bucket/prefix, for cells and tables; where several machines work it must be seen by all."""
    models: Path | None = None
    """A miniature built elsewhere (its base/, clip/, adapters/, judges/ …); the shipped one if not given."""
    weights: Path | None = None
    """Other trained weights of InstantBooth."""
    ip_adapter: Path = Path("out/ip_adapter")
    """Where `jobs.train_ip_adapter` left IP-Adapter's weights."""
    settings: Path | None = None
    """Hyperparameters of the methods, as `tune` writes them; those chosen for the miniature if not given."""
    split: Literal["test", "validation"] = "test"
    """Which held-out identities; hyperparameters are chosen on validation."""
    identities: int = 20
    """Subjects, half of them persons and half cats."""
    gallery: int = 50
    """Identities among which a picture must be recognised: the subjects and others of their split."""
    references: int = 5
    """Pictures of each subject that a method is given."""
    prompts_per_kind: int = 2
    """Prompts of each of the three kinds; two more picture the subject alone."""
    sampling: Sampling | None = None
    """Sampler, steps and guidance of all methods; InstantBooth's own defaults if not given."""
    cpus: float = 2.0
    """Ray's logical CPUs that a subject takes: of a laptop's four, for two processes at a time."""
    gpus: float = 0.0
    """GPUs that a subject takes; without any it is worked on by a CPU."""

    @cached_property
    def preset(self) -> ModelPreset:
        """The models."""
        chosen = miniature_preset(self.models or miniature_folder())
        return chosen if self.weights is None else replace(chosen, weights=str(self.weights))

    @cached_property
    def parts(self) -> Parts:
        """What methods are built of. Raises ParameterError and WeightsError."""
        return Parts(
            models=self.preset,
            ip_adapter=self.ip_adapter.absolute(),
            sampling=self.sampling or _own_sampling(self.preset),
            settings=_read_settings(self.settings),
            device="cuda" if self.gpus else "cpu",
        )

    def check(self, methods: tuple[str, ...]) -> None:
        """Everything that can be wrong, before any model runs."""
        if not methods:
            raise ParameterError(f"no method is chosen; name some of {', '.join(METHODS)}")
        check_methods(methods, self.parts)
        self.judges()
        self.cases()

    def cases(self, count: int | None = None) -> list[Case]:
        """The subjects, in their order."""
        return draw_cases(
            self.split,
            count or self.identities,
            references=self.references,
            prompts_per_kind=self.prompts_per_kind,
        )

    def judges(self) -> Judges:
        """The miniature's own."""
        folder = self.models or miniature_folder()
        return Judges.load(folder / "clip", folder / "judges")

    def judged_against(self, judges: Judges) -> Gallery:
        """The subjects and as many others as `gallery` says, whatever the methods are given of them."""
        known = replace(self, references=GALLERY_REFERENCES)
        return Gallery(judges.identity, known.cases(max(self.gallery, self.identities)))


def _own_sampling(preset: ModelPreset) -> Sampling:
    """What InstantBooth's weights say of themselves, else the usual."""
    defaults = GenerationDefaults()
    if preset.weights is not None:
        defaults = WeightsConfig.load(Path(preset.weights) / CONFIG_FILE).defaults
    return Sampling(
        sampler=defaults.sampler,
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
    )


def _read_settings(path: Path | None) -> Settings:
    if path is None:
        return Settings()
    try:
        return Settings.from_json(path.read_text(), name=str(path))
    except OSError as error:
        raise ParameterError(f"{path} cannot be read ({error}); name a file that `jobs.evaluate tune` wrote") from error
