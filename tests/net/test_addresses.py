"""Addresses: what can be dialled and listened on, and which are told to others."""

import errno
import os
import re
import socket

import pytest

from paris_p2p.errors import ConfigError, NetworkError
from paris_p2p.net.addresses import (
    Endpoint,
    bind,
    cannot_listen,
    chosen,
    dialable,
    is_tls,
    listen_endpoint,
    parse_endpoint,
    place,
    probe,
)


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("/ip4/192.0.2.1/tcp/4001", Endpoint("192.0.2.1", 4001, False)),
        ("/ip4/192.0.2.1/tcp/4001/tls", Endpoint("192.0.2.1", 4001, True)),
        ("/ip4/192.0.2.1/tcp/4001/tls/p2p/12D3KooWabc", Endpoint("192.0.2.1", 4001, True)),
        ("/ip6/2001:db8::1/tcp/0/tls", Endpoint("2001:db8::1", 0, True)),
    ],
)
def test_endpoints_are_read(text: str, endpoint: Endpoint) -> None:
    assert parse_endpoint(text) == endpoint
    assert parse_endpoint(endpoint.text("12D3KooWabc")) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "/ip4/192.0.2.1/udp/4001",
        "/ip4/192.0.2.1/tcp/4001/ws",
        "/ip4/192.0.2.1/tcp/65536",
        "/ip4/192.0.2.1/tcp/-1",
        "/ip4/192.0.2.1/tcp/٤",
        "/ip4/2001:db8::1/tcp/1",
        "/ip6/fe80::1%eth0/tcp/1",
        "/dns4/example.org/tcp/1/tls",
        "/ip4/192.0.2.1/tcp/1/tls/tls",
        "x/ip4/192.0.2.1/tcp/1",
    ],
)
def test_other_forms_are_not(text: str) -> None:
    assert parse_endpoint(text) is None and not is_tls(text)
    with pytest.raises(ConfigError):
        listen_endpoint(text)


def test_nobody_listens_as_somebody_else() -> None:
    with pytest.raises(ConfigError):
        listen_endpoint("/ip4/127.0.0.1/tcp/0/p2p/12D3KooWabc")


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EADDRNOTAVAIL, "no network interface here has that address: .*/ip4/0.0.0.0/"),
        (errno.EACCES, "ports below 1024 need privileges, choose a higher one"),
        (errno.EAFNOSUPPORT, "no IPv6: listen on an /ip4/"),
        (errno.ENOBUFS, "choose another address with --listen"),
    ],
)
def test_why_a_socket_is_refused_comes_with_what_to_do(code: int, remedy: str) -> None:
    said = str(cannot_listen(Endpoint("192.0.2.1", 4001, True), OSError(code, os.strerror(code))))
    assert re.search(f"cannot listen on /ip4/192.0.2.1/tcp/4001/tls: .*{remedy}", said)


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken, socket.socket() as second:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = Endpoint("127.0.0.1", taken.getsockname()[1], True)
        with pytest.raises(NetworkError, match=f"port {endpoint.port} is taken .*--listen"):
            bind(second, endpoint)
        with pytest.raises(NetworkError, match="is taken by another program"):
            probe(endpoint)


def test_all_interfaces_are_named_one_by_one_with_loopback_last() -> None:
    found = dialable([Endpoint("0.0.0.0", 7, True), Endpoint("127.0.0.1", 7, True)])
    assert found[-1] == Endpoint("127.0.0.1", 7, True) and len(found) == len(set(found))
    assert all(endpoint.host != "0.0.0.0" for endpoint in found)


def test_tls_comes_first_and_one_of_libp2p_stays() -> None:
    tls, libp2p = ["t1", "t2", "t3", "t4"], ["l1", "l2"]
    assert chosen(tls, libp2p, 3) == ("t1", "t2", "l1")
    assert chosen(tls, [], 3) == ("t1", "t2", "t3")
    assert chosen(tls[:1], libp2p, 3) == ("t1", "l1", "l2")
    assert chosen([], libp2p, 3) == ("l1", "l2")


def test_a_place_is_the_network_of_an_address_and_this_machine_is_none() -> None:
    assert place("192.0.2.7") == place("192.0.2.200") == place("::ffff:192.0.2.1") != place("192.0.3.7")
    assert place("2001:db8::1") == place("2001:db8::ffff:1") != place("2001:db8:0:1::1")
    assert place("127.0.0.1") == place("::1") == place("nowhere") == ""
