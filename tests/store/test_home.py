"""Tests of `paris_p2p.store.home`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from paris_p2p.errors import ConfigError, StoreError
from paris_p2p.ids import RunId, expert_role
from paris_p2p.store.home import ENVIRONMENT, Home

RUN = RunId(b"\xab" * 32)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def test_the_option_wins_over_the_environment_and_that_over_the_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "platform"))
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "environment"))
    assert Home.resolve(tmp_path / "option").path == tmp_path / "option"
    assert Home.resolve(None).path == tmp_path / "environment"
    monkeypatch.delenv(ENVIRONMENT)
    if sys.platform.startswith("linux"):  # elsewhere the platform's folder cannot be moved
        assert Home.resolve(None).path == platformdirs.user_data_path("paris-p2p")
        assert Home.resolve(None).path.is_relative_to(tmp_path)


def test_an_identity_is_made_once_and_only_its_owner_may_read_it(home: Home) -> None:
    identity = home.identity()
    assert home.identity().node_id == identity.node_id
    assert home.identity_path.read_bytes() == identity.seed
    assert home.identity_path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in home.path.iterdir()] == ["identity.key"]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604, 0o666])
def test_an_identity_open_to_others_is_refused_with_the_remedy(home: Home, mode: int) -> None:
    home.identity()
    home.identity_path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {home.identity_path}"):
        home.identity()
    home.identity_path.chmod(0o400)
    home.identity()


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_file_that_is_no_identity_is_refused_and_kept(home: Home, size: int) -> None:
    home.identity_path.write_bytes(bytes(size))
    home.identity_path.chmod(0o600)
    with pytest.raises(ConfigError, match="32 bytes are expected"):
        home.identity()
    assert home.identity_path.stat().st_size == size


MAKE = "import sys; from pathlib import Path; from paris_p2p.store.home import Home; "


def test_processes_that_make_an_identity_at_once_get_the_same(home: Home) -> None:
    code = MAKE + "print(Home(Path(sys.argv[1])).identity().node_id.hex())"
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(home.path)], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    found = {child.communicate()[0].decode().strip() for child in children}
    assert found == {home.identity().node_id.hex()}
    assert [path.name for path in home.path.iterdir()] == ["identity.key"]


def test_an_identity_is_used_by_one_node_at_a_time(home: Home) -> None:
    code = MAKE + "h = Home(Path(sys.argv[1])).lock(); h.__enter__(); print(1, flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(home.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
        expected = rf"this identity is in use by another node \(process {child.pid}\)"
        with pytest.raises(ConfigError, match=expected), home.lock():
            pass
        child.kill()
    with home.lock():
        pass
    with home.lock(), pytest.raises(ConfigError, match=f"process {os.getpid()}"), home.lock():
        pass


def test_nothing_is_remembered_at_first(home: Home) -> None:
    assert home.context() == {} and home.context().get("bootstrap") is None


def test_what_is_remembered_is_there_for_the_next_command(home: Home, tmp_path: Path) -> None:
    home.remember(bootstrap=["/ip4/127.0.0.1/tcp/1"], run_id=RUN.hex())
    again = Home(home.path)
    assert again.remember(model=str(tmp_path)) == {
        "bootstrap": ["/ip4/127.0.0.1/tcp/1"],
        "run_id": RUN.hex(),
        "model": str(tmp_path),
    }
    assert home.context() == again.context()


def test_fields_of_another_version_are_passed_over(home: Home) -> None:
    home.context_path.write_text(json.dumps({"colour": "red", "model": "x"}))
    assert home.context() == {"model": "x"}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"bootstrap": "x"}', '{"bootstrap": [1]}', '{"run_id": "abc"}', '{"run_id": "00"}',
     '{"model": 3}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_context_is_refused_with_the_remedy(home: Home, text: str) -> None:
    home.context_path.write_text(text)
    with pytest.raises(ConfigError, match=f"{home.context_path} is damaged .*--bootstrap"):
        home.context()
    home.context_path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="damaged"):
        home.context()


def test_folders_are_where_they_belong(home: Home, tmp_path: Path) -> None:
    assert home.store().root == tmp_path / "home" / "store"
    work = home.work(RUN, expert_role(3))
    assert work == home.path / "work" / RUN.hex() / "expert-3" and work.is_dir()
    assert home.models == home.path / "models" and home.models.is_dir()
    assert home.run_folder(RUN) == home.path / "runs" / RUN.hex()


def test_a_home_where_none_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="home folder"):
        Home(tmp_path / "file" / "home")
