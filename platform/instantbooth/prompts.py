"""Prompts: the class nouns, the placeholder token V̂, and where it stands among a prompt's tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from instantbooth.errors import ParameterError, PromptError, did_you_mean

PLACEHOLDER_TOKEN = "sks"
"""The rare word that marks the subject, as in the paper."""
SUBJECT_FIELD = "{subject}"
MAX_PROMPT_CHARS = 1000
"""Far more than the 77 tokens that CLIP reads, and little enough to be carried inside any picture."""

CLASS_NOUNS: Mapping[str, tuple[str, ...]] = {
    "person": (
        "person",
        "man",
        "woman",
        "boy",
        "girl",
        "lady",
        "guy",
        "baby",
        "child",
        "kid",
        "gentleman",
        "teenager",
    ),
    "cat": ("cat", "kitten", "kitty"),
}
"""Class → the nouns by which captions and users name it."""


class Tokenizer(Protocol):
    """The part of transformers' CLIPTokenizer that prompts need."""

    model_max_length: int
    eos_token_id: int

    def __call__(
        self, text: str, *, add_special_tokens: bool = ..., verbose: bool = ...
    ) -> Mapping[str, list[int]]: ...


def class_of(noun: str) -> str:
    """The class a noun belongs to. ParameterError for a noun of no class.

    >>> class_of("kitten")
    'cat'
    """
    for name, nouns in CLASS_NOUNS.items():
        if noun in nouns:
            return name
    known = [each for nouns in CLASS_NOUNS.values() for each in nouns]
    raise ParameterError(f"class_noun {noun!r} is unknown. {did_you_mean(str(noun), known)}")


def insert_field(caption: str, noun: str) -> str:
    """Replaces the first whole-word `noun` of a caption by "{subject}". PromptError where it does not occur."""
    text, found = re.subn(rf"\b{re.escape(noun)}\b", SUBJECT_FIELD, caption, count=1)
    if not found:
        raise PromptError(f"caption {caption!r} does not name the subject {noun!r}; name it")
    return text


def expand(prompt: object, noun: str, placeholder: str = PLACEHOLDER_TOKEN) -> str:
    """Writes "V̂ noun" for "{subject}", the form the paper prompts with.

    >>> expand("a photo of a {subject} playing guitar", "person")
    'a photo of a sks person playing guitar'

    Raises PromptError unless "{subject}" stands in the prompt once, as a word, and the placeholder nowhere else.
    """
    if not isinstance(prompt, str):
        raise PromptError(f"prompt is {type(prompt).__name__}, not text; write for example 'a photo of a {{subject}}'")
    count = prompt.count(SUBJECT_FIELD)
    if count != 1:
        rule = "names no subject" if count == 0 else f"names the subject {count} times"
        raise PromptError(f"prompt {prompt!r} {rule}; write {SUBJECT_FIELD} exactly once, where the subject belongs")
    if re.search(r"[^\W_]\{subject}|\{subject}[^\W_]", prompt):
        raise PromptError(f"prompt {prompt!r} has {SUBJECT_FIELD} within a word; put a space between them")
    if _word_starts(prompt, placeholder):
        raise PromptError(f"prompt {prompt!r} holds the placeholder token {placeholder!r} itself; remove that word")
    return prompt.replace(SUBJECT_FIELD, f"{placeholder} {noun}")


def placeholder_tokens(tokenizer: Tokenizer, placeholder: str) -> list[int]:
    """Token ids of the placeholder: one in a vocabulary that knows the word, several in one that does not."""
    return list(tokenizer(placeholder, add_special_tokens=False)["input_ids"])


def tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a prompt without a subject, cut and padded to the model's length, as Stable Diffusion does."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return _fit(ids[: tokenizer.model_max_length - 1], tokenizer)


def tokenize_subject(tokenizer: Tokenizer, text: str, placeholder: str = PLACEHOLDER_TOKEN) -> tuple[list[int], int]:
    """Padded token ids of an expanded prompt, and the position of V̂ (of its last token, if it takes several).

    Raises PromptError where the placeholder is missing, doubled, torn apart, or lies beyond the model's length.
    """
    starts = _word_starts(text, placeholder)
    if len(starts) != 1:
        rule = "does not hold" if not starts else f"holds {len(starts)} times"
        raise PromptError(f"prompt {text!r} {rule} the placeholder token {placeholder!r}; write it exactly once")
    wanted = placeholder_tokens(tokenizer, placeholder)
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    # No token reaches over the end of a word, so the words before it have the same tokens without it.
    start = len(tokenizer(text[: starts[0]], verbose=False)["input_ids"]) - 1
    if ids[start : start + len(wanted)] != wanted:
        raise PromptError(
            f"prompt {text!r} has the placeholder token {placeholder!r} glued to a sign before or behind it; "
            "put a space between them"
        )
    position = start + len(wanted) - 1
    limit = tokenizer.model_max_length
    if position >= limit - 1:
        raise PromptError(
            f"prompt {text!r} has its subject at token {position}, but the text encoder reads {limit - 1}; "
            "name the subject earlier or shorten the prompt"
        )
    return _fit(ids[: limit - 1], tokenizer), position


def _word_starts(text: str, word: str) -> list[int]:
    """Where `word` stands in a text as a word of CLIP's tokenizer, to which digits and signs are others."""
    letter = r"[^\W\d_]"
    pattern = rf"(?<!{letter}){re.escape(word)}(?!{letter})"
    return [found.start() for found in re.finditer(pattern, text, re.IGNORECASE)]


def _fit(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    closed = [*ids] if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
    pad = getattr(tokenizer, "pad_token_id", None)
    filler = tokenizer.eos_token_id if pad is None else int(pad)
    return closed + [filler] * (tokenizer.model_max_length - len(closed))
