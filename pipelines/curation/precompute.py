"""What training would compute of every pair in every epoch, once: latents of the picture, embeddings of the caption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from instantbooth.images import decode_image
from instantbooth.ledger import digest_of
from instantbooth.model.base import BaseModel
from instantbooth.model.encoders import resize_to_tensor
from instantbooth.model.weights import folder_digest
from instantbooth.prompts import expand, tokenize_subject
from pipelines.curation.shards import Draft

COMPUTING = ("tokenizer", "text_encoder", "vae")
"""Parts of a base that shards are precomputed with."""


@dataclass(frozen=True, kw_only=True)
class Precomputed:
    """What decides the columns that are computed before: those of another base or word are of no use to a training."""

    base: str
    """Digest of the base's parts that compute."""
    placeholder: str
    """V̂."""

    @classmethod
    def by(cls, base: Path, placeholder: str) -> Precomputed:
        """What this folder's model makes, with this word for the subject."""
        return cls(base=digest_of(*(folder_digest(base / part) for part in COMPUTING)), placeholder=placeholder)


class Precomputer:
    """An actor with a frozen base: shards get a column `latents` and a column `prompt_embeds`, float16 bytes.

    Latents [C, H/f, W/f] are those of training: scaled means of the picture, resized to the base's square. Embeddings
    [T, W] are the text encoder's output for "V̂ noun" in the subject's place, before the concept is injected.
    """

    def __init__(self, base: str, *, placeholder: str, batch_size: int, device: str) -> None:
        """Loads a folder. BaseModelError where it is no Stable Diffusion 1.x."""
        self.base = BaseModel.load(base, device=torch.device(device), dtype=torch.float32)
        self.placeholder = placeholder
        self.batch_size = batch_size

    def __call__(self, item: dict[str, Draft]) -> dict[str, Draft]:
        draft = item["draft"]
        return {"draft": replace(draft, tables={split: self._extended(table) for split, table in draft.tables.items()})}

    def _extended(self, table: pa.Table) -> pa.Table:
        computed: dict[str, list[bytes]] = {"latents": [], "prompt_embeds": []}
        for batch in table.to_batches(max_chunksize=self.batch_size):
            for name, values in self._compute(batch.to_pylist()).items():
                computed[name] += [value.half().cpu().numpy().tobytes() for value in values]
        for name, column in computed.items():
            table = table.append_column(name, pa.array(column, pa.binary()))
        return table

    @torch.inference_mode()
    def _compute(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        pictures = [decode_image(row["image"], name=row["id"]).convert("RGB") for row in rows]
        pixels = torch.stack([resize_to_tensor(picture, self.base.image_size) for picture in pictures]) * 2 - 1
        prompts = [expand(row["caption"], row["noun"], self.placeholder) for row in rows]
        ids = [tokenize_subject(self.base.tokenizer, prompt, self.placeholder)[0] for prompt in prompts]
        return {
            "latents": self.base.encode_pixels(pixels),
            "prompt_embeds": self.base.encode_text(torch.tensor(ids)),
        }
