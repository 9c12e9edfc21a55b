"""Where V̂ stands, and which prompts are refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from instantbooth.errors import ParameterError, PromptError
from instantbooth.presets import miniature_folder
from instantbooth.prompts import class_of, expand, insert_field, placeholder_tokens, tokenize, tokenize_subject


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(tiny / "base" / "tokenizer")


@pytest.mark.parametrize("before", ["", "a photo of a ", "a photo of a xylophone and a "])
@pytest.mark.parametrize("placeholder", ["sks", "zwx"])
def test_the_position_is_that_of_the_placeholders_last_token(
    tokenizer: CLIPTokenizer, before: str, placeholder: str
) -> None:
    text = expand(before + "{subject} at the beach", "person", placeholder)
    ids, position = tokenize_subject(tokenizer, text, placeholder)
    pieces = placeholder_tokens(tokenizer, placeholder)
    assert ids[position - len(pieces) + 1 : position + 1] == pieces
    assert position == len(tokenizer(before, add_special_tokens=False)["input_ids"]) + len(pieces)
    assert len(ids) == tokenizer.model_max_length


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("a photo of a person", "names no subject"),
        ("{subject} and {subject}", "names the subject 2 times"),
        ("a sks {subject}", "placeholder token 'sks' itself"),
        ("SKS2 {subject}", "placeholder token 'sks' itself"),
        ("a my_sks {subject}", "placeholder token 'sks' itself"),
        ("a super{subject}", "within a word; put a space"),
        ("4{subject}", "within a word; put a space"),
        ("two {subject}s", "within a word; put a space"),
        (7, "is int, not text"),
    ],
)
def test_a_prompt_without_one_subject_is_refused(prompt: object, fault: str) -> None:
    with pytest.raises(PromptError, match=fault):
        expand(prompt, "person")


WORDS = ["a", "photo", "of", "desks", "sksy", "super", "2", "_", "...", "it's", "“", "张", "ü", "<|endoftext|>"]


@given(before=st.lists(st.sampled_from(WORDS), max_size=3), behind=st.lists(st.sampled_from(WORDS), max_size=6))
def test_no_other_word_is_taken_for_the_placeholder(
    tokenizer: CLIPTokenizer, before: list[str], behind: list[str]
) -> None:
    def tokens(words: list[str]) -> list[int]:
        return [token for word in words for token in tokenizer(word, add_special_tokens=False)["input_ids"]]

    words = [*before, "{subject}", *behind]
    _, position = tokenize_subject(tokenizer, expand(" ".join(words), "person"))
    assert position == len(tokens(["<|startoftext|>", *before]))


def test_words_that_end_like_the_placeholder_are_no_second_one() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(miniature_folder() / "base/tokenizer")
    placeholder = placeholder_tokens(tokenizer, "sks")
    ids, position = tokenize_subject(tokenizer, expand("desks, a {subject} and disks", "person"))
    assert [ids[at : at + 1] for at in (2, position, position + 4)] == [placeholder] * 3, "as tokens they are the same"
    assert position == 5


def test_a_sign_that_takes_letters_of_the_placeholder_is_refused(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(PromptError, match="glued to a sign"):
        tokenize_subject(tokenizer, expand("a photo of '{subject}'", "person"))


def test_a_subject_beyond_the_text_encoders_reach_is_refused(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(PromptError, match="name the subject earlier"):
        tokenize_subject(tokenizer, expand("a photo of " * 12 + "{subject}", "person"))


def test_the_last_token_that_the_text_encoder_reads_may_be_the_subject(tokenizer: CLIPTokenizer) -> None:
    before = len(tokenizer("", add_special_tokens=True)["input_ids"]) - 1
    room = tokenizer.model_max_length - 2 - before
    ids, position = tokenize_subject(tokenizer, expand("a " * room + "{subject}", "person"))
    assert position == tokenizer.model_max_length - 2
    assert len(ids) == tokenizer.model_max_length
    with pytest.raises(PromptError, match="name the subject earlier"):
        tokenize_subject(tokenizer, expand("a " * (room + 1) + "{subject}", "person"))


@given(words=st.lists(st.sampled_from(["a", "photo", "of", "beach", "cat", "wearing", "the", "ü"]), max_size=40))
def test_padding_equals_the_tokenizers_own(tokenizer: CLIPTokenizer, words: list[str]) -> None:
    text = " ".join(words)
    expected = tokenizer(text, padding="max_length", truncation=True, max_length=24)["input_ids"]
    assert tokenize(tokenizer, text) == expected


def test_nouns_are_found_as_whole_words() -> None:
    assert insert_field("a photo of a man with a mandolin", "man") == "a photo of a {subject} with a mandolin"
    with pytest.raises(PromptError, match="does not name the subject"):
        insert_field("a mandolin", "man")


def test_an_unknown_noun_gets_a_suggestion() -> None:
    with pytest.raises(ParameterError, match="Did you mean 'kitten'"):
        class_of("kittn")
