"""How many addresses of a node are told to others, and how long one may be.

By themselves, because who only moves bytes needs these and nothing else of the records.
"""

from collections.abc import Iterable

MAX_ADDRESSES = 3
MAX_ADDRESS_CHARS = 127
"""The longest that a node makes of itself: a circuit over a relay with an IPv6 address written out (`/ip6/`,
39 characters, `/tcp/65535/tls/p2p-circuit/p2p/`, 52 of a peer id); by direct TLS 115, by libp2p 111."""
MAX_ANNOUNCED_CHARS = 336
"""All addresses of an announcement together: beside the longest statement no more fit a record."""
ACCESS_CHARS = 112
"""So many fewer beside an organiser's pass."""


def fitting(
    addresses: Iterable[str], count: int = MAX_ADDRESSES, chars: int = MAX_ADDRESSES * MAX_ADDRESS_CHARS
) -> tuple[str, ...]:
    """The first `count` that are not too long by themselves and, together, no longer than `chars`."""
    found: list[str] = []
    for text in addresses:
        if len(text) <= min(MAX_ADDRESS_CHARS, chars) and len(found) < count:
            found.append(text)
            chars -= len(text)
    return tuple(found)
