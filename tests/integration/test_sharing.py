"""`seed`, `get`, `export-torrent`: a swarm without a DHT, in real processes; and libtorrent beside it."""

import signal
from pathlib import Path
from random import Random
from typing import Any

import libtorrent
import pytest
import trio

from paris_p2p.store.hashing import content_id
from paris_p2p.wire.bep52 import info_hash
from paris_p2p.wire.torrent import read_torrent

FAST = "/ip4/127.0.0.1/tcp/0/tls"
SIZES = {"weights.bin": 3_000_001, "sub/config.json": 400, "sub/empty": 0, "index": 40_000}
LIBTORRENT_S = 200.0


@pytest.fixture(scope="module")
def source(stage: Any) -> Path:
    folder = Path(stage.folder) / "source" / "model"
    for path, size in SIZES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(Random(size).randbytes(size))
    return folder


@pytest.fixture(scope="module")
def torrent(stage: Any, source: Path) -> Path:
    """Exported from the very files, which `seed` then need not hash again."""
    out = Path(stage.folder) / "model.torrent"
    program = stage.node("export-torrent", source, "--out", out, "--piece-length", 65536, home="seeder")
    exported = program.wait_event("exported")
    assert program.wait() == 0 and exported["path"] == str(out)
    assert exported["magnet"] == f"magnet:?xt=urn:btmh:1220{exported['info_hash']}&dn=model"
    return out


@pytest.fixture(scope="module")
def seeding(stage: Any, source: Path, torrent: Path) -> dict[str, Any]:
    program = stage.node("seed", source, "--piece-length", 65536, "--listen", FAST, home="seeder")
    event: dict[str, Any] = program.wait_event("seeding")
    assert event["info_hash"] == read_torrent(torrent.read_bytes()).ref.info_hash.hex()
    return event


def same(folder: Path) -> bool:
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()} == SIZES


def test_peers_find_further_peers_and_everybody_gets_the_same_files(
    stage: Any, source: Path, torrent: Path, seeding: dict[str, Any]
) -> None:
    middle_out, last_out = Path(stage.folder) / "middle", Path(stage.folder) / "last"
    peer = ("--peer", seeding["addresses"][0], "--listen", FAST)
    middle = stage.node(
        *("get", seeding["info_hash"], "--out", middle_out, "--keep-seeding", *peer), home="middle"
    )
    address = middle.wait_event("listening")["addresses"][0]
    last = stage.node(*("get", torrent, "--out", last_out, "--peer", address, "--listen", FAST), home="last")
    fetched = last.wait_event("fetched")
    assert last.wait() == 0 and fetched["path"] == str(last_out / "model")
    in_two = (
        fetched["bytes"] // 2
    )  # the last blocks are asked of two peers, and of 3 MB many are among the last
    assert fetched["bytes"] == sum(SIZES.values()) and fetched["wasted_bytes"] < in_two
    received = middle.wait_event("fetched")["received_bytes"]
    assert sum(SIZES.values()) <= received < sum(SIZES.values()) + in_two
    middle.process.send_signal(signal.SIGTERM)
    assert middle.wait() == 130
    for out in (middle_out, last_out):
        assert [path.name for path in out.iterdir()] == ["model"] and same(out / "model")
        assert info_hash(content_id(out / "model", 65536)[0]).hex() == seeding["info_hash"]


def test_a_file_that_is_there_already_is_recognised_and_another_is_left_alone(
    stage: Any, seeding: dict[str, Any], source: Path
) -> None:
    out = Path(stage.folder) / "taken"
    (out / "model").mkdir(parents=True)
    (out / "model" / "mine").write_text("mine")
    get = ("get", seeding["info_hash"], "--peer", seeding["addresses"][0], "--listen", FAST, "--out")
    refused = stage.node(*get, out, home="taken")
    assert refused.wait() == 2 and "is something else" in refused.tail()
    assert (out / "model" / "mine").read_text() == "mine"
    known = stage.node(*get, source.parent, home="taken")
    assert known.wait_event("fetched")["bytes"] == sum(SIZES.values()) and known.wait() == 0
    assert same(source) and list(source.parent.iterdir()) == [source]


async def test_a_stock_client_fetches_by_the_exported_torrent(
    source: Path, torrent: Path, tmp_path: Path
) -> None:
    """From a libtorrent seeder over the very files that the node holds."""
    settings: Any = {
        "listen_interfaces": "127.0.0.1:0",
        "enable_dht": False,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        "allow_multiple_connections_per_ip": True,
    }
    seeder, leecher = libtorrent.session(settings), libtorrent.session(settings)
    handles = []
    for session, folder in ((seeder, source.parent), (leecher, tmp_path)):
        params = libtorrent.load_torrent_file(str(torrent))
        params.save_path = str(folder)
        params.flags &= ~(libtorrent.torrent_flags.paused | libtorrent.torrent_flags.auto_managed)
        handles.append(session.add_torrent(params))
    with trio.fail_after(LIBTORRENT_S):
        while not handles[0].status().is_seeding:
            await trio.sleep(0.02)
        handles[1].connect_peer(("127.0.0.1", seeder.listen_port()))
        while not handles[1].status().is_seeding:
            await trio.sleep(0.02)
    assert same(tmp_path / "model")
    assert content_id(tmp_path / "model", 65536) == content_id(source, 65536)
