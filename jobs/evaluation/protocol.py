"""Options that every table shares: which models, which subjects and prompts, how pictures are sampled."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from instantbooth.config import GenerationDefaults, WeightsConfig
from instantbooth.errors import ParameterError, did_you_mean
from instantbooth.evaluation.cases import Case, check_count
from instantbooth.evaluation.embedders import FaceEmbedder, VisionTransformer
from instantbooth.evaluation.figures import Gallery, Judges, judge_pictures, table_row
from instantbooth.evaluation.judges import AttributeJudge, IdentityJudge
from instantbooth.evaluation.methods.interface import Sampling
from instantbooth.evaluation.methods.registry import (
    METHODS,
    STABLE_DIFFUSION,
    Parts,
    Settings,
    check_methods,
    check_references,
    field_of,
)
from instantbooth.evaluation.metrics import check_wanted
from instantbooth.evaluation.miniature_cases import draw_asked, draw_cases
from instantbooth.evaluation.photographs import Dataset, Split, find_masks, list_dreambench, list_identities
from instantbooth.model.base import locate
from instantbooth.model.segmentation import Segmenter
from instantbooth.model.weights import CONFIG_FILE
from instantbooth.parameters import SAMPLERS, check_range
from instantbooth.presets import ModelPreset, miniature_folder, miniature_preset, peers_folder, weights_folder
from instantbooth.prompts import class_of
from instantbooth.storage import open_store
from jobs import cli

SETTINGS = "settings.json"
"""What `tune` leaves in its output: settings of the methods that it tuned. The miniature ships its own."""
SHIPPED = "the shipped miniature's"
"""Name of the settings that it ships, as tables say where settings come from."""
GALLERY_REFERENCES = 5
"""Pictures of each of the miniature's subjects that a generated one is compared with."""
REFERENCES = 5
DREAMBENCH_REFERENCES = 4
DREAMBENCH_CLIP = "openai/clip-vit-base-patch32"
DREAMBENCH_DINO = "facebook/dino-vits16"
DROPPED_SHOWN = 20
"""Subjects left out that are named on the terminal."""


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """A data set of real photographs, the model to picture its subjects with, and who judges."""

    data: Path | None = None
    """Folder of the data set; without one the miniature world is evaluated."""
    base: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Stable Diffusion 1.x: a folder or a hub name."""
    clip: str = "openai/clip-vit-large-patch14"
    """Whole CLIP, folder or hub name: image encoder of the methods, and judge of alignment if no other is named."""
    judge_clip: str | None = None
    """Another whole CLIP that judges; of DreamBench openai/clip-vit-base-patch32, as it is defined."""
    face: Path | None = None
    """TorchScript or ONNX file that embeds faces, or whatever else tells the subjects apart. It is given the middle
    square of each picture: faces are not searched for."""
    face_size: int = 160
    """Side of the pictures that it reads, in pixels."""
    layout: Literal["identities", "dreambench"] = "identities"
    """A folder for each identity, as PPR10K's, or DreamBench with its own prompts."""
    class_noun: str = "person"
    """What the identities are; DreamBench says it itself."""
    masks: Path | None = None
    """Masks of the identities' pictures, laid out as they are."""
    segmenter: str | None = None
    """Model that finds masks of persons and cats where none are given; all methods that read masks get the same."""
    dino: str | None = None
    """ViT for DreamBench's DINO figure, without which there is none; of DreamBench itself facebook/dino-vits16. Without
    --face it tells the subjects apart, too."""
    pictures_per_prompt: int = 4
    """Of DreamBench's prompts."""

    def subjects(self, split: Split, pictures: int, *, any_class: bool) -> Dataset:
        """The split's subjects with enough pictures, and what is left out; nothing is decoded.

        `any_class` says whether those are wanted whose noun InstantBooth's weights do not know. Raises ParameterError.
        """
        assert self.data is not None
        if self.layout == "dreambench":
            return list_dreambench(
                self.data, pictures=pictures, pictures_per_prompt=self.pictures_per_prompt, any_class=any_class
            )
        if not any_class:
            class_of(self.class_noun)
        return list_identities(self.data, split=split, class_noun=self.class_noun, pictures=pictures, masks=self.masks)

    def judges(self) -> Judges:
        """Who judges them. Raises ParameterError and WeightsError."""
        dino = None if self.judging_dino is None else VisionTransformer(locate(self.judging_dino))
        identity = dino if self.face is None else FaceEmbedder(self.face, size=self.face_size)
        if identity is None:
            raise ParameterError(
                "photographs need somebody who tells their subjects apart; pass --face, a TorchScript or ONNX file"
            )
        return Judges.load(locate(self.judging_clip), identity, dino=dino)

    @property
    def judging_clip(self) -> str:
        """The CLIP that judges."""
        return self.judge_clip or (DREAMBENCH_CLIP if self.layout == "dreambench" else self.clip)

    @property
    def judging_dino(self) -> str | None:
        """The ViT that judges, if any."""
        return self.dino or (DREAMBENCH_DINO if self.layout == "dreambench" else None)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Which models, subjects and prompts; the same for every method."""

    output: str = "out/eval"
    """Folder, or s3://bucket/prefix, for cells and tables; where several machines work it must be seen by all."""
    models: Path | None = None
    """A miniature built elsewhere (its base/, clip/, adapters/, judges/ …); the shipped one if not given."""
    photographs: cli.Flat[Photographs] = Photographs()
    """Real photographs, and Stable Diffusion, in the miniature's place."""
    weights: Path | None = None
    """Other trained weights of InstantBooth: a folder, or registered ones such as models:/instantbooth@champion."""
    ip_adapter: Path | None = None
    """Where `jobs.train_ip_adapter` left IP-Adapter's weights, or its authors' are: global/ and plus/, in each of them
    ip_adapter.safetensors. The shipped ones, of the shipped miniature, if not given."""
    ip_adapter_image_encoder: str | None = None
    """The CLIP that these were trained with, folder or hub name; the other methods' if none is given. The authors' own
    for Stable Diffusion 1.x read laion/CLIP-ViT-H-14-laion2B-s32B-b79K."""
    settings: Path | None = None
    """Hyperparameters of the methods, as `tune` writes them; by default settings.json in `output`, if `tune` left one
    there, else the shipped miniature's. Methods that it does not name have untuned defaults, or those usual for
    photographs."""
    split: Split = "test"
    """Which held-out identities; hyperparameters are chosen on validation. All of DreamBench's are for the test."""
    identities: int = 20
    """Subjects; of the miniature half of them persons and half cats."""
    gallery: int = 50
    """Identities among which a picture must be recognised: the subjects and others of their split, if there are any."""
    references: int | None = None
    """Pictures of each subject that a method is given: 5, or 4 of DreamBench, as there are no more of some."""
    prompts_per_kind: int = 2
    """Prompts of each of the three kinds; two more picture the subject alone."""
    sampler: str | None = None
    """Of all methods, as are the next two; InstantBooth's own defaults where nothing is given."""
    num_inference_steps: int | None = None
    """Denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance."""
    cpus: float = 2.0
    """Ray's logical CPUs that a subject takes: of a laptop's four, for two processes at a time."""
    gpus: float = 0.0
    """GPUs that a subject takes; without any it is worked on by a CPU."""

    @property
    def real(self) -> bool:
        """Whether photographs are evaluated."""
        return self.photographs.data is not None

    @cached_property
    def preset(self) -> ModelPreset:
        """The models."""
        if self.real:
            chosen = ModelPreset(base=self.photographs.base, image_encoder=self.photographs.clip)
        else:
            chosen = miniature_preset(self.models or miniature_folder())
        return chosen if self.weights is None else replace(chosen, weights=weights_folder(str(self.weights)))

    @cached_property
    def parts(self) -> Parts:
        """What methods are built of. Raises ParameterError and WeightsError."""
        return Parts(
            models=self.preset,
            ip_adapter=(self.ip_adapter or peers_folder() / "ip_adapter").absolute(),
            ip_adapter_image_encoder=self.ip_adapter_image_encoder or self.preset.image_encoder,
            sampling=self._sampling(),
            settings=self._read_settings(STABLE_DIFFUSION if self.real else Settings()),
            device="cuda" if self.gpus else "cpu",
        )

    @cached_property
    def settings_file(self) -> tuple[str, str] | None:
        """Name and text of the file that the methods' settings are read from, if any. Raises ParameterError."""
        if self.settings is not None:
            try:
                return str(self.settings), self.settings.read_text()
            except OSError as error:
                raise ParameterError(
                    f"{self.settings} cannot be read ({error}); name a file that `jobs.evaluate tune` wrote"
                ) from error
        store = open_store(self.output)
        if store.exists(SETTINGS):
            return store.uri(SETTINGS), store.get(SETTINGS).decode()
        shipped = miniature_folder() / SETTINGS
        of_these_models = not self.real and self.models is None
        return (SHIPPED, shipped.read_text()) if of_these_models and shipped.exists() else None

    @property
    def methods_set(self) -> list[str]:
        """The methods that the file of settings names."""
        if self.settings_file is None:
            return []
        named = json.loads(self.settings_file[1])
        return [method for method in METHODS if field_of(method) in named]

    def settings_from(self, method: str) -> str:
        """Where a method's settings come from, in words. Raises ParameterError."""
        if self.settings_file is not None and method in self.methods_set:
            return f"{'tuned' if self.settings is None else 'given'}, {self.settings_file[0]}"
        return "the weights' own" if method.startswith("instantbooth") else "defaults, not tuned"

    def _read_settings(self, defaults: Settings) -> Settings:
        if self.settings_file is None:
            return defaults
        name, text = self.settings_file
        return Settings.from_json(text, defaults, name=name)

    def _sampling(self) -> Sampling:
        defaults = GenerationDefaults()
        if self.preset.weights is not None:
            defaults = WeightsConfig.load(Path(self.preset.weights) / CONFIG_FILE).defaults
        chosen = {}
        for each in fields(Sampling):
            given = getattr(self, each.name)
            chosen[each.name] = getattr(defaults, each.name) if given is None else given
        sampling = Sampling(**chosen)
        check_range("num_inference_steps", sampling.num_inference_steps)
        check_range("guidance_scale", sampling.guidance_scale)
        if sampling.sampler not in SAMPLERS:
            raise ParameterError(f"sampler {sampling.sampler!r} is unknown. {did_you_mean(sampling.sampler, SAMPLERS)}")
        return sampling

    @property
    def contestants(self) -> tuple[str, ...]:
        """Whose pictures are compared: subjects are those that all of them know the class of."""
        return tuple(METHODS)

    @property
    def given(self) -> int:
        """Pictures of each subject that a method is given."""
        if self.references is None:
            return DREAMBENCH_REFERENCES if self.dreambench else REFERENCES
        return self.references

    @property
    def needed(self) -> int:
        """Pictures without which a photographed subject is left out."""
        return self.given

    def check(self, methods: tuple[str, ...]) -> None:
        """Everything that can be wrong, before any cell is made; says which subjects of a data set are left out."""
        if not methods:
            raise ParameterError(f"no method is chosen; name some of {', '.join(METHODS)}")
        self._check_options()
        check_methods(methods, self.parts)
        if self.real:
            _say_dropped(self.dataset().dropped)
        judges, cases = self.judges, self.cases
        if judges.attributes is not None:
            check_wanted(judges.attributes, [prompt.wanted for case in cases for prompt in case.prompts])
        check_references(methods, cases)
        # Its pictures are read now: one that cannot be is not to be met after hours.
        _ = self.judged_against

    def _check_options(self) -> None:
        for name in ("identities", "gallery", "prompts_per_kind"):
            check_count(name, getattr(self, name), 1)
        check_count("references", self.given, 1)
        if not self.cpus > 0:
            raise ParameterError(f"cpus must be above 0, is {self.cpus:g}; 1 lets a subject run on each CPU")
        if not self.gpus >= 0 or (self.gpus > 1 and self.gpus % 1):
            raise ParameterError(f"gpus must be whole or a part of one, is {self.gpus:g}; 0.5 shares one between two")
        if not self.real:
            named = [each.name for each in fields(Photographs)]
            refuse_unused(self.photographs, named, "is for photographs, and there are none without --data")
            return
        refuse_unused(self, ("models", "prompts_per_kind"), "is for the miniature, not for --data")
        if self.dreambench:
            refuse_unused(
                self.photographs, ("masks", "class_noun"), "is for identities: DreamBench has its own classes"
            )
            if self.split != "test":
                raise ParameterError(
                    f"split is {self.split}, and all of DreamBench's subjects are for the test; choose hyperparameters "
                    "on photographs of --layout identities"
                )
            check_count("pictures_per_prompt", self.photographs.pictures_per_prompt, 1)
        else:
            refuse_unused(self.photographs, ("pictures_per_prompt",), "is for --layout dreambench")

    @property
    def dreambench(self) -> bool:
        """Whether photographs are DreamBench's."""
        return self.real and self.photographs.layout == "dreambench"

    def dataset(self) -> Dataset:
        """The photographed subjects, and who is left out. Raises ParameterError."""
        any_class = all(METHODS[name].any_class for name in self.contestants)
        return self.photographs.subjects(self.split, self.needed, any_class=any_class)

    @cached_property
    def cases(self) -> list[Case]:
        """The subjects, in their order. ParameterError where a data set has fewer than are wanted."""
        if not self.real:
            return self._drawn(self.identities, self.given)
        subjects = self.dataset().subjects
        if len(subjects) < self.identities:
            raise ParameterError(
                f"{self.photographs.data} has {len(subjects)} usable subjects of its {self.split} split, identities is "
                f"{self.identities}; pass --identities {len(subjects)}"
            )
        cases = [subject.case(self.given) for subject in subjects[: self.identities]]
        if self.photographs.segmenter is None or not any(METHODS[name].reads_masks for name in self.contestants):
            return cases
        segmenter = Segmenter(locate(self.photographs.segmenter), device=torch.device("cpu"))
        return [find_masks(case, segmenter) for case in cases]

    def _drawn(self, count: int, references: int) -> list[Case]:
        return draw_cases(self.split, count, references=references, prompts_per_kind=self.prompts_per_kind)

    @cached_property
    def judges(self) -> Judges:
        """The miniature's own, or those named for photographs. Raises WeightsError."""
        if self.real:
            return self.photographs.judges()
        places = self.judging
        return Judges.load(
            places["clip"],
            IdentityJudge.load(places["identity"]),
            attributes=AttributeJudge.load(places["attributes"]),
        )

    @property
    def judging(self) -> dict[str, Path]:
        """Where those lie who judge: folders, or a face embedder's file."""
        if not self.real:
            folder = self.models or miniature_folder()
            judges = folder / "judges"
            return {"clip": folder / "clip", "identity": judges / "identity", "attributes": judges / "attributes"}
        photographs = self.photographs
        found = {"clip": locate(photographs.judging_clip)}
        if photographs.face is not None:
            found["face"] = photographs.face
        dino = photographs.judging_dino
        return found if dino is None else found | {"dino": locate(dino)}

    @cached_property
    def judged_against(self) -> Gallery:
        """The subjects and as many others as `gallery` says, whatever the methods are given of them."""
        count = max(self.gallery, self.identities)
        if not self.real:
            return Gallery(self.judges.identity, self._drawn(count, GALLERY_REFERENCES))
        return Gallery(self.judges.identity, [subject.case(self.given) for subject in self.dataset().subjects[:count]])

    def drawn_row(self) -> dict[str, Any] | None:
        """Figures of the subjects themselves in the scenes that the prompts name; None for photographs."""
        if self.real:
            return None
        pictures = [draw_asked(self.split, case) for case in self.cases]
        return table_row(judge_pictures(self.judges, self.judged_against, self.cases, pictures))

    def record(self) -> dict[str, Any]:
        """What was evaluated, for tables to keep: the numbers that were used, and who was left out."""
        used: dict[str, Any] = {"split": self.split, "identities": self.identities, "references": self.given}
        wanted = max(self.gallery, self.identities)
        if not self.real:
            return used | {"gallery": wanted, "prompts_per_kind": self.prompts_per_kind}
        found = self.dataset()
        return used | {"gallery": min(wanted, len(found.subjects)), "dropped": found.dropped}


def refuse_unused(options: Any, names: Iterable[str], rule: str) -> None:
    """ParameterError for an option of these that is set, where it would do nothing."""
    defaults = {each.name: each.default for each in fields(options)}
    for name in names:
        if getattr(options, name) != defaults[name]:
            raise ParameterError(f"--{name.replace('_', '-')} {rule}; leave it out")


def _say_dropped(dropped: Mapping[str, str]) -> None:
    for name, reason in list(dropped.items())[:DROPPED_SHOWN]:
        print(f"left out: {name}, {reason}", file=sys.stderr)
    if len(dropped) > DROPPED_SHOWN:
        print(f"left out: {len(dropped) - DROPPED_SHOWN} more, which the table's file names", file=sys.stderr)
