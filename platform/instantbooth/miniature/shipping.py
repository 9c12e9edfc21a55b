"""Trained models in half the bytes, for others to use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from instantbooth.errors import ParameterError
from instantbooth.model.record import RECORD


def check_destination(folder: Path) -> None:
    """Raises ParameterError where shipping would replace anything but what was shipped earlier."""
    if folder.exists() and not (folder / RECORD).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ParameterError(f"{folder} holds something else than shipped models; name an empty or new folder")


def ship(models: Path, destination: Path) -> int:
    """Copies the models with their tensors in float16; returns the bytes shipped.

    What was shipped there earlier is replaced once all is copied. ParameterError where something else is there.
    """
    check_destination(destination)
    partial = destination.with_name(f"{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for path in sorted(file for file in models.rglob("*") if file.is_file()):
        target = partial / path.relative_to(models)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            halves = {name: t.half() if t.is_floating_point() else t for name, t in load_file(path).items()}
            save_file(halves, target, metadata={"format": "pt"})
        elif path.name == "config.json":
            # diffusers writes down where it read a model from: a path of the machine that trained it.
            settings = json.loads(path.read_text())
            settings.pop("_name_or_path", None)
            target.write_text(json.dumps(settings, indent=2) + "\n")
        else:
            shutil.copyfile(path, target)
    if destination.exists():
        shutil.rmtree(destination)
    partial.rename(destination)
    return sum(file.stat().st_size for file in destination.rglob("*") if file.is_file())
