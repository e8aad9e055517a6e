"""`components.pretrained`: parts by name or folder, from safetensors only."""

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from paris_p2p.components.pretrained import digest, load_text, load_vae
from paris_p2p.components.text import TextEncoder
from paris_p2p.components.tokenizer import Tokenizer
from paris_p2p.errors import ConfigError

VaeFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def text_folder(folder: Path) -> Path:
    tokenizer = Tokenizer.reduced(["a red square"], 8)
    TextEncoder(tokenizer.vocab_size, 8, 8, 2, 1).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def test_latents_are_the_posteriors_mean_shifted_and_scaled(vae_folder: VaeFolder) -> None:
    folder = vae_folder(scaling_factor=0.5, shift_factor=0.25)
    vae = load_vae(str(folder))
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    latents = vae.latents(images)
    assert latents.shape == (9, 4, 4, 4) and latents.dtype == np.float32
    network = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        expected = (network.encode(pixels).latent_dist.mean - 0.25) * 0.5
    torch.testing.assert_close(torch.from_numpy(latents), expected, atol=1e-5, rtol=1e-5)
    assert (vae.channels, vae.factor, vae.scale, vae.shift) == (4, 2, 0.5, 0.25)


def test_a_saved_vae_is_the_same_and_says_nothing_of_where_it_lay(
    vae_folder: VaeFolder, tmp_path: Path
) -> None:
    folder = vae_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/me/secret"}))
    load_vae(str(folder)).save(tmp_path / "run")
    assert "secret" not in (tmp_path / "run" / "vae" / "config.json").read_text()
    assert digest(load_vae(str(tmp_path / "run")).network) == digest(load_vae(str(folder)).network)


def test_a_folder_of_something_else_and_a_pickle_are_refused(vae_folder: VaeFolder) -> None:
    folder = vae_folder()
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match="only safetensors are read"):
        load_vae(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no AutoencoderKL"):
        load_vae(str(folder))


def test_a_damaged_vae_is_said(vae_folder: VaeFolder) -> None:
    folder = vae_folder()
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="cannot be read as an AutoencoderKL"):
        load_vae(str(folder))


@pytest.mark.parametrize("name", ["nowhere", "stabilityai/sd-vae-ft-mse"])
def test_a_name_that_cannot_be_had_says_what_to_give(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*--vae takes a local folder, or the name OWNER/NAME"):
        load_vae(name)


def test_a_text_encoder_comes_with_the_tokenizer_beside_it(tmp_path: Path) -> None:
    text = load_text(str(text_folder(tmp_path)))
    assert text.shape == (8, 8) and text.tokenizer.vocab_size == text.encoder.config.vocab_size
    encoded = text.encode(["", "a red square"])
    assert encoded.shape == (2, 8, 8)
    text.save(tmp_path / "run")
    assert np.array_equal(load_text(str(tmp_path / "run")).encode(["", "a red square"]), encoded)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = text_folder(tmp_path)
    Tokenizer(8).save_pretrained(folder / "tokenizer")
    with pytest.raises(ConfigError, match="do not belong together"):
        load_text(str(folder))


def test_two_networks_with_one_digest_have_the_same_tensors() -> None:
    one, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    assert digest(one) != digest(other)
    other.load_state_dict(one.state_dict())
    assert digest(one) == digest(other)
