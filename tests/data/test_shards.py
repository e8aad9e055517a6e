"""`data.shards`: the file experts train on, and what is held out."""

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

from paris_p2p.data.blocks import halved
from paris_p2p.data.shards import FILE_NAME, held_out, pick_latents, pixel_latents, write_shard

CAPTIONS = ["two", "one", "two"]
COLUMN = {"one": 1, "three": 2, "two": 3}


def write_example(folder: Path) -> Path:
    encodings = np.arange(4 * 2 * 3, dtype=np.float32).reshape(4, 2, 3)
    latents = pick_latents(None, np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4, 1), np.arange(3))
    write_shard(folder, 5, latents, CAPTIONS, COLUMN, encodings, encodings[0])
    return folder / FILE_NAME


def test_a_shard_holds_latents_and_its_own_distinct_captions(tmp_path: Path) -> None:
    with safe_open(write_example(tmp_path), framework="np") as shard:
        assert shard.get_tensor("latents").shape == (3, 1, 4, 4)
        assert shard.get_tensor("latents")[1, 0, 0, 0] == np.float32(16 / 127.5 - 1)
        assert shard.get_tensor("caption_index").tolist() == [1, 0, 1]
        captions = shard.get_tensor("captions")
        assert captions[:, 0, 0].tolist() == [6.0, 18.0]  # rows 1 ("one") and 3 ("two")
        assert shard.get_tensor("uncond").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert json.loads(shard.get_tensor("caption_texts").tobytes()) == ["one", "two"]
        assert shard.metadata() == {"format": "2", "cluster": "5"}


def test_a_million_long_captions_leave_the_header_small(tmp_path: Path) -> None:
    """The library refuses a header of more than 100 MB."""
    captions = [f"{number:04} " + "x" * 4000 for number in range(500)]
    picked = pick_latents(
        np.zeros((500, 1, 1, 1), np.float32), np.zeros((1, 1, 1, 1), np.uint8), np.arange(500)
    )
    row = dict.fromkeys(captions, 0)
    write_shard(
        tmp_path, 0, picked, captions, row, np.zeros((1, 1, 1), np.float32), np.zeros((1, 1), np.float32)
    )
    with (tmp_path / FILE_NAME).open("rb") as file:
        assert int.from_bytes(file.read(8), "little") < 1000


def test_captions_come_back_whatever_is_in_them(tmp_path: Path) -> None:
    captions = ["", "\ud800 alone", "\U0001f600 naïve"]
    picked = pick_latents(np.zeros((3, 1, 1, 1), np.float32), np.zeros((1, 1, 1, 1), np.uint8), np.arange(3))
    row = dict.fromkeys(captions, 0)
    write_shard(
        tmp_path, 0, picked, captions, row, np.zeros((1, 1, 1), np.float32), np.zeros((1, 1), np.float32)
    )
    with safe_open(tmp_path / FILE_NAME, framework="np") as shard:
        assert json.loads(shard.get_tensor("caption_texts").tobytes()) == sorted(captions)


def test_a_shard_of_many_rows_is_gathered_from_the_right_ones(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(1000, 1, 2, 2)).astype(np.float32)
    rows = np.arange(0, 1000, 3)
    encodings = np.ones((1, 2, 3), np.float32)
    write_shard(
        tmp_path,
        0,
        pick_latents(latents, np.zeros((1, 2, 2, 1), np.uint8), rows),
        ["a"] * len(rows),
        {"a": 0},
        encodings,
        encodings[0],
    )
    with safe_open(tmp_path / FILE_NAME, framework="np") as shard:
        assert np.array_equal(shard.get_tensor("latents"), latents[rows])


def test_a_shards_bytes_do_not_change(tmp_path: Path) -> None:
    assert write_example(tmp_path / "a").read_bytes() == write_example(tmp_path / "b").read_bytes()
    data = (tmp_path / "a" / FILE_NAME).read_bytes()
    assert hashlib.sha256(data).hexdigest()[:8] == "eb2a137e"  # in every process


def test_halves_stay_halves_in_half_the_bytes(tmp_path: Path) -> None:
    latents, encodings = np.ones((6, 4, 8, 8), np.float32), np.ones((2, 7, 3), np.float32)
    sizes = []
    for name, half in (("full", np.asarray), ("half", halved)):
        picked = pick_latents(half(latents), np.zeros((6, 8, 8, 3), np.uint8), np.arange(6))
        encoded = half(encodings)
        write_shard(tmp_path / name, 0, picked, ["a"] * 6, {"a": 1}, encoded, encoded[0])
        sizes.append((tmp_path / name / FILE_NAME).stat().st_size)
        with safe_open(tmp_path / name / FILE_NAME, framework="np") as shard:
            for tensor in ("latents", "captions", "uncond"):
                assert shard.get_tensor(tensor).dtype == encoded.dtype
                assert (shard.get_tensor(tensor) == 1).all()
    floats = latents.size + 2 * 7 * 3
    assert floats * 2 - 64 <= sizes[0] - sizes[1] <= floats * 2 + 64


def test_what_no_half_can_hold_is_held_at_the_end_of_its_range() -> None:
    assert halved(np.array([1e6, -1e6, 0.5], np.float32)).tolist() == [65504.0, -65504.0, 0.5]


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
