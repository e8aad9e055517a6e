"""The key file and the runtime folder: kept, checked, and nothing left behind."""

import os
import stat
from pathlib import Path

import pytest

from paris_p2p.dht import runtime
from paris_p2p.dht.key import ensure_key
from paris_p2p.dht.runtime import MAX_PLACE_BYTES, runtime_folder
from paris_p2p.errors import ConfigError, StoreError


def test_a_key_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "dht.key"
    first = ensure_key(path)
    assert ensure_key(path).seed == first.seed
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["dht.key"]


def test_a_damaged_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dht.key"
    ensure_key(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged"):
        ensure_key(path)


def test_a_key_that_others_may_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "dht.key"
    ensure_key(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        ensure_key(path)


def test_a_key_that_cannot_be_written_is_the_operators_to_solve(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError):
        ensure_key(tmp_path / "file" / "dht.key")


def test_the_runtime_folder_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    with runtime_folder(tmp_path / "run") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "x.sock").write_bytes(b"")
    assert not (tmp_path / "run").exists()


def test_folders_of_dead_processes_are_removed_and_others_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "MAX_PLACE_BYTES", 500)
    dead, alive = tmp_path / "run" / "4194305-0", tmp_path / "run" / f"{os.getppid()}-0"
    dead.mkdir(parents=True)
    alive.mkdir()
    with runtime_folder(tmp_path / "run"):
        assert not dead.exists()
    assert alive.exists()


def test_a_folder_too_long_for_a_socket_is_replaced_by_a_short_one(tmp_path: Path) -> None:
    with runtime_folder(tmp_path / ("x" * 100)) as folder:
        assert len(str(folder.parent)) <= MAX_PLACE_BYTES
        place = folder.parent
    assert not place.exists()
