"""What an identity becomes, and how it enters the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from instantbooth.errors import ConceptError
from instantbooth.model.adapter import GatedAdapter, KeysValues, References

FORMAT = "instantbooth-concept-1"


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A subject, encoded once from N reference images: it serves any prompt."""

    concept_embedding: Tensor
    """f_c [1, W]: the mean over the images."""
    patch_features: Tensor
    """f_p [N · tokens, W]: the concatenation over the images."""
    class_noun: str
    """The noun prompts use for the subject."""
    encoder_digest: str
    """Which encoders made it; weights with others refuse it."""
    image_digests: tuple[str, ...]
    """SHA-256 of each reference image's pixels."""
    created: str
    """Time made, ISO 8601, UTC."""

    @classmethod
    def of(
        cls,
        concept_embeddings: Tensor,
        patch_features: Tensor,
        *,
        class_noun: str,
        encoder_digest: str,
        image_digests: Sequence[str],
    ) -> Concept:
        """From the encoders' output for each image: [N, W] and [N, tokens, W]."""
        return cls(
            concept_embedding=concept_embeddings.mean(dim=0, keepdim=True),
            patch_features=patch_features.flatten(0, 1),
            class_noun=class_noun,
            encoder_digest=encoder_digest,
            image_digests=tuple(image_digests),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @property
    def num_images(self) -> int:
        """N, the number of reference images."""
        return len(self.image_digests)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tensors, the noun and the encoders; not of the time made."""
        content = sha256(f"{FORMAT}|{self.class_noun}|{self.encoder_digest}".encode())
        for tensor in (self.concept_embedding, self.patch_features):
            content.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return content.hexdigest()

    def to_bytes(self) -> bytes:
        """A safetensors file whose metadata tells class noun, digests and time."""
        metadata = {
            "format": FORMAT,
            "class_noun": self.class_noun,
            "encoder_digest": self.encoder_digest,
            "image_digests": json.dumps(self.image_digests),
            "created": self.created,
        }
        tensors = {
            "concept_embedding": self.concept_embedding.detach().cpu().contiguous(),
            "patch_features": self.patch_features.detach().cpu().contiguous(),
        }
        return save(tensors, metadata=metadata)

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "the concept") -> Concept:
        """What `to_bytes` gave. ConceptError, with `name`, where the bytes are damaged or no concept."""
        try:
            metadata, tensors = _metadata(data), load(data)
            if metadata.get("format") != FORMAT:
                raise ConceptError(f"{name} holds no concept; name a file written by Concept.save")
            embedding, features = tensors["concept_embedding"], tensors["patch_features"]
            if features.ndim != 2 or embedding.shape != (1, features.shape[1]):
                raise ValueError(f"an embedding {list(embedding.shape)} with features {list(features.shape)}")
            return cls(
                concept_embedding=embedding,
                patch_features=features,
                class_noun=metadata["class_noun"],
                encoder_digest=metadata["encoder_digest"],
                image_digests=tuple(json.loads(metadata["image_digests"])),
                created=metadata["created"],
            )
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConceptError(f"{name} cannot be read as a concept ({error}); encode the subject again") from error

    def save(self, path: str | Path) -> None:
        """Writes what `to_bytes` gives, in one step: a reader never sees a part of it. ConceptError where it cannot."""
        try:
            target = Path(path)
            partial = target.with_name(f"{target.name}.partial")
            try:
                partial.write_bytes(self.to_bytes())
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)
        except (OSError, TypeError, ValueError) as error:
            raise ConceptError(
                f"the concept cannot be saved as {path!r} ({error}); name a file in a folder that exists"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Concept:
        """Reads what `save` wrote. ConceptError where the file is missing, damaged or no concept."""
        try:
            data = Path(path).read_bytes()
        except (OSError, TypeError) as error:
            raise ConceptError(f"{path} cannot be read as a concept ({error}); encode the subject again") from error
        return cls.from_bytes(data, name=str(path))


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata in a safetensors file's header: 8 bytes of its length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return found


def inject(prompt_embeds: Tensor, positions: Tensor, concept_embeddings: Tensor) -> Tensor:
    """Replaces the text encoder's output at V̂ by the concept embedding (section 3.2 of the paper).

    prompt_embeds [B, T, W], positions [B], concept_embeddings [B, W] → [B, T, W].
    """
    here = torch.arange(prompt_embeds.shape[1], device=prompt_embeds.device) == positions[:, None]
    return torch.where(here[..., None], concept_embeddings[:, None].to(prompt_embeds.dtype), prompt_embeds)


@torch.no_grad()
def concept_keys_values(adapters: nn.ModuleDict, concept: Concept) -> dict[str, KeysValues]:
    """The concept's keys and values in every adapter, each [1, heads, tokens, head width]: once for each concept."""
    result = {}
    for layer, adapter in adapters.items():
        assert isinstance(adapter, GatedAdapter)
        weight = adapter.project.weight
        result[layer] = adapter.keys_values(concept.patch_features[None].to(weight.device, weight.dtype))
    return result


def reference_tokens(concept: Mapping[str, KeysValues]) -> int:
    """How many tokens the concept's reference images have together."""
    keys, _ = next(iter(concept.values()))
    return keys.shape[2]


def batch_references(
    concepts: Sequence[Mapping[str, KeysValues]], scales: Tensor, *, tokens: int | None = None
) -> References:
    """One row for each concept, of different numbers of images: shorter ones are padded and masked.

    With `tokens` they are padded to that many, unless there are longer ones, and always masked, so that batches of one
    shape are computed alike; without, to the longest, and masked only where others are shorter.
    """
    lengths = [reference_tokens(each) for each in concepts]
    longest = max(tokens or 0, *lengths)

    def stack(layer: str, part: int) -> Tensor:
        parts = [each[layer][part] for each in concepts]
        return torch.cat([F.pad(tokens, (0, 0, 0, longest - tokens.shape[2])) for tokens in parts])

    mask = None
    if tokens is not None or min(lengths) < longest:
        mask = torch.arange(longest, device=scales.device) < torch.tensor(lengths, device=scales.device)[:, None]
    keys_values = {layer: (stack(layer, 0), stack(layer, 1)) for layer in concepts[0]}
    return References(scale=scales.view(-1, 1, 1), keys_values=keys_values, mask=mask)
