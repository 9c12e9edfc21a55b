"""The methods by name, and the settings that each of them runs with."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch

from instantbooth import Personalizer
from instantbooth.errors import ParameterError, did_you_mean
from instantbooth.evaluation.cases import Case
from instantbooth.evaluation.ip_adapter import weights
from instantbooth.evaluation.ip_adapter.origin import check_origin
from instantbooth.evaluation.methods.dreambooth import DreamBooth, DreamBoothConfig
from instantbooth.evaluation.methods.interface import Method, Sampling
from instantbooth.evaluation.methods.ip_adapter import IPAdapter, IPAdapterConfig
from instantbooth.evaluation.methods.personalizer import InstantBooth, InstantBoothConfig
from instantbooth.evaluation.methods.textual_inversion import TextualInversion, TextualInversionConfig
from instantbooth.model.base import BaseModel, device_of, locate, unet_outline
from instantbooth.model.personalizer import check_fit
from instantbooth.presets import ModelPreset


def field_of(method: str) -> str:
    """The method's field of Settings."""
    return method.replace("-", "_")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hyperparameters of the methods. The defaults are for the miniature, and where its tuning starts."""

    textual_inversion: TextualInversionConfig = TextualInversionConfig()
    dreambooth: DreamBoothConfig = DreamBoothConfig()
    dreambooth_lora: DreamBoothConfig = DreamBoothConfig(lora_rank=8, learning_rate=1e-3)
    ip_adapter: IPAdapterConfig = IPAdapterConfig(variant="global")
    ip_adapter_plus: IPAdapterConfig = IPAdapterConfig(variant="plus")
    instantbooth: InstantBoothConfig = InstantBoothConfig()
    instantbooth_masked: InstantBoothConfig = InstantBoothConfig()

    def of(self, method: str) -> Any:
        """One method's."""
        return getattr(self, field_of(method))

    def to_json(self, methods: Collection[str] | None = None) -> str:
        """What `from_json` reads; of these methods alone, if some are named."""
        chosen = None if methods is None else {field_of(method) for method in methods}
        values = {name: own for name, own in asdict(self).items() if chosen is None or name in chosen}
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, defaults: Settings | None = None, *, name: str = "the settings") -> Settings:
        """Settings from JSON; what is missing is as in `defaults`.

        ParameterError for an unknown method or field, and for a value of the wrong type.
        """
        try:
            values: dict[str, dict[str, Any]] = json.loads(text)
            chosen = {}
            for each in fields(cls):
                known, given = getattr(defaults or cls(), each.name), values.pop(each.name, {})
                chosen[each.name] = _changed(f"{name}, {each.name}", known, given)
        except ParameterError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            raise ParameterError(f"{name} cannot be read ({error}); write what `jobs.evaluate tune` writes") from error
        if values:
            raise ParameterError(f"{name} names {', '.join(values)}. {did_you_mean(next(iter(values)), chosen)}")
        return cls(**chosen)


