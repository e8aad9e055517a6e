"""Small captioned images, made where a test needs them."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "black")


def _picture(colour: str = "red", size: tuple[int, int] = (8, 8), mark: int = 0, kind: str = "PNG") -> bytes:
    image = Image.new("RGB", size, colour)
    ImageDraw.Draw(image).point((mark % size[0], mark // size[0] % size[1]), "white")
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """`picture(colour, size, mark, kind)`: a file of one colour; `mark` moves a white dot."""
    return _picture


@pytest.fixture
def write_tar() -> Callable[[Path, list[tuple[str, bytes]]], Path]:
    """`write_tar(path, members)`: a tar of the given names and contents, in this order."""

    def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
        with tarfile.open(path, "w") as archive:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[[int], Path]:
    """`image_folder(count)`: an imagefolder, captioned by colour in `metadata.jsonl`."""

    def make(count: int) -> Path:
        folder = tmp_path / "pictures"
        folder.mkdir()
        rows = []
        for index in range(count):
            colour = COLOURS[index % len(COLOURS)]
            (folder / f"{index:03d}.png").write_bytes(_picture(colour, mark=index))
            rows.append({"file_name": f"{index:03d}.png", "text": f"a {colour} square"})
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        return folder

    return make
