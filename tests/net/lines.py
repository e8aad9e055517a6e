"""Connections between nodes of one process that look like TCP and deliver at once, so that virtual time can
jump whenever nothing is to be read: on loopback a packet may be on its way for a while.

Owns: the connections. Does not own: hosts; each says at which port it is reached.
"""

import itertools
import socket
from collections.abc import Callable
from typing import Any

import pytest

from paris_p2p.errors import TransportError
from paris_p2p.net import circuits, raw, tls
from paris_p2p.net.addresses import Endpoint

Arrived = Callable[[socket.socket], None]


class Line(socket.socket):
    """One end of a socket pair that says it is a TCP connection."""

    here = there = ("127.0.0.1", 0)

    def getsockname(self) -> Any:
        return self.here

    def getpeername(self) -> Any:
        return self.there

    def setsockopt(self, *_: Any) -> None:
        """TCP's options mean nothing here."""


class Lines:
    """Who is reached at which port: `Arrived` gets the far end of each connection."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ports: dict[int, Arrived] = {}
        self._free = itertools.count(50_000)
        for module in (circuits, raw, tls):
            patch.setattr(module, "connect", self.connect)

    async def connect(self, endpoint: Endpoint, _: float, local: tuple[str, int] | None = None) -> Line:
        """Stands in for `raw.connect`."""
        arrived = self.ports.get(endpoint.port)
        if arrived is None:
            raise TransportError("Connection refused")
        ours, theirs = (Line(fileno=end.detach()) for end in socket.socketpair())
        ours.setblocking(False)
        theirs.setblocking(False)
        ours.there = theirs.here = (endpoint.host, endpoint.port)
        ours.here = theirs.there = (local[0] if local else "127.0.0.1", next(self._free))
        arrived(theirs)
        return ours
