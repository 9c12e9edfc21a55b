"""A byte-pair tokenizer of CLIP's kind, learned from the miniature world's captions."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import CLIPTokenizer

MAX_LENGTH = 64
"""Tokens of a prompt, start and end included; the longest caption with a description takes about 50."""


def learn_tokenizer(captions: Iterable[str], *, placeholder: str, size: int = 2000) -> CLIPTokenizer:
    """A CLIPTokenizer in which every word of the captions, and the placeholder, is one token."""
    words = sorted({word for caption in captions for word in caption.replace(",", " ").split()} | {placeholder})
    tokenizer = CLIPTokenizer().train_new_from_iterator([[f"{word} ," for word in words]], vocab_size=size)
    tokenizer.model_max_length = MAX_LENGTH
    return tokenizer
