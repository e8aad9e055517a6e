"""The libp2p host over loopback: identity, addresses, strangers, and whole fetches through it."""

import logging
import random
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from paris_p2p.errors import ConfigError, NetworkError, TransportError
from paris_p2p.ids import InfoHash, NodeId
from paris_p2p.net.host import open_host
from paris_p2p.net.swarm import Swarm, open_swarm
from paris_p2p.net.transport import WRITE_BYTES, ByteStream, Peer
from paris_p2p.store.content_store import ContentStore
from paris_p2p.wire.identity import Identity, node_id_from_peer_id, peer_id_text

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]


def identity(number: int) -> Identity:
    return Identity(bytes([number]) * 32)


async def nobody(info_hash: InfoHash) -> Sequence[Peer]:
    return ()


def as_peer(addresses: tuple[str, ...]) -> Peer:
    return Peer(node_id_from_peer_id(addresses[0].rsplit("/", 1)[1]), addresses)


async def test_a_host_is_known_by_its_identity_and_real_port() -> None:
    async with open_host(identity(1), LOOPBACK) as host:
        (address,) = host.addresses
        assert address.startswith("/ip4/127.0.0.1/tcp/") and "/tcp/0/" not in address
        assert address.endswith(f"/p2p/{peer_id_text(identity(1).node_id)}")


async def test_all_interfaces_are_announced_one_by_one() -> None:
    async with open_host(identity(1), ["/ip4/0.0.0.0/tcp/0"]) as host:
        assert host.addresses and not any("0.0.0.0" in address for address in host.addresses)


async def test_announced_addresses_override_those_listened_on() -> None:
    async with open_host(identity(1), LOOPBACK, announce=["/ip4/203.0.113.7/tcp/4001"]) as host:
        assert host.addresses == (f"/ip4/203.0.113.7/tcp/4001/p2p/{peer_id_text(host.node_id)}",)


@pytest.mark.parametrize("address", ["nonsense", "/ip4/127.0.0.1/udp/0", "/ip4/127.0.0.1/tcp/1/ws"])
async def test_a_malformed_listen_address_is_a_configuration_error(address: str) -> None:
    with pytest.raises(ConfigError):
        async with open_host(identity(1), [address]):
            pass


async def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NetworkError, match=f"port {port} is taken"):
            async with open_host(identity(1), [f"/ip4/127.0.0.1/tcp/{port}"]):
                pass


async def test_streams_carry_bytes_and_the_dialler_s_identity() -> None:
    sent = random.Random(1).randbytes(3 * WRITE_BYTES + 1)
    received = bytearray()
    who: list[NodeId] = []
    done = trio.Event()

    async def handle(node_id: NodeId, stream: ByteStream) -> None:
        who.append(node_id)
        while data := await stream.receive_some(1 << 20):
            received.extend(data)
        done.set()

    async with open_host(identity(1), LOOPBACK) as a, open_host(identity(2), LOOPBACK) as b:
        b.serve(handle)
        stream = await a.dial(as_peer(b.addresses))
        await stream.send_all(sent)
        await stream.aclose()
        with trio.fail_after(200):
            await done.wait()
    assert bytes(received) == sent and who == [identity(1).node_id]


async def test_a_dead_address_is_a_transport_error_that_names_it() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"/ip4/127.0.0.1/tcp/{unused.getsockname()[1]}"
        async with open_host(identity(1), LOOPBACK) as host:
            with pytest.raises(TransportError, match=address):
                await host.dial(Peer(identity(2).node_id, (address,)))


async def test_a_second_address_is_tried_when_the_first_fails() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"/ip4/127.0.0.1/tcp/{unused.getsockname()[1]}"
        who: list[NodeId] = []

        async def greet(node_id: NodeId, stream: ByteStream) -> None:
            who.append(node_id)
            await stream.send_all(b"hello")

        async with open_host(identity(1), LOOPBACK) as a, open_host(identity(2), LOOPBACK) as b:
            b.serve(greet)
            with trio.fail_after(60):
                stream = await a.dial(Peer(b.node_id, (dead, *b.addresses)))
                assert await stream.receive_some(5) == b"hello" and who == [identity(1).node_id]
            await stream.aclose()


async def test_a_connection_without_streams_is_closed_and_one_in_use_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("paris_p2p.net.host.IDLE_S", 0.5)
    with trio.fail_after(60):
        async with (
            open_host(identity(1), LOOPBACK) as a,
            open_host(identity(2), LOOPBACK) as b,
            open_host(identity(3), LOOPBACK) as c,
        ):
            b.serve(hang_up)
            c.serve(stay)
            await (await a.dial(as_peer(b.addresses))).aclose()
            used = await a.dial(as_peer(c.addresses))
            while len(a._network.get_connections()) > 1:
                await trio.sleep(0.1)
            await trio.sleep(1.5)
            assert len(a._network.get_connections()) == 1
            await used.send_all(b"still here")


