"""Both kinds of path together, over real sockets: which is dialled, changed to, fallen back to."""

import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from paris_p2p.errors import ConfigError, TransportError
from paris_p2p.ids import InfoHash, NodeId
from paris_p2p.net.addresses import is_tls, parse_endpoint
from paris_p2p.net.connection import Connection
from paris_p2p.net.item import Item
from paris_p2p.net.multi import MultiNetwork, open_network
from paris_p2p.net.swarm import Swarm, swarm_over
from paris_p2p.net.transport import ByteStream, DirectStream, Peer
from paris_p2p.store.content_store import ContentStore
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.identity import Identity, peer_id_text

TLS = "/ip4/127.0.0.1/tcp/0/tls"
LIBP2P = "/ip4/127.0.0.1/tcp/0"
ALICE, BOB = Identity(b"a" * 32), Identity(b"b" * 32)


async def nobody(info_hash: InfoHash) -> Sequence[Peer]:
    return ()


async def hang_up(node_id: NodeId, stream: ByteStream) -> None:
    await stream.aclose()


def dead_address(identity: Identity) -> str:
    """A TLS address at which nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"/ip4/127.0.0.1/tcp/{unused.getsockname()[1]}/tls/p2p/{peer_id_text(identity.node_id)}"


def only(network: MultiNetwork, *, tls: bool) -> Peer:
    return Peer(network.node_id, tuple(text for text in network.addresses if is_tls(text) == tls))


def seeded(root: Path, size: int = 3_000_000) -> tuple[ContentStore, ContentRef]:
    source = root / "weights"
    source.write_bytes(random.Random(3).randbytes(size))
    store = ContentStore(root / "seed")
    return store, store.add(source, piece_length=1 << 16)


@asynccontextmanager
async def swarm(network: MultiNetwork, store: ContentStore) -> AsyncIterator[Swarm]:
    async with swarm_over(network, store, find_peers=nobody, rng=random.Random(1)) as opened:
        yield opened


def test_the_fast_path_does_not_load_libp2p() -> None:
    code = "import sys, paris_p2p.net.swarm; sys.exit('libp2p' in sys.modules or 'multiaddr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_tls_addresses_come_first() -> None:
    async with open_network(ALICE, [LIBP2P, TLS]) as network:
        first, second = network.addresses
        assert is_tls(first) and not is_tls(second)
        assert all(text.endswith(f"/p2p/{peer_id_text(ALICE.node_id)}") for text in network.addresses)


async def test_what_is_announced_is_checked_and_told() -> None:
    async with open_network(ALICE, [TLS], ["/ip4/203.0.113.7/tcp/1/tls"]) as network:
        assert network.addresses == (f"/ip4/203.0.113.7/tcp/1/tls/p2p/{peer_id_text(ALICE.node_id)}",)
    with pytest.raises(ConfigError):
        async with open_network(ALICE, [TLS], ["nonsense"]):
            pass


async def test_tls_is_dialled_first_and_libp2p_where_it_fails() -> None:
    async with open_network(ALICE, [LIBP2P, TLS]) as alice, open_network(BOB, []) as bob:
        alice.serve(hang_up)
        fast = await bob.dial(Peer(alice.node_id, alice.addresses))
        assert isinstance(fast, DirectStream)
        await fast.aclose()
        assert bob._libp2p is None
        detour = (dead_address(ALICE), *only(alice, tls=False).addresses)
        slow = await bob.dial(Peer(alice.node_id, detour))
        assert not isinstance(slow, DirectStream)
        await slow.aclose()


async def test_a_peer_that_is_gone_is_no_reason_to_load_libp2p() -> None:
    gone = dead_address(ALICE)
    peer = Peer(ALICE.node_id, (gone, gone.replace("/tls", "")))
    async with open_network(BOB, []) as bob:
        with pytest.raises(TransportError, match="cannot reach"):
            await bob.dial(peer)
        assert bob._libp2p is None


async def test_a_session_over_libp2p_moves_to_tls_when_the_peer_has_it(tmp_path: Path) -> None:
    store, ref = seeded(tmp_path)
    mine = ContentStore(tmp_path / "mine")
    paths: list[bool] = []
    async with (
        open_network(ALICE, [LIBP2P, TLS]) as alice,
        open_network(BOB, []) as bob,
        swarm(alice, store),
        swarm(bob, mine) as leecher,
    ):
        accept = leecher._run_connection

        async def note(item: Item, connection: Connection) -> None:
            paths.append(connection.direct)
            await accept(item, connection)

        leecher._run_connection = note  # type: ignore[method-assign]
        with trio.fail_after(60):
            await leecher.fetch(ref, peers=[only(alice, tls=False)])
    assert mine.verify(ref.info_hash) == []
    assert paths[0] is False and True in paths


async def test_a_session_stays_on_libp2p_when_tls_cannot_be_reached(tmp_path: Path) -> None:
    store, ref = seeded(tmp_path)
    mine = ContentStore(tmp_path / "mine")
    async with open_network(ALICE, [LIBP2P], [dead_address(ALICE)]) as alice, open_network(BOB, []) as bob:
        assert alice._libp2p is not None
        peer = Peer(ALICE.node_id, alice._libp2p.addresses)
        async with swarm(alice, store), swarm(bob, mine) as leecher:
            with trio.fail_after(60):
                await leecher.fetch(ref, peers=[peer])
    assert mine.verify(ref.info_hash) == []


async def relay(listener: trio.SocketListener, port: int, limit: int) -> None:
    """Passes one connection on to `port`, and is gone after `limit` bytes from there."""
    here = await listener.accept()
    await listener.aclose()
    there = await trio.open_tcp_stream("127.0.0.1", port)

    async def upwards() -> None:
        async for data in here:
            await there.send_all(data)

    async with here, there, trio.open_nursery() as nursery:
        nursery.start_soon(upwards)
        passed = 0
        while passed < limit and (data := await there.receive_some(65_536)):
            passed += len(data)
            await here.send_all(data)
        nursery.cancel_scope.cancel()


async def test_a_fetch_goes_on_over_libp2p_when_tls_dies_half_way(tmp_path: Path) -> None:
    store, ref = seeded(tmp_path)
    mine = ContentStore(tmp_path / "mine")
    async with open_network(ALICE, [LIBP2P, TLS]) as alice, open_network(BOB, []) as bob:
        endpoint = parse_endpoint(alice.addresses[0])
        assert endpoint is not None
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        name = listener.socket.getsockname()
        through = f"/ip4/127.0.0.1/tcp/{name[1]}/tls/p2p/{peer_id_text(ALICE.node_id)}"
        assert alice._libp2p is not None
        alice._announce = [through, *alice._libp2p.addresses]  # its hello must not lead around the relay
        peer = Peer(ALICE.node_id, alice.addresses)
        async with swarm(alice, store), swarm(bob, mine) as leecher, trio.open_nursery() as nursery:
            nursery.start_soon(relay, listener, endpoint.port, ref.length // 2)
            with trio.fail_after(60):
                await leecher.fetch(ref, peers=[peer])
            assert bob._libp2p is not None
    assert mine.verify(ref.info_hash) == []
