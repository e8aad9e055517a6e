"""`data.shards`: the file experts train on, and what is held out."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

from paris_p2p.data.shards import FILE_NAME, held_out, pixel_latents, write_shard

CAPTIONS = ["two", "one", "two"]
COLUMN = {"one": 1, "three": 2, "two": 3}


def write_example(folder: Path) -> Path:
    encodings = np.arange(4 * 2 * 3, dtype=np.float32).reshape(4, 2, 3)
    latents = pixel_latents(np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4, 1))
    write_shard(folder, 5, latents, CAPTIONS, COLUMN, encodings, encodings[0])
    return folder / FILE_NAME


def test_a_shard_holds_latents_and_its_own_distinct_captions(tmp_path: Path) -> None:
    with safe_open(write_example(tmp_path), framework="np") as shard:
        assert shard.get_tensor("latents").shape == (3, 1, 4, 4)
        assert shard.get_tensor("caption_index").tolist() == [1, 0, 1]
        captions = shard.get_tensor("captions")
        assert captions[:, 0, 0].tolist() == [6.0, 18.0]  # rows 1 ("one") and 3 ("two")
        assert shard.get_tensor("uncond").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert shard.metadata() == {"format": "1", "cluster": "5", "captions": json.dumps(["one", "two"])}


def test_a_shards_bytes_are_the_same_in_every_process(tmp_path: Path) -> None:
    # safetensors orders metadata by a hash with a seed of the process's own
    code = (
        "import sys, numpy as np, pathlib; from paris_p2p.data.shards import write_shard;"
        "write_shard(pathlib.Path(sys.argv[1]), 5, np.zeros((1, 1, 4, 4), 'f4'), ['a'], {'a': 0},"
        "np.zeros((1, 2, 3), 'f4'), np.zeros((2, 3), 'f4'))"
    )
    for name in "abcd":
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, timeout=60)
    assert len({(tmp_path / name / FILE_NAME).read_bytes() for name in "abcd"}) == 1


def test_pixels_are_scaled_to_minus_one_to_one() -> None:
    latents = pixel_latents(np.array([0, 255], dtype=np.uint8).reshape(1, 1, 2, 1).repeat(3, axis=3))
    assert latents.shape == (1, 3, 1, 2) and latents.dtype == np.float32
    assert latents[0, 0].tolist() == [[-1.0, 1.0]]


def test_about_a_twentieth_is_held_out_whatever_the_clusters() -> None:
    names = [f"image {index}" for index in range(4000)]
    few, many = np.zeros(4000, np.int64), np.arange(4000) % 8
    out = held_out(names, few, 0)
    assert 0.04 < out.mean() < 0.06
    assert np.array_equal(out, held_out(names, many, 0))
    assert not np.array_equal(out, held_out(names, few, 1))


def test_every_cluster_holds_out_one_and_keeps_one() -> None:
    labels = np.repeat(np.arange(50), 2)
    out = held_out([str(index) for index in range(100)], labels, 0)
    assert (np.bincount(labels, out) == 1).all()
