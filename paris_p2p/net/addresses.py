"""Addresses of nodes as multiaddr text, as far as this package itself dials and listens on them.

Owns: the forms `/ip4|ip6/HOST/tcp/PORT[/tls][/p2p/PEER]`, what "all interfaces" stands for, which addresses
are told to others. Does not own: other multiaddrs, which only libp2p can dial (`net.host`).
"""

import errno
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from paris_p2p.errors import ConfigError, NetworkError

_NOT_PERMITTED = "this user may not listen there: ports below 1024 need privileges, choose a higher one"
_NO_SUCH_FAMILY = "this machine has no IPv6: listen on an /ip4/… address"
_REFUSALS = {
    errno.EADDRNOTAVAIL: "no network interface here has that address: listen on one that this machine has, "
    "or on all, /ip4/0.0.0.0/…",
    errno.EACCES: _NOT_PERMITTED,
    errno.EPERM: _NOT_PERMITTED,
    errno.EAFNOSUPPORT: _NO_SUCH_FAMILY,
    errno.EPROTONOSUPPORT: _NO_SUCH_FAMILY,
}
"""What the system's refusals to listen mean, and what to do."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A TCP endpoint; `tls`: spoken to by TLS directly, else by libp2p. `host` is a plain IP address."""

    host: str
    port: int
    tls: bool

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    def text(self, peer_id: str | None = None) -> str:
        """The multiaddr."""
        kind = "ip6" if ":" in self.host else "ip4"
        tail = f"/p2p/{peer_id}" if peer_id else ""
        return f"/{kind}/{self.host}/tcp/{self.port}{'/tls' if self.tls else ''}{tail}"


def parse_endpoint(text: str) -> Endpoint | None:
    """The endpoint that a multiaddr names, `/p2p/…` ignored; None when it is of another form."""
    parts = text.split("/p2p/", 1)[0].split("/")
    tls = len(parts) == 6 and parts[5] == "tls"
    if not (len(parts) == 5 or tls) or parts[0] or parts[3] != "tcp" or not parts[4].isascii():
        return None
    if not parts[4].isdigit() or len(parts[4]) > 5 or int(parts[4]) > 65_535:
        return None
    try:
        host = ipaddress.ip_address(parts[2])
    except ValueError:
        return None
    if parts[1] != f"ip{host.version}" or "%" in parts[2]:
        return None
    return Endpoint(str(host), int(parts[4]), tls)


def place(host: str) -> str:
    """The network that an IP address is in, as far as one operator mostly has all of it: /24, /64. "" for
    this machine itself, and for what is no address."""
    try:
        address = ipaddress.ip_address(host.split("%", 1)[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback:
        return ""
    return str(ipaddress.ip_network((address, 24 if address.version == 4 else 64), strict=False))


def place_of(sock: socket.socket) -> str:
    """The same of the peer that `sock` is connected to."""
    try:
        return place(sock.getpeername()[0])
    except (OSError, IndexError):
        return ""


def is_tls(text: str) -> bool:
    """Whether a multiaddr is dialled by TLS directly."""
    endpoint = parse_endpoint(text)
    return endpoint is not None and endpoint.tls


def is_loopback(text: str) -> bool:
    """Whether a multiaddr leads to the machine itself."""
    endpoint = parse_endpoint(text)
    return endpoint is not None and ipaddress.ip_address(endpoint.host).is_loopback


def listen_endpoint(text: str) -> Endpoint:
    """The endpoint to listen on. Raises `ConfigError` when it is none."""
    endpoint = parse_endpoint(text)
    if endpoint is None or "/p2p/" in text:
        raise ConfigError(
            f"{text!r} is not a multiaddr that can be listened on: only /ip4/ADDRESS/tcp/PORT and "
            "/ip6/ADDRESS/tcp/PORT, each also with /tls"
        )
    return endpoint


def probe(endpoint: Endpoint) -> None:
    """Whether the port is free, for servers that would share it. Raises `NetworkError`."""
    with open_socket(endpoint) as sock:
        bind(sock, endpoint)


def open_socket(endpoint: Endpoint) -> socket.socket:
    """A socket to listen with at `endpoint`, where connections just closed do not count. `NetworkError`."""
    try:
        sock = socket.socket(endpoint.family, socket.SOCK_STREAM)
    except OSError as error:
        raise cannot_listen(endpoint, error) from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def bind(sock: socket.socket, endpoint: Endpoint) -> None:
    """Binds `sock`. Raises `NetworkError` that says what is in the way."""
    try:
        sock.bind((endpoint.host, endpoint.port))
    except OSError as error:
        raise cannot_listen(endpoint, error) from None


def cannot_listen(endpoint: Endpoint, error: OSError) -> NetworkError:
    """What the system's refusal to listen there means, and what to do."""
    code = error.errno or 0
    if code == errno.EADDRINUSE:
        why = f"port {endpoint.port} is taken by another program: stop it, or choose another with --listen"
    else:
        why = _REFUSALS.get(code, f"{error.strerror or error}: choose another address with --listen")
    return NetworkError(f"cannot listen on {endpoint.text()}: {why}")


_last_seen: dict[socket.AddressFamily, list[str]] = {}  # our interfaces' addresses


def expand(endpoint: Endpoint) -> list[Endpoint]:
    """The endpoint itself, or one per interface when it means all of them; as last seen when the system does
    not tell now, which takes a file that cannot always be opened."""
    if not ipaddress.ip_address(endpoint.host).is_unspecified:
        return [endpoint]
    import psutil  # its import takes as long as dialling: only who listens everywhere pays for it

    wanted = endpoint.family
    try:
        found = [a.address for nic in psutil.net_if_addrs().values() for a in nic if a.family == wanted]
    except OSError:
        found = _last_seen.get(wanted, [])
    _last_seen[wanted] = found
    # link-local addresses (fe80::…%eth0) mean nothing to another machine
    return [Endpoint(address, endpoint.port, endpoint.tls) for address in found if "%" not in address]


def dialable(endpoints: Iterable[Endpoint]) -> list[Endpoint]:
    """What others can dial of what is listened on, loopback addresses last."""
    every = dict.fromkeys(found for endpoint in endpoints for found in expand(endpoint))
    return sorted(every, key=lambda endpoint: ipaddress.ip_address(endpoint.host).is_loopback)


def chosen(tls: Sequence[str], libp2p: Sequence[str], limit: int) -> tuple[str, ...]:
    """Which addresses to tell others when only `limit` fit: TLS first, but one of libp2p's if there is
    any, because it is the one that works through more kinds of network."""
    room = limit - 1 if libp2p else limit
    first = list(tls[:room])
    return tuple((first + list(libp2p))[:limit])
