"""The record beside trained models: what made them. Where it is, they are whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD = "RECORD.json"


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes the record whole, or leaves the one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{RECORD}.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.rename(folder / RECORD)
