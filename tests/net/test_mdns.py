"""Tests of `paris_p2p.net.mdns`: what is said and believed; and once over loopback, with real multicast."""

import gc
import socket

import pytest
import trio
from zeroconf import ServiceInfo, Zeroconf

from paris_p2p.ids import NodeId
from paris_p2p.net.mdns import MAX_NODES, SERVICE, Lan, announcement, open_lan, read_announcement
from paris_p2p.net.transport import Peer
from paris_p2p.wire.identity import peer_id_text

NEAR_S = 120.0


def node(number: int) -> NodeId:
    return NodeId(number.to_bytes(2, "big") * 16)


def address(node_id: NodeId, head: str = "/ip4/192.0.2.1/tcp/4001/tls") -> str:
    return f"{head}/p2p/{peer_id_text(node_id)}"


def name(node_id: NodeId) -> str:
    return f"{peer_id_text(node_id)}.{SERVICE}"


def record(*texts: str) -> dict[bytes, bytes | None]:
    return {key.encode(): value.encode() for key, value in announcement(texts).items()}


def test_what_is_announced_is_heard() -> None:
    texts = (address(node(1)), address(node(1), "/ip6/2001:db8::1/tcp/7"))
    assert read_announcement(name(node(1)), record(*texts)) == Peer(node(1), texts)


def test_an_announcement_says_nothing_but_addresses_and_only_as_many_as_fit() -> None:
    texts = [address(node(1), f"/ip4/192.0.2.{number}/tcp/1") for number in range(9)]
    assert list(announcement([*texts, "/ip4/" + "9" * 300]).values()) == texts[:4]


@pytest.mark.parametrize(
    ("instance", "properties"),
    [
        (f"printer.{SERVICE}", record(address(node(1)))),
        (name(node(1)), {}),
        (name(node(1)), record(address(node(2)))),
        (name(node(1)), record(address(node(1), "/dns4/example.org/tcp/1"))),
        (name(node(1)), {b"a0": b"\xff\xfe", b"a1": None}),
        (name(node(1)), {b"a0": b"/ip4/192.0.2.1/tcp/1" + b"0" * 300}),
    ],
)
def test_what_names_no_node_and_address_is_ignored(
    instance: str, properties: dict[bytes, bytes | None]
) -> None:
    assert read_announcement(instance, properties) is None


def test_a_node_knows_others_but_not_itself_and_not_too_many() -> None:
    lan = Lan(node(0))
    for number in range(MAX_NODES + 5):
        lan.heard(name(node(number)), record(address(node(number))))
    peers = {peer.node_id for peer in lan.peers()}
    assert len(peers) == MAX_NODES and node(0) not in peers
    lan.gone(name(node(1)))
    lan.gone("nonsense")
    assert len(lan.peers()) == MAX_NODES - 1


async def test_nodes_on_one_network_hear_each_other_and_their_goodbyes() -> None:
    loopback, one, two = ["127.0.0.1"], node(1), node(2)
    texts = {n: [address(n, "/ip4/127.0.0.1/tcp/9/tls")] for n in (one, two)}
    async with open_lan(one, texts[one], interfaces=loopback) as first:
        async with open_lan(two, texts[two], interfaces=loopback) as second:
            assert await second.first(NEAR_S) == [Peer(one, tuple(texts[one]))]
            assert await first.first(NEAR_S) == [Peer(two, tuple(texts[two]))]
        with trio.fail_after(NEAR_S):
            while first.peers():
                await trio.sleep(0.05)


async def test_a_stranger_with_our_name_neither_silences_nor_ends_us() -> None:
    loopback, one, two = ["127.0.0.1"], node(1), node(2)
    texts = {n: [address(n, "/ip4/127.0.0.1/tcp/9/tls")] for n in (one, two)}
    stranger = await trio.to_thread.run_sync(lambda: Zeroconf(interfaces=loopback))
    info = ServiceInfo(SERVICE, name(one), port=9, parsed_addresses=["127.0.0.1"], server="evil.local.")
    try:
        await trio.to_thread.run_sync(stranger.register_service, info)
        async with (
            open_lan(one, texts[one], interfaces=loopback) as first,
            open_lan(two, texts[two], interfaces=loopback),
        ):
            assert await first.first(NEAR_S) == [Peer(two, tuple(texts[two]))]
    finally:
        await trio.to_thread.run_sync(stranger.close)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # zeroconf leaves it open
async def test_a_network_without_multicast_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with open_lan(node(1), [], interfaces=["192.0.2.77"]) as lan:
        with trio.fail_after(NEAR_S):
            while not caplog.records:
                await trio.sleep(0.05)
        assert lan.peers() == [] and "cannot be searched" in caplog.text
    assert not [s for s in gc.get_objects() if type(s) is socket.socket and s.fileno() >= 0 and is_ours(s)]


def is_ours(sock: socket.socket) -> bool:
    return sock.type == socket.SOCK_DGRAM and sock.getsockname()[1] == 5353
