"""Multiaddrs as users type them: checked before anything starts, with an example of a right one.

Owns: the form of bootstrap, listen and announce addresses. Does not own: whether anyone answers there.
"""

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import base58

from paris_p2p.errors import ConfigError

EXAMPLE = "/ip4/203.0.113.5/tcp/31337/p2p/12D3KooWMbbPVGsZYh3ChQjue712NHHGNybRRXwnuSpezYjGbCDS"
LISTEN_EXAMPLE = "/ip4/0.0.0.0/tcp/31337"
MAX_ADDRESS_CHARS = 512

_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6", "dnsaddr")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")
_PEER_ID_PREFIXES = (b"\x12\x20", b"\x00\x24\x08\x01\x12\x20")  # SHA-256 of a key; an Ed25519 key itself


@dataclass(frozen=True, slots=True)
class HostPort:
    """The dialled part of a multiaddr. `host_kind`: `ip4`, `ip6`, `dns…`; `transport`: `tcp` or `udp`."""

    host_kind: str
    host: str
    transport: str
    port: int


def check_bootstrap(address: str) -> str:
    """`address`, if it has the form of a bootstrap address; else `ConfigError` with an example."""
    try:
        parts = _parts(address)
        if parts[0] != "dnsaddr":  # a dnsaddr name stands for whole addresses
            _host_port(parts, lowest_port=1)
        if len(parts) < 4 or parts[-2] != "p2p":
            raise ValueError("it does not end in /p2p/ and the bootstrap node's peer id")
        _check_peer_id(parts[-1])
    except ValueError as error:
        raise ConfigError(
            f"{address[:MAX_ADDRESS_CHARS]!r} is no bootstrap address: {error}. One looks like {EXAMPLE} "
            "(the line that paris-bootstrap prints)"
        ) from None
    return address


def check_listen(address: str) -> str:
    """`address`, if one can listen there (IP address, TCP, any port); else `ConfigError` with an example."""
    try:
        parts = _parts(address)
        if _host_port(parts, lowest_port=0).host_kind not in ("ip4", "ip6") or parts[2] != "tcp":
            raise ValueError("an IP address and a TCP port are expected")
        if len(parts) > 4:
            raise ValueError(f"nothing may follow the port, not /{parts[4]}")
    except ValueError as error:
        raise ConfigError(
            f"{address!r} is no listen address: {error}. One looks like {LISTEN_EXAMPLE}"
        ) from None
    return address


def check_announce(address: str) -> str:
    """`address`, if others can be told to dial it (host, TCP or UDP, a port); else `ConfigError`."""
    try:
        parts = _parts(address)
        _host_port(parts, lowest_port=1)
        if "p2p" in parts[4:]:
            raise ValueError("leave out /p2p/…, it is added")
    except ValueError as error:
        example = "/".join(EXAMPLE.split("/")[:5])
        raise ConfigError(f"{address!r} cannot be announced: {error}. One looks like {example}") from None
    return address


def host_port(address: str) -> HostPort | None:
    """The host and port of a multiaddr, or None when it does not begin with them."""
    try:
        return _host_port(_parts(address), lowest_port=0)
    except ValueError:
        return None


def family(address: str) -> str:
    """The kind of a multiaddr's host (`ip4`, `ip6`, …), empty when it does not begin with one."""
    place = host_port(address)
    return place.host_kind if place is not None else ""


def peer_id(address: str) -> str:
    """The peer id that a checked bootstrap address ends in."""
    return address.rsplit("/p2p/", 1)[1]


def _parts(address: str) -> list[str]:
    if not address.startswith("/") or len(address) > MAX_ADDRESS_CHARS or not address.isprintable():
        raise ValueError("a multiaddr starts with / and is one short line")
    return address[1:].split("/")


def _host_port(parts: list[str], *, lowest_port: int) -> HostPort:
    if len(parts) < 4 or parts[0] not in _HOSTS or parts[2] not in ("tcp", "udp"):
        raise ValueError("it does not begin with a host and a port, as in /ip4/203.0.113.5/tcp/31337")
    kind, host, transport, port = parts[:4]
    if kind == "ip4":
        ipaddress.IPv4Address(host)
    elif kind == "ip6":
        ipaddress.IPv6Address(host)
    elif not _NAME.fullmatch(host):
        raise ValueError(f"{host!r} is no host name")
    if not port.isascii() or not port.isdecimal() or not lowest_port <= int(port) <= 65_535:
        raise ValueError(f"{port!r} is no port from {lowest_port} to 65535")
    return HostPort(kind, host, transport, int(port))


def _check_peer_id(text: str) -> None:
    try:
        raw = base58.b58decode(text)
    except ValueError:
        raw = b""
    if not any(raw.startswith(prefix) and len(raw) == len(prefix) + 32 for prefix in _PEER_ID_PREFIXES):
        raise ValueError(f"{text!r} is no peer id (one starts with 12D3Koo); is the address cut off?")


def fixed_listen(listen: Sequence[str], addresses: Iterable[str]) -> tuple[str, ...]:
    """`listen` with port 0 replaced by the port that the dialable `addresses` show: who starts again keeps
    its addresses. As it is where two are of one family: whose port is which is not known."""
    if len({family(address) for address in listen}) < len(listen):
        return tuple(listen)
    places = map(host_port, addresses)
    ports = {
        place.host_kind: place.port for place in places if place is not None and place.transport == "tcp"
    }
    return tuple(
        f"{address.removesuffix('/tcp/0')}/tcp/{ports.get(family(address), 0)}"
        if address.endswith("/tcp/0")
        else address
        for address in listen
    )
