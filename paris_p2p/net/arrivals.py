"""Where inbound connections came from lately: the only proof of being dialable that needs nobody's word.

Owns: remembering places, telling the world outside from the networks we may share a router with. Does not
own: accepting (`net.tls`), what follows (`net.reachability`).
"""

import ipaddress
from collections import OrderedDict
from collections.abc import Iterable

from paris_p2p.net.addresses import place

MAX_PLACES = 64
_INNER = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16")
) + tuple(ipaddress.ip_network(text) for text in ("127.0.0.0/8", "fc00::/7", "fe80::/10", "::1/128"))
"""Whoever comes from there may have come without passing a router of ours."""
SITE_BITS = 48
"""Of IPv6 addresses: a home or a company mostly has all that begin so."""


def site(host: str) -> str:
    """As `net.addresses.place`, for IPv6 the whole /48: somebody's networks rather than one of them."""
    where = place(host)
    if ":" not in where:
        return where
    return str(ipaddress.ip_network((where.split("/", 1)[0], SITE_BITS), strict=False))


class Arrivals:
    """The sites that inbound connections came from, and when last; the latest `MAX_PLACES`."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, float] = OrderedDict()

    def note(self, host: str, now: float) -> None:
        """Somebody at the IP address `host` has connected to a port that we listen on."""
        where = site(host.split("%", 1)[0].removeprefix("::ffff:"))
        self._seen.pop(where, None)
        self._seen[where] = now
        if len(self._seen) > MAX_PLACES:
            self._seen.popitem(last=False)

    def came(self, host: str, since: float) -> bool:
        """Whether anybody came from where `host` is."""
        return self._seen.get(site(host), -1.0) >= since

    def outside(self, own: Iterable[str], since: float, *, ipv6: bool) -> bool:
        """Whether anybody came by that family from the world outside: from no private network, and not from
        where our `own` addresses are."""
        ours = {site(host) for host in own}
        return any(
            (":" in where) == ipv6 and where not in ours and not _is_inner(where)
            for where, then in self._seen.items()
            if where and then > since
        )


def _is_inner(where: str) -> bool:
    network = ipaddress.ip_network(where)
    return any(network.version == inner.version and network.subnet_of(inner) for inner in _INNER)  # type: ignore[arg-type]
