"""`data.parts`: n machines read and encode, and the merged run is that of one."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from paris_p2p.components.image import ImageEncoder
from paris_p2p.components.pretrained import load_vae
from paris_p2p.components.text import TextEncoder
from paris_p2p.components.tokenizer import Tokenizer
from paris_p2p.data import blocks, parts
from paris_p2p.data.blocks import Encoders
from paris_p2p.data.parts import Share, parse_share
from paris_p2p.data.prepare import PrepareOptions, merge, prepare, prepare_part
from paris_p2p.data.report import PrepareReport
from paris_p2p.data.sources import open_source
from paris_p2p.diffusion.recipes import preset
from paris_p2p.diffusion.shards import load_shard
from paris_p2p.errors import ConfigError
from paris_p2p.store.content_store import ContentStore
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.manifest import Latents, check_manifest

ORGANISER = Identity(bytes(32))
MakeFolder = Callable[[int], Path]


def whole(options: PrepareOptions) -> PrepareReport:
    return prepare(options, identity=ORGANISER, make_recipe=preset, progress=lambda _: None)


def make_part(options: PrepareOptions, share: str) -> parts.PartReport:
    return prepare_part(options, parse_share(share), make_recipe=preset, progress=lambda _: None)


def merged(options: PrepareOptions, *folders: Path) -> PrepareReport:
    return merge(options, folders, identity=ORGANISER, make_recipe=preset, progress=lambda _: None)


@pytest.fixture
def latent(tmp_path: Path, image_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> PrepareOptions:
    """`b2` on 40 pictures of 64 pixels, in blocks of 6, with random encoders as small as can be."""
    monkeypatch.setattr(blocks, "BLOCK", 6)
    folder = image_folder(40)
    (folder / "007.png").write_bytes(b"broken")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).save_pretrained(tmp_path / "vae")
    tokenizer = Tokenizer.reduced(["a red square"], 8)
    TextEncoder(tokenizer.vocab_size, 8, 8, 2, 1).save_pretrained(tmp_path / "text" / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "text" / "tokenizer")
    ImageEncoder(16, 8, 8, 2, 1).save_pretrained(tmp_path / "image")
    return PrepareOptions(
        str(folder),
        tmp_path / "whole",
        clusters=2,
        preset="b2",
        image_size=64,
        steps=5,
        image_encoder=str(tmp_path / "image"),
        text_encoder=str(tmp_path / "text"),
        vae=str(tmp_path / "vae"),
    )


def test_three_parts_on_three_machines_make_the_run_of_one_in_latent_space(
    latent: PrepareOptions, tmp_path: Path
) -> None:
    expected = whole(latent)
    folders = [tmp_path / f"machine-{index}" for index in (1, 2, 3)]
    for index, folder in enumerate(folders, 1):
        make_part(replace(latent, out=folder), f"{index}/3")
    report = merged(PrepareOptions("", tmp_path / "merged", clusters=2, steps=5), *folders)
    assert report.run_id == expected.run_id
    manifest = check_manifest(report.manifest.read_bytes()).manifest
    assert (manifest.recipe.latents.space, manifest.recipe.latents.scale) == ("vae", 0.5)
    assert set(manifest.components) == {"vae", "text_encoder", "tokenizer"}
    store = ContentStore(tmp_path / "merged" / "store")
    load_vae(str(store.files(manifest.components["vae"].info_hash)))
    shard = load_shard(store.files(manifest.clusters[0].train.info_hash), manifest.recipe, 0)
    assert shard.latents.shape[1:] == (4, 8, 8) and len(shard) == manifest.clusters[0].images
    assert {shard.latents.dtype, shard.captions.dtype, shard.uncond.dtype} == {torch.float16}


def test_three_parts_of_digits_make_the_run_of_one(tmp_path: Path) -> None:
    options = PrepareOptions("digits", tmp_path / "whole", steps=5, clip_steps=2)
    for index in (1, 2, 3):
        make_part(replace(options, out=tmp_path / "run"), f"{index}/3")
    merging = PrepareOptions("", tmp_path / "run", steps=5, clip_steps=2)
    assert merged(merging, tmp_path / "run").run_id == whole(options).run_id


def test_a_part_goes_on_where_it_stopped(latent: PrepareOptions) -> None:
    done: list[int] = []

    def interrupt(_: object) -> None:
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_part(latent, Share(1, 2), make_recipe=preset, progress=interrupt)
    report = make_part(latent, "1/2")
    assert (report.reused, report.blocks) == (2, 4)
    assert report.images + report.skipped == 6 * 3 + 4
    again = make_part(latent, "1/2")
    assert again.reused == 4


@pytest.fixture
def two_parts(latent: PrepareOptions, tmp_path: Path) -> Path:
    """A folder with both parts of two."""
    for index in (1, 2):
        make_part(replace(latent, out=tmp_path / "both", preset="tiny", text_encoder=None), f"{index}/2")
    return tmp_path / "both"


def test_what_is_missing_foreign_or_damaged_is_named_before_a_merge(
    two_parts: Path, latent: PrepareOptions, tmp_path: Path
) -> None:
    folder = two_parts / "parts"
    assert [part.share.index for part in parts.find_parts([two_parts])] == [1, 2]
    with pytest.raises(ConfigError, match=r"part 1/2 is given twice"):
        parts.find_parts([folder / "1-of-2", folder / "1-of-2", folder / "2-of-2"])
    with pytest.raises(ConfigError, match=r"1 of 2 parts are missing .*: 2/2\. Name .*--shard 2/2"):
        parts.find_parts([folder / "1-of-2"])
    with pytest.raises(ConfigError, match=r"no finished part"):
        parts.find_parts([tmp_path])
    make_part(replace(latent, out=tmp_path / "other"), "2/2")
    with pytest.raises(ConfigError, match=r"do not belong together: they differ in preset, text_encoder"):
        parts.find_parts([folder / "1-of-2", tmp_path / "other"])
    block = next((folder / "2-of-2").glob("block-*"))
    block.write_bytes(block.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match=f"{block.name} is damaged: delete it and prepare its part again"):
        list(parts.walk(parts.find_parts([two_parts])))


def test_a_begun_part_is_not_mixed_with_other_options(two_parts: Path, latent: PrepareOptions) -> None:
    with pytest.raises(ConfigError, match="with other options or other encoders"):
        make_part(replace(latent, out=two_parts, preset="tiny", text_encoder=None, image_size=32), "1/2")


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "1/0", "a/b", "1/3/5", "-1/3", "1/1000000"])
def test_a_share_is_written_i_of_n(text: str) -> None:
    with pytest.raises(ConfigError, match="I/N"):
        parse_share(text)
    assert parse_share("3/8") == Share(3, 8)


@pytest.mark.parametrize("of", [1, 2, 3, 7])
@pytest.mark.parametrize("units", [1, 3, 5])
def test_each_block_is_one_parts(of: int, units: int) -> None:
    for unit in range(units):
        for block in range(20):
            takers = [n for n in range(1, of + 1) if Share(n, of).takes(unit, units, block)]
            assert len(takers) == 1


def test_near_duplicates_are_listed_and_left_out_when_asked(latent: PrepareOptions) -> None:
    shutil.copy(Path(latent.source) / "003.png", Path(latent.source) / "007.png")  # the broken one
    options = replace(latent, preset="tiny", image_size=16, text_encoder=None, vae=None, clip_steps=2)
    found = whole(options).duplicates
    assert any("007.png" in str(group["repeats"]) for group in found.groups)
    dropped = whole(replace(options, drop_duplicates=True))
    assert dropped.reused == ("ingest", "clip", "embed", "encode")
    assert dropped.duplicates.images == found.images and dropped.duplicates.dropped
    assert sum(one.images for one in dropped.clusters) == 40 - found.images


def test_several_files_are_read_by_one_part_each(
    tmp_path: Path, picture: Callable[..., bytes], write_tar: Callable[..., Path]
) -> None:
    for index in range(3):
        write_tar(tmp_path / f"{index}.tar", [("0.png", picture("red", mark=index)), ("0.txt", b"one")])
    source = open_source(str(tmp_path / "*.tar"))
    report = parts.write_part(source, tmp_path / "p", Share(2, 3), 8, Encoders(), {}, lambda *_: None)
    assert len(source.units) == 3 and report.images == 1
    (part,) = [parts._read_part(tmp_path / "p")]
    assert [block.names for block in parts.walk([part])] == [("1.tar:0.png",)]


def test_a_kind_whose_patches_do_not_fit_is_refused_before_the_parts_are_put_together(
    two_parts: Path, latent: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents of 8 a side: what the VAE made of the images, not the images."""
    asked: list[tuple[int, object]] = []

    def refuse(_name: str, *, image_size: int, latents: object, **_: object) -> None:
        asked.append((image_size, latents))
        raise ConfigError("it does not fit")

    monkeypatch.setattr(parts, "flatten", None)
    options = PrepareOptions("", two_parts, clusters=2)
    with pytest.raises(ConfigError, match="does not fit"):
        merge(options, [two_parts], identity=ORGANISER, make_recipe=refuse, progress=lambda _: None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="does not fit"):
        prepare_part(latent, Share(1, 3), make_recipe=refuse, progress=lambda _: None)  # type: ignore[arg-type]
    seen = Latents("vae", 4, 8, 64, scale=0.5, shift=0.25)
    assert asked == [(64, seen), (64, seen)]


def test_images_that_the_vae_cannot_halve_are_refused_with_the_number_it_asks_for(
    latent: PrepareOptions,
) -> None:
    with pytest.raises(ConfigError, match="an image size of 60 is no multiple of 8"):
        make_part(replace(latent, image_size=60), "1/2")
    assert not list((latent.out / "parts").rglob("block-*"))
