"""Tests of `paris_node.commands.publish`."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from paris_node.commands.publish import adopt, load_prepared
from paris_node.run_node import run_items
from paris_p2p.errors import ConfigError, ManifestError
from paris_p2p.store.content_store import ContentStore


def test_a_prepared_folder_is_adopted_whole(world: Any) -> None:
    folder = world.folder / "prepared"
    store = world.network("organiser").store
    signed = load_prepared(folder)
    assert signed == world.signed
    adopt(folder, signed, store)
    assert all(store.has(ref.info_hash) for ref in run_items(signed.manifest))


def test_publishing_again_from_the_same_home_needs_the_prepared_items_no_more(world: Any) -> None:
    folder = world.folder / "prepared"
    store = world.network("organiser").store
    adopt(folder, world.signed, store)
    shutil.rmtree(folder / "store")
    adopt(folder, world.signed, store)
    node, _ = world.run_node(world.network("organiser"))
    again, _ = world.run_node(world.network("organiser"))
    assert node.signed == again.signed


def test_a_missing_item_is_named_with_what_to_do(world: Any) -> None:
    folder = world.folder / "prepared"
    shard = world.signed.manifest.clusters[0].train
    ContentStore(folder / "store").remove(shard.info_hash)
    with pytest.raises(ConfigError, match=f"{shard.info_hash.hex()[:16]}.*prepare again"):
        adopt(folder, world.signed, world.network("organiser").store)


def test_a_damaged_item_is_found_before_anybody_is_told(world: Any) -> None:
    folder = world.folder / "prepared"
    shard = world.signed.manifest.clusters[0].train
    file = ContentStore(folder / "store").files(shard.info_hash) / "config.json"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-1] + b"?")
    store = world.network("organiser").store
    with pytest.raises(ConfigError, match="damaged"):
        adopt(folder, world.signed, store)
    assert not store.has(shard.info_hash)


def test_a_folder_that_was_not_prepared_says_how_to(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="paris-node prepare"):
        load_prepared(tmp_path)
    with pytest.raises(ConfigError, match="paris-node prepare"):
        load_prepared(tmp_path / "none")


def test_a_manifest_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.paris").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prepared(tmp_path)


def test_a_changed_manifest_is_refused(world: Any) -> None:
    path = world.folder / "prepared" / "manifest.paris"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ManifestError):
        load_prepared(path.parent)
