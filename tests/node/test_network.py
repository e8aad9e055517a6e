"""Tests of `paris_node.network`."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from paris_node import network
from paris_node.network import (
    DEFAULT_LISTEN,
    NetworkRequest,
    bootstrap_addresses,
    check_announce,
    check_listen,
    dht_listen,
    open_network,
    swarm_listen,
    with_near,
)
from paris_p2p.errors import ConfigError, TransportError
from paris_p2p.ids import InfoHash, NodeId
from paris_p2p.net import mdns
from paris_p2p.net.addresses import Endpoint
from paris_p2p.net.limits import SwarmLimits
from paris_p2p.net.transport import Peer
from paris_p2p.store.home import Home
from paris_p2p.wire.identity import Identity, peer_id_text
from paris_p2p.wire.records import MAX_ADDRESS_CHARS

ADDRESS = "/ip4/127.0.0.1/tcp/31337/p2p/12D3KooWQnByPadJ5abWho32XSazmCaVAGxmcANRuX78E6dJERNq"


def request(bootstrap: list[str] | None) -> NetworkRequest:
    return NetworkRequest(None, bootstrap, None, None, None)


def test_the_bootstrap_addresses_given_go_before_the_remembered_ones(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.remember(bootstrap=["/remembered"])
    assert bootstrap_addresses(request([ADDRESS]), home) == (ADDRESS,)
    assert bootstrap_addresses(request(None), home) == ("/remembered",)


def test_without_any_bootstrap_address_the_error_says_how_to_give_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--bootstrap .*/p2p/"):
        bootstrap_addresses(request(None), Home(tmp_path))


@pytest.mark.parametrize("address", [*DEFAULT_LISTEN, "/ip4/127.0.0.1/tcp/4001", "/ip6/::/tcp/0"])
def test_listen_addresses_are_ip_and_tcp_port(address: str) -> None:
    assert check_listen([address]) == (address,)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1:4001",
        "ip4/127.0.0.1/tcp/0",
        "/dns4/host/tcp/0",
        "/ip4/127.0.0.1/udp/0",
        "/ip4/127.0.0.1/tcp/65536",
        "/ip4/127.0.0.1/tcp/-1",
        "/ip4/127.0.0.1/tcp/²",
        "/ip4/127.0.0.1/tcp/" + "9" * 5000,
        "/ip4/127.0.0.1/tcp/4001/p2p/x",
        "/ip4/127.0.0.1/tcp/4001/p2p/x/tls",
        "/ip4/127.0.0.1/tcp/4001/tls/tls",
        "/tls",
    ],
)
def test_anything_else_is_refused_by_name(address: str) -> None:
    with pytest.raises(ConfigError):
        check_listen([address])


def test_the_dht_listens_on_the_same_interfaces_at_ports_of_its_own() -> None:
    listen = ["/ip4/127.0.0.1/tcp/4001", "/ip4/127.0.0.1/tcp/4002", "/ip6/::1/tcp/0"]
    assert dht_listen(listen) == ("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0")


def test_who_asks_for_libp2p_alone_is_reached_by_tls_on_the_same_interfaces_too() -> None:
    libp2p = ("/ip4/127.0.0.1/tcp/4001", "/ip6/::1/tcp/0")
    both = ("/ip4/127.0.0.1/tcp/0/tls", "/ip6/::1/tcp/0/tls", *libp2p)
    assert swarm_listen(libp2p, ()) == both
    assert swarm_listen(both, ()) == both


def test_a_port_that_nobody_is_told_of_is_not_listened_on() -> None:
    libp2p = ("/ip4/127.0.0.1/tcp/4001",)
    assert swarm_listen(libp2p, ("/ip4/203.0.113.5/tcp/4001",)) == libp2p


def test_an_announced_address_fits_a_record_with_its_peer_id() -> None:
    peer = peer_id_text(Identity(b"x" * 32).node_id)
    room = MAX_ADDRESS_CHARS - len(f"/p2p/{peer}")
    name = "h" * (room - len("/dns4//tcp/4001"))
    assert check_announce([f"/dns4/{name}/tcp/4001"]) == (f"/dns4/{name}/tcp/4001",)
    with pytest.raises(ConfigError, match=f"at most {room} characters"):
        check_announce([f"/dns4/{name}h/tcp/4001"])


@pytest.mark.parametrize("address", ["host:4001", "/ip4/1.2.3.4/tcp/0", ADDRESS])
def test_what_nobody_can_dial_is_not_announced(address: str) -> None:
    with pytest.raises(ConfigError):
        check_announce([address])


FAR, NEAR = Peer(NodeId(b"f" * 32), ("/far",)), Peer(NodeId(b"n" * 32), ("/near",))
ITEM = InfoHash(bytes(32))


async def far(_info_hash: InfoHash) -> Sequence[Peer]:
    return [FAR]


async def away(_info_hash: InfoHash) -> Sequence[Peer]:
    raise TransportError("the DHT does not answer")


async def silent(_info_hash: InfoHash) -> Sequence[Peer]:
    await trio.sleep_forever()


@pytest.mark.parametrize(
    ("finder", "near", "found"),
    [
        (far, [NEAR], [FAR, NEAR]),
        (far, [], [FAR]),
        (away, [NEAR], [NEAR]),
        (silent, [NEAR], [NEAR]),
    ],
)
async def test_nodes_near_by_are_asked_beside_those_the_dht_names_and_without_it(
    autojump_clock: Any, finder: Any, near: list[Peer], found: list[Peer]
) -> None:
    with trio.fail_after(20):
        assert await with_near(finder, lambda: near)(ITEM) == found


async def test_with_nobody_near_by_it_is_said_that_the_dht_is_away() -> None:
    with pytest.raises(TransportError, match="does not answer"):
        await with_near(away, list)(ITEM)


@pytest.mark.parametrize("lan", [True, False])
async def test_the_local_network_is_searched_only_when_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lan: bool
) -> None:
    """The DHT, the swarm and multicast stand still; what connects them is real."""
    asked: list[Any] = []

    class Standing:
        addresses = ("/ip4/127.0.0.1/tcp/4001/tls/p2p/me",)

        async def read(self, _kind: str, _scope: bytes) -> list[Any]:
            return []

        def prefer(self, whom: Any) -> None:
            del whom

    @asynccontextmanager
    async def opened(*_arguments: Any, **options: Any) -> AsyncIterator[Standing]:
        asked.append(options)
        yield Standing()

    @asynccontextmanager
    async def near(node_id: NodeId, addresses: Any, *, interfaces: Any) -> AsyncIterator[mdns.Lan]:
        asked.append((node_id, addresses, interfaces))
        heard = mdns.Lan(node_id)
        peer = peer_id_text(other := Identity(b"y" * 32).node_id)
        text = f"/ip4/192.0.2.1/tcp/4001/tls/p2p/{peer}"
        heard.heard(f"{peer}.{mdns.SERVICE}", {b"a0": text.encode()})
        assert heard.peers() == [Peer(other, (text,))]
        yield heard

    for name in ("open_dht", "open_swarm"):
        monkeypatch.setattr(network, name, opened)
    monkeypatch.setattr(mdns, "open_lan", near)
    limits = SwarmLimits(per_peer_up_bytes_per_s=1000)
    given = NetworkRequest(tmp_path, [ADDRESS], ["/ip4/127.0.0.1/tcp/0/tls"], None, None, limits, lan=lan)
    me = Identity(b"x" * 32)
    async with open_network(given, home=Home(tmp_path), identity=me, bootstrap=(ADDRESS,)):
        found = await asked[1]["find_peers"](ITEM)
    assert len(found) == int(lan) and asked[1]["limits"] == limits
    assert asked[2:] == ([(me.node_id, Standing.addresses, ("127.0.0.1",))] if lan else [])


async def test_helpers_are_believed_where_the_bootstrap_nodes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = ADDRESS.rsplit("/p2p/", 1)[1]

    async def look_up(host: str, port: None, family: int, kind: int) -> list[Any]:
        if host == "unknown.example":
            raise OSError("no such name")
        return [(family, kind, 6, "", ("198.51.100.7", 0)), (family, kind, 6, "", ("198.51.100.7", 0))]

    monkeypatch.setattr(trio.socket, "getaddrinfo", look_up)
    named = [
        f"/{host}/{port}/p2p/{peer}"
        for host, port in (
            ("ip4/192.0.2.1", "tcp/31337"),
            ("ip6/2001:db8:0::1", "tcp/31337"),
            ("dns4/boot.example", "tcp/4000"),
            ("dns/unknown.example", "tcp/4000"),
            ("ip4/192.0.2.2", "udp/31337"),
            ("ip4/192.0.2.3", "tcp/65535"),
        )
    ]
    assert await network.bootstrap_helpers(named) == [
        Endpoint("192.0.2.1", 31338, tls=True),
        Endpoint("2001:db8::1", 31338, tls=True),
        Endpoint("198.51.100.7", 4001, tls=True),
    ]
