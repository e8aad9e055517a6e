"""`data.images`: any file becomes an equal square, or says why not."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paris_p2p.data import images
from paris_p2p.data.images import UnreadableImageError, image_size, square

Picture = Callable[..., bytes]


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_an_image_of_the_wanted_size_keeps_its_pixels(picture: Picture) -> None:
    pixels = square(picture("blue", (8, 8), 9), 8)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    assert pixels[1, 1].tolist() == [255, 255, 255] and pixels[0, 0].tolist() == [0, 0, 255]


def test_a_wide_image_is_cropped_to_its_centre() -> None:
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste("green", (10, 0, 20, 10))
    assert (square(encoded(wide), 5)[:, 2] == [0, 128, 0]).all()  # bicubic blends at the edges


def test_transparency_becomes_white() -> None:
    assert (square(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), 8) == 255).all()


def test_deep_grey_keeps_its_brightness() -> None:
    deep = Image.fromarray(np.full((8, 8), 32896, dtype=np.uint16))
    assert (square(encoded(deep), 8) == 128).all()


def test_a_photograph_on_its_side_is_turned_upright() -> None:
    sideways = Image.new("RGB", (8, 8), "black")
    sideways.paste("white", (0, 0, 4, 8))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise
    buffer = io.BytesIO()
    sideways.save(buffer, "PNG", exif=exif)
    upright = square(buffer.getvalue(), 8)
    assert upright[0, 4, 0] == 255 and upright[7, 4, 0] == 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_image_is_unreadable(picture: Picture, kind: str) -> None:
    data = picture("red", (64, 64), 70, kind)
    with pytest.raises(UnreadableImageError):
        square(data[: len(data) // 2], 8)


def test_a_file_that_is_no_image_or_missing_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("<svg/>")
    for path in (tmp_path / "a.png", tmp_path / "none.png"):
        with pytest.raises(UnreadableImageError):
            square(path, 8)


def test_postscript_is_never_run() -> None:
    with pytest.raises(UnreadableImageError, match="not a readable"):
        square(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", 8)


def test_a_decompression_bomb_is_refused_by_its_header(
    monkeypatch: pytest.MonkeyPatch, picture: Picture
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 63)
    with pytest.raises(UnreadableImageError, match="8x8 pixels"):
        square(picture("red"), 8)


def test_the_size_is_read_without_decoding(picture: Picture) -> None:
    assert image_size(picture("red", (20, 30))[:-20]) == (20, 30)
    assert image_size(np.zeros((4, 6), np.uint8)) == (6, 4)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM"]),
)
def test_any_bytes_give_an_image_or_say_why_not(data: bytes, head: bytes) -> None:
    with contextlib.suppress(UnreadableImageError):
        assert square(head + data, 4).shape == (4, 4, 3)