STABLE_DIFFUSION = Settings(
    textual_inversion=TextualInversionConfig(steps=3000, learning_rate=2e-3, weight_decay=0.01),
    dreambooth=DreamBoothConfig(steps=800, learning_rate=5e-6, batch_size=1, prior_pictures=200),
    dreambooth_lora=DreamBoothConfig(steps=800, learning_rate=1e-4, batch_size=1, prior_pictures=200, lora_rank=8),
    ip_adapter=IPAdapterConfig(variant="global", scale=0.6),
    ip_adapter_plus=IPAdapterConfig(variant="plus", scale=0.6),
)
"""What the authors and diffusers' own examples use: where tuning on validation identities starts."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What methods are built of."""

    models: ModelPreset
    """Base, image encoder and InstantBooth's weights."""
    ip_adapter: Path
    """Folder with global/ and plus/, each with an ip_adapter.safetensors."""
    ip_adapter_image_encoder: str
    """The CLIP that these were trained with."""
    sampling: Sampling
    settings: Settings
    device: str
    personalizer: type[Personalizer] = Personalizer
    """InstantBooth itself, or a variant that ablations compare it with."""

    def load_base(self) -> BaseModel:
        """A base of the method's own, which it may change."""
        return BaseModel.load(self.models.base, device=device_of(self.device), dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method as tables show it, and how it is built."""

    title: str
    build: Callable[[Parts], Method[Any]]
    folders: Callable[[Parts], list[Path]] = lambda parts: [locate(parts.models.base)]
    """The models that its pictures depend on."""
    check: Callable[[Parts], None] = lambda parts: None
    """What can be wrong with them before any is loaded. Raises ParameterError and WeightsError."""
    any_class: bool = True
    """Whether it pictures subjects of any class, or those alone that InstantBooth's weights know."""
    reads_masks: bool = False
    """Whether it is given its subjects masked where masks are known."""


MASKED = "instantbooth-masked"


def _instantbooth(name: str, title: str) -> Entry:
    def build(parts: Parts) -> InstantBooth:
        models = parts.models
        booth = parts.personalizer.from_pretrained(
            locate(models.base), weights=models.weights, image_encoder=models.image_encoder, device=parts.device
        )
        return InstantBooth(booth, parts.sampling, parts.settings.of(name), masked=name == MASKED)

    def folders(parts: Parts) -> list[Path]:
        models = parts.models
        return [locate(each) for each in (models.base, models.weights, models.image_encoder) if each]

    def check(parts: Parts) -> None:
        if parts.models.weights is None:
            raise ParameterError(f"{name} needs trained weights; pass --weights, or leave it out by --methods")
        check_fit(parts.models)

    return Entry(title=title, build=build, folders=folders, check=check, any_class=False, reads_masks=name == MASKED)


def _ip_adapter(name: str, title: str) -> Entry:
    def folder(parts: Parts) -> Path:
        variant: str = parts.settings.of(name).variant
        return parts.ip_adapter / variant

    def build(parts: Parts) -> IPAdapter:
        image_encoder, file = locate(parts.ip_adapter_image_encoder), folder(parts) / weights.FILE
        return IPAdapter(parts.load_base(), image_encoder, file, parts.sampling, parts.settings.of(name))

    def folders(parts: Parts) -> list[Path]:
        return [locate(parts.models.base), folder(parts), locate(parts.ip_adapter_image_encoder)]

    def check(parts: Parts) -> None:
        file, image_encoder = folder(parts) / weights.FILE, locate(parts.ip_adapter_image_encoder)
        state, base = weights.load(file, parts.settings.of(name).variant), locate(parts.models.base)
        check_origin(file, base, image_encoder)
        weights.check_fits(unet_outline(base), state, file)
        weights.check_reads(image_encoder, state, file)

    return Entry(title=title, build=build, folders=folders, check=check, reads_masks=True)


METHODS: Mapping[str, Entry] = {
    "textual-inversion": Entry(
        title="Textual Inversion",
        build=lambda parts: TextualInversion(parts.load_base(), parts.sampling, parts.settings.textual_inversion),
    ),
    "dreambooth": Entry(
        title="DreamBooth",
        build=lambda parts: DreamBooth(parts.load_base(), parts.sampling, parts.settings.dreambooth),
    ),
    "dreambooth-lora": Entry(
        title="DreamBooth, LoRA",
        build=lambda parts: DreamBooth(parts.load_base(), parts.sampling, parts.settings.dreambooth_lora),
    ),
    "ip-adapter": _ip_adapter("ip-adapter", "IP-Adapter"),
    "ip-adapter-plus": _ip_adapter("ip-adapter-plus", "IP-Adapter Plus"),
    "instantbooth": _instantbooth("instantbooth", "InstantBooth"),
    MASKED: _instantbooth(MASKED, "InstantBooth + M"),
}
"""In the order of the paper's Table 1."""


def check_methods(names: tuple[str, ...], parts: Parts) -> None:
    """What can be wrong before any model is loaded: unknown names, and what the entries check.

    Raises ParameterError and WeightsError.
    """
    for name in names:
        if name not in METHODS:
            raise ParameterError(f"method {name!r} is unknown. {did_you_mean(name, METHODS)}")
        METHODS[name].check(parts)


def check_references(names: tuple[str, ...], cases: Sequence[Case]) -> None:
    """ParameterError where a method needs masks that are neither given nor found."""
    unmasked = [case.name for case in cases if any(reference.mask is None for reference in case.references)]
    if MASKED in names and unmasked:
        raise ParameterError(
            f"{MASKED} needs masks, and the pictures of {unmasked[0]} have none; pass --masks or --segmenter, or "
            "leave it out by --methods"
        )


def _changed(name: str, known: Any, given: Mapping[str, object]) -> Any:
    """One method's settings with the given values. ParameterError, by this name, for one of a wrong type or range."""
    _check_types(name, type(known), given)
    try:
        return replace(known, **given)
    except ParameterError as error:
        raise ParameterError(f"{name}: {error}") from error


def _check_types(name: str, config: type, given: Mapping[str, object]) -> None:
    """ParameterError for a value of another type than its field's; a whole number may stand for any number."""
    for field, wanted in get_type_hints(config).items():
        if field not in given:
            continue
        value = given[field]
        allowed = wanted | int if isinstance(0.0, wanted) else wanted
        if isinstance(value, bool) or not isinstance(value, allowed):
            word = getattr(wanted, "__name__", str(wanted))
            raise ParameterError(f"{name}: {field} must be {word}, is {value!r}; correct it")
