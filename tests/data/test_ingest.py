"""`data.ingest`: a source on disk, with what was skipped and why."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paris_p2p.data.ingest import ingest, load, native_side
from paris_p2p.data.sources import open_source
from paris_p2p.errors import ConfigError

Picture = Callable[..., bytes]
MakeFolder = Callable[[int], Path]


def read(source: str | Path, out: Path, side: int | None = None) -> Path:
    out.mkdir()
    ingest(open_source(str(source)), out, side, lambda *_: None)
    return out


def test_digits_keep_their_size_and_are_grey(tmp_path: Path) -> None:
    data = load(read("digits", tmp_path / "out"))
    assert data.images.shape == (1797, 8, 8, 1) and data.images.max() == 255
    assert len(data.captions) == len(data.names) == 1797 and not data.skipped


def test_unreadable_and_uncaptioned_images_are_skipped_and_listed(
    tmp_path: Path, image_folder: MakeFolder, picture: Picture
) -> None:
    folder = image_folder(4)
    (folder / "002.png").write_bytes(b"broken")
    (folder / "extra.png").write_bytes(picture("red"))
    data = load(read(folder, tmp_path / "out"))
    assert data.names == ("000.png", "001.png", "003.png") and data.images.shape == (3, 8, 8, 3)
    assert [one.name for one in data.skipped] == ["002.png", "extra.png"]
    assert "not a readable" in data.skipped[0].reason and data.skipped[1].reason == "no caption"


def test_captions_missing_everywhere_names_the_first_image_and_the_conventions(
    tmp_path: Path, image_folder: MakeFolder
) -> None:
    folder = image_folder(2)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"captions are missing: 000\.png .*metadata\.jsonl .*\.txt"):
        read(folder, tmp_path / "out")


def test_a_source_of_unreadable_images_only_is_refused(tmp_path: Path, image_folder: MakeFolder) -> None:
    folder = image_folder(1)
    (folder / "000.png").write_bytes(b"broken")
    with pytest.raises(
        ConfigError, match=r"no readable images \(1 skipped; the first, 000\.png: not a readable"
    ):
        read(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("sizes", "side"),
    [([(30, 45)], 28), ([(8, 8), (16, 16)], 64), ([(300, 200)], 64), ([(64, 64)], 64), ([(3, 9)], 4)],
)
def test_the_side_is_the_images_own_when_equal_and_small(
    tmp_path: Path, picture: Picture, sizes: list[tuple[int, int]], side: int
) -> None:
    for index, size in enumerate(sizes * 2):
        (tmp_path / f"{index}.png").write_bytes(picture("red", size))
    assert native_side(open_source(str(tmp_path))) == side


def test_a_given_side_is_used_and_checked(tmp_path: Path, image_folder: MakeFolder) -> None:
    folder = image_folder(2)
    assert load(read(folder, tmp_path / "out", 16)).images.shape == (2, 16, 16, 3)
    with pytest.raises(ConfigError, match="image size"):
        read(folder, tmp_path / "out2", 2)


def test_grey_files_in_colour_are_stored_with_one_channel(tmp_path: Path) -> None:
    for index in range(2):
        Image.new("RGB", (8, 8), (index * 100,) * 3).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("grey")
    images = load(read(tmp_path, tmp_path / "out")).images
    assert images.shape == (2, 8, 8, 1) and np.unique(images).tolist() == [0, 100]
