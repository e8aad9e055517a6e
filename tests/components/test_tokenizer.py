"""`components.tokenizer`: CLIP's tokens, whole and reduced."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.components.tokenizer import BYTE_TOKENS, CLIP_VOCABULARY, Tokenizer
from paris_p2p.errors import ConfigError

CAPTIONS = ["a handwritten digit seven", "a handwritten digit two", "red circle"]


def test_the_full_vocabulary_is_clips_own() -> None:
    texts = [*CAPTIONS, "", "An ÜNUSUAL cat 🐱's &amp; dog's 42 toys", "word " * 40]
    assert torch.equal(Tokenizer(16)(texts), open_clip.tokenize(texts, 16))


def test_a_reduced_vocabulary_holds_the_captions_tokens_the_bytes_and_the_two_special_ones() -> None:
    tokenizer = Tokenizer.reduced(CAPTIONS, 16)
    words = {"a", "handwritten", "digit", "seven", "two", "red", "circle"}
    assert BYTE_TOKENS + 2 < tokenizer.vocab_size <= BYTE_TOKENS + 2 + len(words)
    assert [len(tokenizer.tokens(text)) for text in CAPTIONS] == [4, 4, 2]


def test_a_reduced_vocabulary_pads_with_zero_and_ends_with_its_highest_id() -> None:
    tokenizer = Tokenizer.reduced(CAPTIONS, 8)
    (ids,) = tokenizer(["red circle"]).tolist()
    assert ids[0] == tokenizer.vocab_size - 2 and ids[3] == tokenizer.vocab_size - 1 == max(ids)
    assert ids[4:] == [0, 0, 0, 0]


def test_unknown_words_are_spelled_by_kept_parts_down_to_bytes() -> None:
    tokenizer = Tokenizer.reduced(CAPTIONS, 77)
    tokens = tokenizer.tokens("seventeen zèbres 🐱")
    decode = open_clip.tokenizer._tokenizer.decode
    assert decode(tokens) == "seventeen zèbres 🐱 "
    kept = set(tokenizer.kept or ())
    assert all(token < BYTE_TOKENS or token in kept for token in tokens)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.text(max_size=60))
def test_any_text_can_be_encoded(text: str) -> None:
    tokenizer = Tokenizer.reduced(CAPTIONS, 16)
    ids = tokenizer([text])
    assert ids.shape == (1, 16) and 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size


def test_a_tokenizer_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    for tokenizer in (Tokenizer.reduced(CAPTIONS, 16), Tokenizer(77)):
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        loaded = Tokenizer.from_pretrained(tmp_path / "tokenizer")
        assert loaded.vocab_size == tokenizer.vocab_size
        assert torch.equal(loaded(["a red dog"]), tokenizer(["a red dog"]))


@pytest.mark.parametrize(
    "config",
    [
        [],
        {},
        {"context_length": "16", "kept_tokens": None},
        {"context_length": 16, "kept_tokens": [600, "x"]},
        {"context_length": 16, "kept_tokens": [5]},
        {"context_length": 16, "kept_tokens": [CLIP_VOCABULARY]},
        {"context_length": 10**9, "kept_tokens": None},
    ],
)
def test_a_malformed_tokenizer_file_is_refused(tmp_path: Path, config: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError):
        Tokenizer.from_pretrained(tmp_path)


def test_a_missing_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        Tokenizer.from_pretrained(tmp_path)
