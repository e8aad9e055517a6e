"""Addresses: right ones pass unchanged, wrong ones are named with an example."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.dht.addresses import EXAMPLE, check_announce, check_bootstrap, check_listen, host_port, peer_id
from paris_p2p.errors import ConfigError

PEER = peer_id(EXAMPLE)


@pytest.mark.parametrize(
    "address",
    [
        EXAMPLE,
        f"/ip6/::1/tcp/1/p2p/{PEER}",
        f"/dns4/boot.example.org/tcp/31337/p2p/{PEER}",
        f"/dnsaddr/boot.example.org/p2p/{PEER}",
        f"/ip4/1.2.3.4/udp/4001/quic-v1/p2p/{PEER}",
        "/ip4/1.2.3.4/tcp/4001/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
    ],
)
def test_a_bootstrap_address_passes_unchanged(address: str) -> None:
    assert check_bootstrap(address) == address


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("", "starts with /"),
        ("127.0.0.1:31337", "starts with /"),
        ("/ip4/127.0.0.1/tcp/31337", "does not end in /p2p/"),
        (f"/ip4/127.0.0.1/tcp/31337/p2p/{PEER[:-3]}", "cut off"),
        (f"/ip4/127.0.0.1/tcp/31337/p2p/{PEER}/", "does not end in /p2p/"),
        (f"/ip4/127.0.0.300/tcp/31337/p2p/{PEER}", "127.0.0.300"),
        (f"/ip4/127.0.0.1/tcp/0/p2p/{PEER}", "port"),
        (f"/ip4/127.0.0.1/tcp/99999/p2p/{PEER}", "port"),
        (f"/ip4/127.0.0.1/p2p/{PEER}", "host and a port"),
        (f"/dns4/-bad-/tcp/1/p2p/{PEER}", "no host name"),
    ],
)
def test_a_wrong_bootstrap_address_is_named_with_an_example(address: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_bootstrap(address)
    assert reason in str(caught.value) and EXAMPLE in str(caught.value)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["ip4", "1.2.3.4", "tcp", "80", "p2p", PEER, "", "ü", "\n"])).map("/".join))
def test_any_text_is_an_address_or_a_config_error(text: str) -> None:
    for check in (check_bootstrap, check_listen, check_announce):
        try:
            assert check("/" + text) == "/" + text
        except ConfigError:
            continue


def test_listen_and_announce_addresses_are_checked_too() -> None:
    assert check_listen("/ip4/0.0.0.0/tcp/0") == "/ip4/0.0.0.0/tcp/0"
    assert check_announce("/dns4/a.example.org/tcp/5") == "/dns4/a.example.org/tcp/5"
    for wrong in ("/dns4/a.example.org/tcp/5", "/ip4/0.0.0.0/udp/5", EXAMPLE, "0.0.0.0"):
        with pytest.raises(ConfigError, match="listen"):
            check_listen(wrong)
    for wrong in ("/ip4/1.2.3.4/tcp/0", EXAMPLE):
        with pytest.raises(ConfigError, match="announced"):
            check_announce(wrong)


def test_the_dialled_part_is_read() -> None:
    place = host_port(EXAMPLE)
    assert place is not None and (place.host, place.port) == ("203.0.113.5", 31337)
    assert host_port("nonsense") is None
