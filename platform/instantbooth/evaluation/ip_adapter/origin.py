"""Which models an IP-Adapter was trained for, as the record beside its weights says."""

from __future__ import annotations

import json
from pathlib import Path

from instantbooth.errors import WeightsError
from instantbooth.model.record import RECORD
from instantbooth.model.weights import folder_digest

MODELS = "models"


def trained_for(base: Path, image_encoder: Path) -> dict[str, str]:
    """Digests of the parts that an adapter depends on: a VAE whose decoder is trained further is no other base."""
    parts = {"tokenizer": base / "tokenizer", "text_encoder": base / "text_encoder", "unet": base / "unet"}
    return {name: folder_digest(folder) for name, folder in (parts | {"image_encoder": image_encoder}).items()}


def check_origin(file: Path, base: Path, image_encoder: Path) -> None:
    """WeightsError where the record beside `file` names other models.

    Weights without a record, such as their authors', are of unknown origin: shapes are all that can be checked.
    """
    record = file.with_name(RECORD)
    if not record.exists():
        return
    try:
        found = dict(json.loads(record.read_text())[MODELS])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{record} does not say which models {file.name} was trained for ({error!r}); train it anew, or remove the "
            "record where you know"
        ) from error
    for name, digest in trained_for(base, image_encoder).items():
        if found.get(name) != digest:
            folder = image_encoder if name == "image_encoder" else base / name
            raise WeightsError(
                f"{file} was trained for another {name} ({str(found.get(name))[:12]}) than {folder} ({digest[:12]}); "
                "train one for these models by python -m jobs.train_ip_adapter, or name its folder by --ip-adapter"
            )
