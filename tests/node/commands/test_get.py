"""Tests of `paris_node.commands.get`: what it is asked for, and how it waits for room. The fetching itself:
`tests/integration/test_sharing.py`."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paris_node.commands.get import PART_FOLDER, GetRequest, _Fetch, read_item, run
from paris_node.sharing import ShareRequest, listened_interfaces, own_identity, parse_peer
from paris_p2p.errors import ConfigError, DiskFullError
from paris_p2p.ids import InfoHash
from paris_p2p.net.limits import SwarmLimits
from paris_p2p.net.swarm import Progress
from paris_p2p.programs import Output
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.hashing import describe, find_files
from paris_p2p.store.home import Home
from paris_p2p.wire.content import AnyRef, MagnetRef
from paris_p2p.wire.torrent import build_torrent, magnet_link

ID = InfoHash(bytes(range(32)))
PEER = "12D3KooWMbbPVGsZYh3ChQjue712NHHGNybRRXwnuSpezYjGbCDS"


def request(out: Path, item: str = ID.hex(), **options: Any) -> GetRequest:
    share = ShareRequest(None, None, None, SwarmLimits(), False)
    return GetRequest(item, options.get("peers", ()), out, False, share)


@pytest.fixture
def torrent(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(b"x" * 40_000)
    described = describe("f", find_files(tmp_path / "f"), 1 << 14)
    (tmp_path / "f.torrent").write_bytes(build_torrent(described.info, described.layers))
    return tmp_path / "f.torrent"


def test_an_id_a_magnet_link_and_a_torrent_are_understood(torrent: Path) -> None:
    assert read_item(ID.hex()) == read_item(magnet_link(ID, "f")) == (MagnetRef(ID), None)
    ref, known = read_item(str(torrent))
    assert known is not None and ref == known.ref and known.layout.name == "f" and len(known.layers) == 1


@pytest.mark.parametrize("item", ["nonsense", "magnet:?xt=urn:btih:" + "00" * 20, "/no/such.torrent"])
def test_other_words_are_explained(item: str) -> None:
    with pytest.raises(ConfigError, match="neither an item's id"):
        read_item(item)


def test_a_damaged_torrent_is_named(torrent: Path) -> None:
    torrent.write_bytes(torrent.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"f\.torrent is no \.torrent of BitTorrent v2 \(it cannot be used"):
        read_item(str(torrent))


def test_how_long_to_seed_is_of_no_use_without_seeding(tmp_path: Path) -> None:
    share = ShareRequest(None, None, None, SwarmLimits(seed_ratio=1.0), False)
    with pytest.raises(ConfigError, match="add --keep-seeding"):
        run(GetRequest(ID.hex(), (PEER,), tmp_path, False, share), Output(as_json=True))


def test_without_anybody_to_ask_it_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--peer.*--lan"):
        run(request(tmp_path / "out"), Output(True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("peer", ["", "localhost:4001", "/ip4/1.2.3.4/tcp/1", "/ip4/1.2.3.4/tcp/1/p2p/Qm"])
def test_a_peer_without_its_id_is_refused(tmp_path: Path, peer: str) -> None:
    with pytest.raises(ConfigError):
        run(request(tmp_path, peers=(peer,)), Output(True))


def test_a_whole_address_names_the_peer() -> None:
    text = f"/ip4/203.0.113.5/tcp/4001/tls/p2p/{PEER}"
    assert parse_peer(text).addresses == (text,)


def test_the_homes_identity_is_used_by_one_process_only(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with own_identity(home) as first, own_identity(home) as second, own_identity(None) as third:
        assert first.node_id == home.identity().node_id
        assert len({first.node_id, second.node_id, third.node_id}) == 3


def test_the_local_network_is_where_it_listens() -> None:
    assert listened_interfaces(["/ip4/127.0.0.1/tcp/0/tls", "/ip4/127.0.0.1/tcp/0"]) == ("127.0.0.1",)
    assert listened_interfaces(["/ip4/127.0.0.1/tcp/0", "/ip6/::/tcp/0"]) is None


class FullDisk:
    """A swarm whose first fetches find the disk full."""

    def __init__(self, times: int) -> None:
        self.left = times

    async def fetch(self, ref: AnyRef, *, on_progress: Callable[[Progress], None], **_: Any) -> None:
        self.left -= 1
        if self.left >= 0:
            raise DiskFullError("disk full: 5 more bytes are needed")
        on_progress(Progress(1, 1, 5, 5, 1, 7))


async def test_a_full_disk_is_waited_out_and_said_once(tmp_path: Path, autojump_clock: Any) -> None:
    stdout = io.StringIO()
    store = ContentStore(tmp_path / PART_FOLDER)
    swarm: Any = FullDisk(3)
    fetch = _Fetch(request(tmp_path), swarm, store, MagnetRef(ID), [], Output(True, stdout))
    await fetch.run()
    events = [json.loads(line) for line in stdout.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["paused", "progress"]
    assert "5 more bytes" in events[0]["reason"] and fetch.wasted == 7
