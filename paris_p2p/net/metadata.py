"""Fetching an item's info dictionary and piece layers, chunk by chunk, from one peer at a time.

Owns: which peer is asked, how long it may take, who failed before, the chunks so far. Does not own: checking
the result (`store`), storing it.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import FileIndex, NodeId
from paris_p2p.net.connection import Connection
from paris_p2p.wire import messages as m
from paris_p2p.wire.bep52 import HASH_BYTES, MAX_INFO_BYTES, Layout

GRACE_S = 5.0
MIN_BYTES_PER_S = 64 * 1024
MAX_DOUBLINGS = 6
MAX_FRESH = 64
"""For more strangers than that a fetch of which nothing comes does not outlive its stall timeout."""


@dataclass(slots=True)
class _Fetching:
    connection: Connection
    file: FileIndex | None  # None: the info dictionary
    began: float
    total: int | None = None
    data: bytearray = field(default_factory=bytearray)


class MetadataFetch:
    """Asks one peer at a time for one thing at a time, first those that never failed to deliver."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._current: _Fetching | None = None
        self._without: set[Connection] = set()  # they said they have it not yet
        self._failures: Counter[NodeId] = Counter()  # also of sessions that are over
        self._tried: set[NodeId] = set()  # for what is lacking now

    @property
    def busy(self) -> bool:
        return self._current is not None

    def usable(self, connection: Connection) -> bool:
        return connection not in self._without and connection.usable

    def may_have(self, connection: Connection) -> None:
        """The peer sent a bitfield, so it has the metadata now."""
        self._without.discard(connection)

    def start(self, usable: Sequence[Connection], file: FileIndex | None) -> bool:
        """Asks one of `usable` for the info dictionary (None) or a file's piece layer; by chance, so that the
        peers of a crowd do not all ask the same one. Whether that one was not asked for it before: until all
        were, the fetch has not stalled.
        """
        fewest = min(self._failures[c.node_id] for c in usable)
        chosen = self._rng.choice([c for c in usable if self._failures[c.node_id] == fewest])
        fresh = chosen.node_id not in self._tried and len(self._tried) < MAX_FRESH
        if fresh:
            self._tried.add(chosen.node_id)
        self._current = _Fetching(chosen, file, trio.current_time())
        self._ask(self._current)
        return fresh

    def stored(self) -> None:
        """What came was good: the next thing begins."""
        self._tried.clear()

    def _ask(self, current: _Fetching) -> None:
        session, offset, now = current.connection.session, len(current.data), trio.current_time()
        if current.file is None:
            current.connection.send(session.info_request(offset, now))
        else:
            current.connection.send(session.layer_request(current.file, offset, now))

    def late(self, now: float) -> Connection | None:
        """The peer that is asked, if it delivers too slowly: leave it when there is another one. With each
        failure it may take twice as long, so that of slow peers alone one gets to the end."""
        current = self._current
        if current is None:
            return None
        patience = 2.0 ** min(self._failures[current.connection.node_id], MAX_DOUBLINGS)
        allowed = patience * (GRACE_S + len(current.data) / MIN_BYTES_PER_S)
        return current.connection if now >= current.began + allowed else None

    def forget(self, connection: Connection, *, failed: bool) -> None:
        """The connection is gone. `failed`: no newer one with this peer has replaced it."""
        self._without.discard(connection)
        if self._current is not None and self._current.connection is connection:
            self._current = None
            self._failures[connection.node_id] += failed

    def receive(
        self, connection: Connection, chunk: m.Info | m.Layer, layout: Layout | None
    ) -> tuple[FileIndex | None, bytes] | None:
        """Takes a chunk; returns (file or None, everything) with the last one. `layout`: None before the info
        dictionary is here.

        Raises `RemoteProtocolError` when the chunks do not fit together.
        """
        current = self._current
        if current is None or current.connection is not connection:
            return None
        if chunk.total == 0:
            self._without.add(connection)
            self._failures[connection.node_id] += 1
            self._current = None
            return None
        _check(current, chunk, layout)
        current.total = chunk.total
        current.data += chunk.data
        if len(current.data) < chunk.total:
            self._ask(current)
            return None
        self._current = None
        return current.file, bytes(current.data)


def _check(current: _Fetching, chunk: m.Info | m.Layer, layout: Layout | None) -> None:
    if current.file is None or layout is None:
        fits = chunk.total <= MAX_INFO_BYTES
    else:
        fits = chunk.total == layout.files[current.file].pieces * HASH_BYTES
    if not fits or current.total not in (None, chunk.total):
        raise RemoteProtocolError("the metadata's length is wrong")
    if len(chunk.data) != min(m.MAX_CHUNK_BYTES, chunk.total - chunk.offset):
        raise RemoteProtocolError("a chunk of metadata is too short")
