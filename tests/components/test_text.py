"""`components.text`: the text encoder and its folder."""

from pathlib import Path

import pytest
import torch

from paris_p2p.components.text import TextEncoder
from paris_p2p.components.tokenizer import Tokenizer

TEXTS = ["a red circle", "a blue square", ""]


def small_encoder(tokenizer: Tokenizer) -> TextEncoder:
    torch.manual_seed(0)
    encoder: TextEncoder = TextEncoder(
        tokenizer.vocab_size, tokenizer.context_length, width=32, heads=2, layers=2
    )
    encoder.eval()
    return encoder


def test_encodings_have_one_row_a_token_and_differ_between_captions() -> None:
    tokenizer = Tokenizer.reduced(TEXTS, 8)
    encodings = small_encoder(tokenizer)(tokenizer(TEXTS))
    assert encodings.shape == (3, 8, 32)
    assert not torch.allclose(encodings[0], encodings[1])


def test_the_pooled_state_is_the_one_at_the_end_of_the_text() -> None:
    tokenizer = Tokenizer.reduced(TEXTS, 8)
    pooled, tokens = small_encoder(tokenizer).encode(tokenizer(TEXTS))
    assert torch.equal(pooled[0], tokens[0, 4])  # start, a, red, circle, end
    assert torch.equal(pooled[2], tokens[2, 1])


def test_an_encoder_saved_and_loaded_encodes_the_same(tmp_path: Path) -> None:
    tokenizer = Tokenizer.reduced(TEXTS, 8)
    encoder = small_encoder(tokenizer)
    encoder.save_pretrained(tmp_path)
    loaded = TextEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokenizer(TEXTS)), encoder(tokenizer(TEXTS)))
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


def test_weights_that_are_a_pickle_are_not_loaded(tmp_path: Path) -> None:
    small_encoder(Tokenizer.reduced(TEXTS, 8)).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "diffusion_pytorch_model.bin").exists()
    with pytest.raises(OSError, match="safetensors"):
        TextEncoder.from_pretrained(tmp_path)


def test_batches_change_nothing_but_rounding() -> None:
    tokenizer = Tokenizer.reduced(TEXTS, 8)
    encoder, ids = small_encoder(tokenizer), tokenizer(TEXTS * 3)
    torch.testing.assert_close(encoder.encode_in_batches(ids, 2), encoder(ids).detach())


@pytest.mark.parametrize(
    "sizes", [{"width": 30, "heads": 4}, {"layers": 10**6}, {"vocab_size": 1 << 40}, {"context_length": 0}]
)
def test_sizes_out_of_range_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        TextEncoder(**{"vocab_size": 600, "context_length": 8, "width": 32, "heads": 2, "layers": 1, **sizes})
