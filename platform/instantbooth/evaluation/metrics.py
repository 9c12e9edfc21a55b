"""What is measured on generated pictures: obedience to the prompt, identity, and the paper's CLIP similarities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, CLIPModel, CLIPTokenizer

from instantbooth.errors import ParameterError, did_you_mean
from instantbooth.evaluation.judges import AttributeJudge


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the bounds between which it lies, 95 % sure."""

    mean: float
    low: float
    high: float


def prompt_accuracy(judge: AttributeJudge, images: Sequence[Image.Image], wanted: Sequence[Mapping[str, str]]) -> float:
    """Share of the attributes named by the prompts that the judge sees in the pictures.

    Raises ParameterError where nothing is wanted, and as `attributes_seen` does.
    """
    hits = [hit for row in attributes_seen(judge, images, wanted) for hit in row]
    if not hits:
        raise ParameterError("no prompt names an attribute, so there is nothing to judge; pass at least one")
    return float(np.mean(hits))


def attributes_seen(
    judge: AttributeJudge, images: Sequence[Image.Image], wanted: Sequence[Mapping[str, str]]
) -> list[list[bool]]:
    """For each picture, whether the judge sees each of the attributes wanted of it.

    `wanted` holds one mapping of attribute to value for each picture; an attribute left out is not judged.
    Raises ParameterError where counts differ, or the judge does not know an attribute or value.
    """
    if len(images) != len(wanted):
        raise ParameterError(f"there are {len(images)} images but {len(wanted)} sets of attributes; pass one for each")
    check_wanted(judge, wanted)
    seen = judge.predict(images)
    return [[saw[name] == value for name, value in row.items()] for saw, row in zip(seen, wanted, strict=True)]


def check_wanted(judge: AttributeJudge, wanted: Sequence[Mapping[str, str]]) -> None:
    """ParameterError where something is wanted that the judge does not know."""
    for name, value in {pair for row in wanted for pair in row.items()}:
        if value not in judge.attributes.get(name, ()):
            known = judge.attributes.get(name, judge.attributes)
            raise ParameterError(f"the judge knows no {name} {value!r}. {did_you_mean(value, known)}")


def identification_top1(generated_embeddings: Tensor, labels: Tensor, gallery_embeddings: Tensor) -> float:
    """Share of generated pictures whose nearest identity in the gallery is their own.

    `labels` [N] are rows of the gallery; for the rest see `nearest_identity`.
    """
    return float((nearest_identity(generated_embeddings, gallery_embeddings) == labels).float().mean())


def nearest_identity(generated_embeddings: Tensor, gallery_embeddings: Sequence[Tensor] | Tensor) -> Tensor:
    """Row of the gallery [N] that each generated picture [N, D] is nearest to.

    `gallery_embeddings` holds each identity's references [references, D]. Nearest is the highest cosine to the mean of
    an identity's (normalised) references.
    """
    means = [F.normalize(each.float(), dim=-1).mean(dim=0) for each in gallery_embeddings]
    centroids = F.normalize(torch.stack(means), dim=-1)
    return (F.normalize(generated_embeddings.float(), dim=-1) @ centroids.T).argmax(dim=1)


def text_alignment(
    clip: CLIPModel,
    processor: BaseImageProcessor,
    tokenizer: CLIPTokenizer,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
) -> Tensor:
    """Cosine [N] of CLIP's embeddings of each picture and its prompt (the paper's "alignment").

    Write prompts without the placeholder: CLIP does not know it. Raises ParameterError where counts differ.
    """
    if len(images) != len(prompts):
        raise ParameterError(f"there are {len(images)} images but {len(prompts)} prompts; pass one for each")
    return (embed_images(clip, processor, images) * embed_texts(clip, tokenizer, prompts)).sum(dim=-1)


def reconstruction(
    clip: CLIPModel, processor: BaseImageProcessor, images: Sequence[Image.Image], references: Sequence[Image.Image]
) -> Tensor:
    """Mean cosine [N] of CLIP's embeddings of each picture and all references of its subject (the paper's name)."""
    return (embed_images(clip, processor, images) @ embed_images(clip, processor, references).T).mean(dim=1)


@torch.no_grad()
def embed_images(
    clip: CLIPModel, processor: BaseImageProcessor, images: Sequence[Image.Image], *, batch_size: int = 64
) -> Tensor:
    """CLIP's projected image embeddings [N, D] of unit length, on the CPU."""
    embeddings = []
    for start in range(0, len(images), batch_size):
        pixels = processor(images=list(images[start : start + batch_size]), return_tensors="pt")["pixel_values"]
        pooled = clip.vision_model(pixel_values=pixels.to(clip.device)).pooler_output
        embeddings.append(clip.visual_projection(pooled).float().cpu())
    return F.normalize(torch.cat(embeddings), dim=-1)


@torch.no_grad()
def embed_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """CLIP's projected text embeddings [N, D] of unit length, on the CPU."""
    tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(clip.device)
    pooled = clip.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
    return F.normalize(clip.text_projection(pooled).float().cpu(), dim=-1)


def bootstrap_interval(values: npt.ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of `values` [N], one of each identity, with its 95 % bootstrap interval over identities.

    Pictures of one identity are not independent of each other: give their mean. Raises ParameterError for no values.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not numbers.size:
        raise ParameterError(f"values {numbers.shape} must be one row [N] and not empty; pass one for each identity")
    drawn = np.random.default_rng(seed).integers(len(numbers), size=(resamples, len(numbers)))
    low, high = np.quantile(numbers[drawn].mean(axis=1), [0.025, 0.975])
    return Interval(mean=float(numbers.mean()), low=float(low), high=float(high))