async def test_one_place_gets_so_many_connections_and_streams_say_where_they_come_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loopback is no place: here every address is one."""
    monkeypatch.setattr("paris_p2p.net.host.place", lambda host: f"net of {host}")
    monkeypatch.setattr("paris_p2p.net.host.MAX_PER_PLACE", 2)
    places: list[str] = []

    async def note(node_id: NodeId, stream: ByteStream) -> None:
        places.append(stream.place)
        await trio.sleep_forever()

    with trio.fail_after(60):
        async with (
            open_host(identity(1), LOOPBACK) as target,
            open_host(identity(2), LOOPBACK) as first,
            open_host(identity(3), LOOPBACK) as second,
            open_host(identity(4), LOOPBACK) as third,
        ):
            target.serve(note)
            streams = [await host.dial(as_peer(target.addresses)) for host in (first, second)]
            await streams[0].send_all(b"here")
            with pytest.raises(TransportError):
                await third.dial(as_peer(target.addresses))
            await streams[1].send_all(b"still here")
            while len(places) < 2:
                await trio.sleep(0.05)
    assert places == ["net of 127.0.0.1"] * 2


async def stay(node_id: NodeId, stream: ByteStream) -> None:
    await trio.sleep_forever()


async def hang_up(node_id: NodeId, stream: ByteStream) -> None:
    await stream.aclose()


def item(root: Path, size: int = 1_500_000) -> Path:
    """A folder of several files, in `root`."""
    folder = root / "model"
    (folder / "sub").mkdir(parents=True)
    rng = random.Random(5)
    (folder / "weights").write_bytes(rng.randbytes(size))
    (folder / "sub" / "config").write_bytes(rng.randbytes(70_000))
    (folder / "empty").write_bytes(b"")
    return folder


def swarm_of(number: int, store: ContentStore):  # type: ignore[no-untyped-def]  # a context manager
    rng = random.Random(number)
    return open_swarm(identity(number), store, listen=LOOPBACK, find_peers=nobody, rng=rng)


async def test_items_travel_from_two_seeders_and_on_from_the_first_leecher(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stores = [ContentStore(tmp_path / str(i)) for i in range(4)]
    source = item(tmp_path)
    ref = stores[0].add(source, piece_length=1 << 16)
    assert stores[1].add(source, piece_length=1 << 16) == ref
    with trio.fail_after(60):
        async with swarm_of(3, stores[2]) as first:
            async with swarm_of(1, stores[0]) as a, swarm_of(2, stores[1]) as b:
                await first.fetch(ref, peers=[as_peer(a.addresses), as_peer(b.addresses)])
                assert a.rates().up_bytes + b.rates().up_bytes >= ref.length
            async with swarm_of(4, stores[3]) as second:
                path = await second.fetch(ref, peers=[as_peer(first.addresses)])
                assert await fetched_again(second, ref.info_hash, stores[3]) == path
    assert stores[2].verify(ref.info_hash) == stores[3].verify(ref.info_hash) == []
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("paris")]


async def fetched_again(swarm: Swarm, info_hash: InfoHash, store: ContentStore) -> Path:
    return await swarm.fetch(store.ref(info_hash))


async def test_strangers_bytes_do_not_end_the_node(tmp_path: Path) -> None:
    store, mine = ContentStore(tmp_path / "seed"), ContentStore(tmp_path / "mine")
    ref = store.add(item(tmp_path, 200_000))
    with trio.fail_after(60):
        async with swarm_of(1, store) as seeder:
            port = int(seeder.addresses[0].split("/")[4])
            for garbage in (
                b"GET / HTTP/1.0\r\n\r\n",
                b"\x13/multistream/1.0.0\n\x07/noise\n" + b"\xff" * 500,
            ):
                stranger = await trio.open_tcp_stream("127.0.0.1", port)
                await stranger.send_all(garbage)
                await stranger.aclose()
            async with open_host(identity(2), LOOPBACK) as known:
                # a real libp2p peer: garbage in the protocol, an unknown protocol, a reset mid-way
                stream = await known.dial(as_peer(seeder.addresses))
                await stream.send_all(b"\xff" * 1000)
                await stream.aclose()
                network = known._network
                raw = await network.new_stream(next(iter(network.connections)))
                await raw.write(b"\x05junk\n")
                await raw.reset()
            async with swarm_of(3, mine) as leecher:
                await leecher.fetch(ref, peers=[as_peer(seeder.addresses)])
    assert mine.verify(ref.info_hash) == []
