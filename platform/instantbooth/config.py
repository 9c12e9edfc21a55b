"""What weights say of themselves: the content of config.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from instantbooth.errors import WeightsError
from instantbooth.prompts import PLACEHOLDER_TOKEN

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What `generate` uses where the caller says nothing; chosen on validation identities, kept with the weights."""

    adapter_scale: float = 0.3
    """β: strength of the patch features. 1 in training, 0.3 at inference in the paper."""
    concept_scale: float = 0.4
    """α: factor on the concept embedding. 0.4 in the paper."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; at 1 or below there is none."""
    num_inference_steps: int = 25
    """Denoising steps."""
    sampler: str = "dpmsolver++"
    """One of instantbooth.parameters.SAMPLERS."""


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Shape and provenance of trained weights."""

    placeholder_token: str = PLACEHOLDER_TOKEN
    """The word V̂ whose embedding the concept replaces."""
    patch_layer: int = -1
    """Layer of the image encoder whose tokens are the patch features: −1 is the last, as in the paper."""
    global_width: int
    """Width of the image encoder's global feature."""
    patch_width: int
    """Width of the image encoder's tokens."""
    text_width: int
    """Width of the text encoder's output: that of concept_embedding and patch_features."""
    adapters: int
    """Number of gated adapters, one for each transformer block of the U-Net."""
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    """Sampling parameters that suit these weights."""
    format_version: int = FORMAT_VERSION
    """Raised when older code could no longer read the file."""

    def save(self, path: Path) -> None:
        """Writes config.json."""
        path.write_text(self.to_json())

    def to_json(self) -> str:
        """The content of config.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> WeightsConfig:
        """Reads config.json. WeightsError where it is missing, damaged or of a newer format."""
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            if values.get("format_version") != FORMAT_VERSION:
                raise WeightsError(
                    f"{path}: format_version is {values.get('format_version')!r}, this library reads {FORMAT_VERSION}; "
                    "install the matching library"
                )
            defaults = GenerationDefaults(**values.pop("defaults"))
            known = {each.name for each in fields(cls)}
            return cls(defaults=defaults, **{name: value for name, value in values.items() if name in known})
        except FileNotFoundError:
            raise WeightsError(
                f"{path} does not exist; name a folder with {path.name} and weights.safetensors"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise WeightsError(f"{path} is no weights' config.json ({error}); save the weights anew") from error
