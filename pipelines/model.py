"""Which model a pipeline works with."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from instantbooth import Personalizer
from instantbooth.tracking import resolve_weights


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A base model and trained weights. Folders must be within reach of every worker."""

    base: str = "miniature"
    """Preset, or folder of a Stable Diffusion model."""
    image_encoder: str | None = None
    """CLIP folder; the preset's, or the base folder's image_encoder/, if none is given."""
    weights: str | None = None
    """Weights folder, or a registered one such as models:/instantbooth@candidate; the preset's if none is given."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """MLflow: the registry of models:/ URIs, and where trainings are tracked."""

    def load(self, *, device: str) -> Personalizer:
        """The model on a device. Raises WeightsError or BaseModelError where a part is missing or does not fit."""
        with tempfile.TemporaryDirectory() as folder:
            weights = resolve_weights(self.weights, self.tracking_uri, Path(folder)) if self.weights else None
            return Personalizer.from_pretrained(
                self.base, image_encoder=self.image_encoder, weights=weights, device=device
            )
