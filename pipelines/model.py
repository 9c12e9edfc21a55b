"""Which model a pipeline works with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

from instantbooth import Personalizer
from instantbooth.model.base import anywhere, check_layout, local_folder
from instantbooth.model.loading import DTYPES, Precision
from instantbooth.model.subjects import SubjectEncoder
from instantbooth.model.weights import CONFIG_FILE, read_tensors, tensors_digest, trained_parts
from instantbooth.presets import tracking_uri, weights_folder
from instantbooth.tracking import absolute_tracking_uri, pinned
from pipelines.plan import ModelIdentity


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A base model and trained weights. Folders must be within reach of every worker.

    Pictures are known by the content of the weights, and by the names of the other parts: changed parts need new ones.
    """

    base: str = "miniature"
    """Preset, or folder of a Stable Diffusion model. A bulk job knows it by this name: a changed one needs another."""
    image_encoder: str | None = None
    """CLIP folder; the preset's, or the base folder's image_encoder/, if none is given. Known by this name, too."""
    segmenter: str | None = None
    """Folder of a segmentation model, for references without mask and alpha channel; the preset's if none is given.
    Known by this name, too."""
    weights: str | None = None
    """Weights folder, or a registered one such as models:/instantbooth@candidate; the preset's if none is given.
    Known by their content, the defaults in config.json included."""
    tracking_uri: str = field(default_factory=tracking_uri)
    """MLflow: the registry of models:/ URIs, and where trainings are tracked. By default MLFLOW_TRACKING_URI."""

    def absolute(self) -> ModelConfig:
        """The same from any working directory. What is no folder here is a preset's name, a hub's or a registry's."""
        named = {name: getattr(self, name) for name in ("base", "image_encoder", "segmenter", "weights")}
        placed = {name: anywhere(part) for name, part in named.items() if part}
        return replace(self, tracking_uri=absolute_tracking_uri(self.tracking_uri), **placed)

    def pinned(self) -> ModelConfig:
        """The same with the versions that aliases name now: who loads it later gets those. Raises WeightsError."""
        weights = self.weights and pinned(self.weights, self.tracking_uri)
        return replace(self, base=pinned(self.base, self.tracking_uri), weights=weights)

    def identity(self) -> ModelIdentity:
        """What of the model determines pictures, without loading it.

        Raises WeightsError or BaseModelError for a part that is not there.
        """
        parts, folder, config = trained_parts(self.base, self._weights(), self.image_encoder, self.segmenter)
        if (base := local_folder(parts.base)) is not None:
            check_layout(base)
        for part in (parts.image_encoder, parts.segmenter):
            if part is not None:
                local_folder(part)
        return ModelIdentity(
            base=self.base,
            image_encoder=self.image_encoder,
            segmenter=self.segmenter,
            weights=tensors_digest(read_tensors(folder)),
            config=sha256((folder / CONFIG_FILE).read_bytes()).hexdigest(),
            patch_layer=config.patch_layer,
        )

    def load(self, *, device: str, precision: Precision = "fp32") -> Personalizer:
        """The model on a device. Raises WeightsError or BaseModelError where a part is missing or does not fit."""
        return Personalizer.from_pretrained(self.base, weights=self._weights(), **self._placed(device, precision))

    def load_encoder(self, *, device: str, precision: Precision = "fp32") -> SubjectEncoder:
        """The part that encodes subjects, without the base model. Raises WeightsError."""
        return SubjectEncoder.from_pretrained(self.base, weights=self._weights(), **self._placed(device, precision))

    def untrained(self, *, device: str) -> Personalizer:
        """The base with closed gates, and encoders drawn from torch's generator: where training starts anew."""
        return Personalizer.untrained(self.base, image_encoder=self.image_encoder, device=device)

    def _placed(self, device: str, precision: Precision) -> dict[str, Any]:
        parts = {"image_encoder": self.image_encoder, "segmenter": self.segmenter}
        return {**parts, "device": device, "dtype": DTYPES[precision]}

    def _weights(self) -> str | None:
        """The weights in a local folder; None for the preset's own."""
        return self.weights and weights_folder(self.weights, self.tracking_uri)
