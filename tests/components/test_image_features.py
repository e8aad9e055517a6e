"""`components.image_features`: image encoders of timm and open_clip, by name or folder."""

import json
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from paris_p2p.components.image import ImageEncoder
from paris_p2p.components.image_features import DINO_V2, load_image_features
from paris_p2p.errors import ConfigError

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def timm_folder(folder: Path, side: int) -> tuple[Path, torch.nn.Module]:
    """A small vision transformer of timm, for pictures of `side` pixels."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0, img_size=side)
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, side, side], "fixed_input_size": True, "mean": [0.5] * 3, "std": [0.25] * 3}
    described = {"architecture": "test_vit", "model_args": {"img_size": side}, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(described))
    return folder, network.eval()


def test_a_timm_folder_gives_its_networks_features(tmp_path: Path) -> None:
    folder, network = timm_folder(tmp_path / "vit", 16 * 2)
    features = load_image_features(str(folder))
    assert features.side == 32
    small = np.kron(IMAGES, np.ones((1, 2, 2, 1), np.uint8))
    with torch.no_grad():
        pixels = (torch.from_numpy(small).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        expected = network(pixels)
    torch.testing.assert_close(torch.from_numpy(features(small)), expected, atol=1e-4, rtol=1e-4)
    assert features(IMAGES).shape == expected.shape  # other sizes are resized
    assert features.identity == load_image_features(str(folder)).identity


def test_a_network_for_larger_pictures_is_given_smaller_ones(tmp_path: Path) -> None:
    folder, _ = timm_folder(tmp_path / "vit", 256)
    assert load_image_features(str(folder)).side == 224


def test_our_own_encoder_is_one_too(tmp_path: Path) -> None:
    ImageEncoder(16, 8, 8, 2, 1).save_pretrained(tmp_path / "image_encoder")
    assert load_image_features(str(tmp_path / "image_encoder"))(IMAGES).shape == (3, 8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "no image encoder: use timm:NAME"),
        ("timm:not_a_network", "timm knows no weights"),
        (DINO_V2, "cannot be had: .*--image-encoder"),
        ("open_clip:ViT-B-32/no_such_tag", "no safetensors called 'no_such_tag'"),
        ("open_clip:ViT-B-32/none.safetensors", "only safetensors"),
    ],
)
def test_a_name_that_cannot_be_had_is_said(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_image_features(name)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder, _ = timm_folder(tmp_path / "vit", 32)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only safetensors are read"):
        load_image_features(str(folder))
    with pytest.raises(ConfigError, match="holds no image encoder"):
        load_image_features(str(tmp_path))
