"""Fetching an item's info dictionary and piece layers, chunk by chunk, from one peer at a time.

Owns: which peer is asked, the chunks so far. Does not own: checking the result (`store`), storing it.
"""

from dataclasses import dataclass, field

import trio

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import FileIndex
from paris_p2p.net.connection import Connection
from paris_p2p.wire import messages as m


@dataclass(slots=True)
class _Fetching:
    connection: Connection
    file: FileIndex | None  # None: the info dictionary
    limit: int
    total: int | None = None
    data: bytearray = field(default_factory=bytearray)


class MetadataFetch:
    """Asks one peer at a time for one thing at a time."""

    def __init__(self) -> None:
        self._current: _Fetching | None = None
        self._without: set[Connection] = set()  # they said they have it not yet

    @property
    def busy(self) -> bool:
        return self._current is not None

    def usable(self, connection: Connection) -> bool:
        return connection not in self._without and connection.usable

    def may_have(self, connection: Connection) -> None:
        """The peer sent a bitfield, so it has the metadata now."""
        self._without.discard(connection)

    def start(self, connection: Connection, file: FileIndex | None, limit: int) -> None:
        """Asks `connection` for the info dictionary (None) or a file's piece layer, `limit` bytes at most."""
        self._current = _Fetching(connection, file, limit)
        self._ask(self._current)

    def _ask(self, current: _Fetching) -> None:
        session, offset, now = current.connection.session, len(current.data), trio.current_time()
        if current.file is None:
            current.connection.send(session.info_request(offset, now))
        else:
            current.connection.send(session.layer_request(current.file, offset, now))

    def forget(self, connection: Connection) -> None:
        """The connection is gone."""
        self._without.discard(connection)
        if self._current is not None and self._current.connection is connection:
            self._current = None

    def receive(
        self, connection: Connection, chunk: m.Info | m.Layer
    ) -> tuple[FileIndex | None, bytes] | None:
        """Takes a chunk; returns (file or None, everything) with the last one.

        Raises `RemoteProtocolError` when the chunks do not fit together.
        """
        current = self._current
        if current is None or current.connection is not connection:
            return None
        if chunk.total == 0:
            self._without.add(connection)
            self._current = None
            return None
        if current.total not in (None, chunk.total) or chunk.total > current.limit:
            raise RemoteProtocolError("the metadata's length is wrong")
        current.total = chunk.total
        current.data += chunk.data
        if len(current.data) < chunk.total:
            self._ask(current)
            return None
        self._current = None
        return current.file, bytes(current.data)
