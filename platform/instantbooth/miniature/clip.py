"""The miniature's CLIP: image and text encoders trained on scenes and on what tells identities apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from instantbooth.miniature.corpus import Corpus
from instantbooth.miniature.crops import on_black, subject_crops, to_unit
from instantbooth.miniature.vocabulary import MAX_LENGTH
from instantbooth.miniature.world import SIZE
from instantbooth.training.attention import write_out_attention
from instantbooth.training.loop import LoopConfig, train

TRAINING = LoopConfig(
    steps=2200, learning_rate=1e-3, warmup_steps=100, decay_steps=900, weight_decay=0.05, ema_decay=0.995, batch_size=96
)
MAX_LOGIT_SCALE = math.log(100)
CROPS_TEMPERATURE = 0.05
"""Of the loss between two crops of a subject: low, so that subjects that look alike count most."""
DETAIL_PROBABILITY = 0.5
"""How often a scene's caption also describes the identity."""


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP of 2.0 M parameters: 64 px in 8 px patches (65 tokens of 160), texts of up to 64 tokens."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "projection_dim": 128,
    }
    vision = {
        "image_size": SIZE,
        "patch_size": 8,
        "hidden_size": 160,
        "intermediate_size": 480,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "projection_dim": 128,
    }
    return CLIPModel(CLIPConfig(text_config=text | ids, vision_config=vision, projection_dim=128))


def new_image_processor() -> CLIPImageProcessorPil:
    """Resize and centre crop to 64 px, CLIP's mean and deviation: what training used, to be saved beside the model."""
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def train_clip(
    corpus: Corpus, tokenizer: CLIPTokenizer, config: LoopConfig, *, folder: Path, device: torch.device
) -> CLIPModel:
    """Contrastive training; a third of each batch are full scenes, the rest are masked crops told by identity details.

    The crops make the image features hold details that words name (round glasses, purple hair), which is what the
    concept and patch encoders read from them. What no word tells, two random crops of one subject teach: each is to
    be nearest to the other (SLIP, arXiv 2112.12750; here in CLIP's own embedding, without a head of its own).
    """
    model = new_clip(tokenizer).to(device)
    write_out_attention(model)
    images, masks = torch.from_numpy(corpus.images), torch.from_numpy(corpus.masks)

    def draw(examples: int, generator: Generator) -> tuple[Tensor, list[str]]:
        rows = torch.randint(len(corpus), (examples,), generator=generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        scenes, subjects = rows[: examples // 3], rows[examples // 3 :]
        alone = on_black(images[subjects], masks[subjects])
        crops = [subject_crops(alone, masks[subjects], generator) for _ in range(2)]
        pixels = torch.cat([to_unit(images[scenes]), *crops])
        captions = [scene_caption(corpus, int(row), rng) for row in scenes]
        captions += [detail_caption(corpus, int(row), rng) for row in subjects]
        return pixels, captions

    def loss(batch: tuple[Tensor, list[str]]) -> Tensor:
        image_embeds, text_embeds = _embed(model, tokenizer, *batch)
        told, again = image_embeds.split([len(text_embeds), len(image_embeds) - len(text_embeds)])
        scale = model.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        return contrast(scale * told @ text_embeds.T) + contrast(told[-len(again) :] @ again.T / CROPS_TEMPERATURE)

    train("clip", model, draw, loss, config, folder=folder, device=device)
    model.set_attn_implementation("sdpa")
    return model


def contrast(logits: Tensor) -> Tensor:
    """CLIP's loss of the similarities [N, N] of N pairs: each is to be the largest of its row and of its column."""
    matches = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, matches) + F.cross_entropy(logits.T, matches)) / 2


def scene_caption(corpus: Corpus, row: int, rng: np.random.Generator) -> str:
    """The picture's caption, half of the time with some of the identity's details after the noun."""
    caption, noun = corpus.captions[row], corpus.nouns[row]
    if rng.random() >= DETAIL_PROBABILITY:
        return caption
    return caption.replace(f"of a {noun}", f"of a {noun} with {_some_details(corpus, row, rng)}", 1)


def detail_caption(corpus: Corpus, row: int, rng: np.random.Generator) -> str:
    """A caption that tells nothing but some of the identity's details."""
    return f"a photo of a {corpus.nouns[row]} with {_some_details(corpus, row, rng)}"


def _some_details(corpus: Corpus, row: int, rng: np.random.Generator) -> str:
    phrases = corpus.descriptions[row].split(", ")
    chosen = rng.permutation(len(phrases))[: rng.integers(1, len(phrases) + 1)]
    return ", ".join(phrases[k] for k in chosen)


def _embed(model: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Normalised embeddings of pictures [N, 3, 64, 64] in 0 … 1, [N, 128], and of M texts, [M, 128]."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    output = model(
        input_ids=tokens["input_ids"].to(model.device),
        attention_mask=tokens["attention_mask"].to(model.device),
        pixel_values=((pixels - mean) / std).to(model.device),
    )
    return output.image_embeds, output.text_embeds


@torch.no_grad()
def retrieval_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, corpus: Corpus, *, choices: int = 64) -> float:
    """Share of pictures whose own caption is the nearest among `choices` captions.

    Rows beyond a multiple of `choices` are left out; several pictures with one caption count as right for each other's.
    """
    right: list[bool] = []
    for start in range(0, len(corpus) - choices + 1, choices):
        rows = slice(start, start + choices)
        captions = corpus.captions[rows]
        image_embeds, text_embeds = _embed(model, tokenizer, to_unit(torch.from_numpy(corpus.images[rows])), captions)
        nearest = (image_embeds @ text_embeds.T).argmax(dim=1).tolist()
        right += [captions[guess] == caption for guess, caption in zip(nearest, captions, strict=True)]
    return sum(right) / len(right)
