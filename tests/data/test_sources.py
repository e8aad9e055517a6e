"""`data.sources`: every kind of SOURCE yields the same kind of samples, and refuses nothing silently."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from paris_p2p.data.sources import Sample, Skipped, open_source
from paris_p2p.errors import ConfigError

Picture = Callable[..., bytes]
WriteTar = Callable[[Path, list[tuple[str, bytes]]], Path]
MakeFolder = Callable[[int], Path]


def captions(source: str | Path) -> dict[str, str | None]:
    """Name -> caption of the samples of `source`."""
    return {one.name: one.caption for one in open_source(str(source)).samples() if isinstance(one, Sample)}


def skipped(source: str | Path) -> list[str]:
    return [
        f"{one.name}: {one.reason}" for one in open_source(str(source)).samples() if isinstance(one, Skipped)
    ]


def test_digits_are_1797_captioned_images() -> None:
    found = captions("digits")
    assert len(found) == 1797
    assert len(set(found.values())) == 10
    assert found["digit 0007"] == "a handwritten digit seven"


def test_a_folder_with_metadata_jsonl_is_read_in_order_of_names(image_folder: MakeFolder) -> None:
    assert list(captions(image_folder(3)).items()) == [
        ("000.png", "a red square"),
        ("001.png", "a green square"),
        ("002.png", "a blue square"),
    ]


def test_metadata_may_be_csv_or_parquet_and_call_the_text_a_caption(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.png", "b/b.png"):
        (tmp_path / name).write_bytes(picture("red"))
    (tmp_path / "metadata.csv").write_text('file_name,caption\na.png,"one, red"\n')
    table = pyarrow.table({"file_name": ["b.png"], "text": ["two"]})
    pyarrow.parquet.write_table(table, tmp_path / "b" / "metadata.parquet")
    assert captions(tmp_path) == {"a.png": "one, red", "b/b.png": "two"}


def test_sidecar_captions_are_read_and_a_missing_one_is_none(tmp_path: Path, picture: Picture) -> None:
    for name in ("a.PNG", "b.jpg"):
        (tmp_path / name).write_bytes(picture("red"))
    (tmp_path / "a.txt").write_text("  a red\n square ")
    assert captions(tmp_path) == {"a.PNG": "a red square", "b.jpg": None}


def test_metadata_rows_without_an_image_and_broken_lines_are_listed(image_folder: MakeFolder) -> None:
    folder = image_folder(1)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(
            '{"file_name": "gone.png", "text": "x"}\n{broken\n{"file_name": "../up.png", "text": "x"}\n'
        )
    assert skipped(folder) == [
        "metadata.jsonl row 3: not a row with a file_name",
        "gone.png: named in the metadata, but not there",
        "../up.png: named in the metadata, but not there",
    ]
    assert captions(folder) == {"000.png": "a red square"}


@pytest.mark.parametrize(("image", "text"), [("image", "text"), ("jpg", "caption")])
def test_parquet_columns_may_have_either_name(
    tmp_path: Path, picture: Picture, image: str, text: str
) -> None:
    table = pyarrow.table({image: [picture("red"), b"broken", None], text: ["one", "two", "three"]})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    for source in (tmp_path / "data.parquet", tmp_path):
        assert captions(source) == {"row 0": "one", "row 1": "two"}
        assert skipped(source) == [f"row 2: column {image} holds no image bytes"]


def test_parquet_with_image_structs_as_datasets_writes_them_is_read(tmp_path: Path, picture: Picture) -> None:
    struct = {"bytes": picture("red"), "path": None}
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [struct], "text": ["one"]}), tmp_path / "data.parquet"
    )
    (sample,) = open_source(str(tmp_path)).samples()
    assert isinstance(sample, Sample) and sample.image == picture("red")


def test_parquet_without_images_or_damaged_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"label": [1], "text": ["x"]}), tmp_path / "data.parquet")
    with pytest.raises(ConfigError, match=r"no image column.*found label, text"):
        captions(tmp_path)
    (tmp_path / "data.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigError, match="cannot be read as parquet"):
        captions(tmp_path)


def test_webdataset_tars_may_mix_formats_and_lack_captions(
    tmp_path: Path, picture: Picture, write_tar: WriteTar
) -> None:
    members = [
        ("x/a.png", picture("red")),
        ("x/a.txt", b"one"),
        ("x/b.jpg", picture("red", kind="JPEG")),
        ("x/b.json", json.dumps({"caption": "two", "width": 8}).encode()),
        ("x/c.png", b"broken"),
        ("x/c.txt", b"thr\xff"),
        ("x/d.cls", b"4"),
        ("x/e.png", picture("red")),
    ]
    write_tar(tmp_path / "0.tar", members)
    write_tar(tmp_path / "1.tar", members[:2])
    expected = {
        "0.tar:x/a.png": "one",
        "0.tar:x/b.jpg": "two",
        "0.tar:x/c.png": "thr\ufffd",
        "0.tar:x/e.png": None,
    }
    assert captions(tmp_path / "0.tar") == expected
    for source in (tmp_path, tmp_path / "*.tar"):
        assert captions(source) == {**expected, "1.tar:x/a.png": "one"}


def test_a_tar_cut_short_gives_what_comes_before_the_damage(
    tmp_path: Path, picture: Picture, write_tar: WriteTar
) -> None:
    members = [
        (f"{index}.{kind}", data) for index in range(9) for kind, data in (("png", picture()), ("txt", b"x"))
    ]
    path = write_tar(tmp_path / "0.tar", members)
    path.write_bytes(path.read_bytes()[:4620])
    assert list(captions(path)) == ["0.tar:0.png", "0.tar:1.png"]
    (reason,) = skipped(path)
    assert "damaged" in reason


def test_a_file_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(ConfigError, match="cannot be read as a tar"):
        captions(tmp_path)


def test_a_folder_without_images_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"holds no images: looked for .*\.png.*webdataset.*parquet"):
        open_source(str(tmp_path))


def test_a_source_that_does_not_exist_or_is_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(ConfigError, match="there is no"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="neither"):
        open_source(str(tmp_path / "a.zip"))


def test_the_fingerprint_changes_with_the_files(image_folder: MakeFolder) -> None:
    folder = image_folder(2)
    before = open_source(str(folder)).fingerprint
    assert open_source(str(folder)).fingerprint == before
    (folder / "001.txt").write_text("another caption")
    assert open_source(str(folder)).fingerprint != before
