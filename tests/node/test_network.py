"""Tests of `paris_node.network`."""

from pathlib import Path

import pytest

from paris_node.network import (
    DEFAULT_LISTEN,
    NetworkRequest,
    bootstrap_addresses,
    check_announce,
    check_listen,
    dht_listen,
    swarm_listen,
)
from paris_p2p.errors import ConfigError
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
