"""Frames of the swarm protocol in a stream: bytes in any chunking become messages.

Owns: the incremental `FrameDecoder`, receiving blocks in place. Does not own: what a message looks like
(`wire.messages`), whether it may come now (`core.session`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import PieceIndex
from paris_p2p.wire.messages import (
    BLOCK,
    BLOCK_HEADER,
    CONTROL,
    HEADER,
    MAX_BLOCK_BYTES,
    MAX_CONTROL_BYTES,
    Block,
    Message,
    decode_control,
)

SCRATCH_BYTES = 4096  # received at once between blocks: what of a block comes with it is copied


@dataclass(slots=True)
class _Arriving:
    """A block of which a part is here."""

    piece: PieceIndex
    offset: int
    data: bytearray
    here: int  # bytes


class FrameDecoder:
    """Bytes in, messages out; buffers at most one frame plus what was fed at once.

    Bytes are either handed over (`feed`), or received in place: into `buffer()`, then `filled(count)`. A
    block's data is then never copied. `max_block`: the longest block (bytes) to accept. `expects(piece,
    offset, length)`: whether a block was asked for, so that nothing is set aside for one that was not.
    After an error every call of `next_message` raises it again.
    """

    def __init__(
        self,
        max_block: int = MAX_BLOCK_BYTES,
        expects: Callable[[PieceIndex, int, int], bool] = lambda piece, offset, length: True,
    ) -> None:
        self._limits = {CONTROL: 1 + MAX_CONTROL_BYTES, BLOCK: 1 + BLOCK_HEADER.size + max_block}
        self._expects = expects
        self._buffer = bytearray()
        self._start = 0
        self._arriving: _Arriving | None = None
        self._scratch = bytearray()  # made when it is first used
        self._error: RemoteProtocolError | None = None

    def feed(self, data: bytes | memoryview) -> None:
        """Takes bytes as they came."""
        block = self._arriving
        if block is not None:
            taken = min(len(data), len(block.data) - block.here)
            block.data[block.here : block.here + taken] = data[:taken]
            block.here += taken
            data = data[taken:]
        if self._start:
            # Once per read, not once per message: what is moved is less than one frame.
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    @property
    def missing(self) -> int:
        """Bytes that will come before anything else can: the rest of a block that has begun, or 0."""
        return 0 if self._arriving is None else len(self._arriving.data) - self._arriving.here

    def buffer(self) -> memoryview:
        """Where to receive next (at least one byte); all messages must have been taken."""
        block = self._arriving
        if block is not None and block.here < len(block.data):
            return memoryview(block.data)[block.here :]
        if not self._scratch:
            self._scratch = bytearray(SCRATCH_BYTES)
        return memoryview(self._scratch)

    def filled(self, count: int) -> None:
        """`count` bytes were received into `buffer()`."""
        block = self._arriving
        if block is not None and block.here < len(block.data):
            block.here += count
        else:
            self.feed(memoryview(self._scratch)[:count])

    def next_message(self) -> Message | None:
        """The next whole message, or None when more bytes are needed. Raises `RemoteProtocolError`."""
        if self._error is not None:
            raise self._error
        try:
            return self._next()
        except RemoteProtocolError as error:
            self._error = error
            self._buffer.clear()
            self._start = 0
            self._arriving = None
            raise

    def _next(self) -> Message | None:
        if self._arriving is not None:
            return self._arrived(self._arriving)
        if len(self._buffer) - self._start < HEADER.size:
            return None
        length, kind = HEADER.unpack_from(self._buffer, self._start)
        limit = self._limits.get(kind)
        if limit is None:
            raise RemoteProtocolError(f"a frame of unknown type {kind}")
        if not 1 <= length <= limit:
            raise RemoteProtocolError(f"a frame of {length} bytes, at most {limit} are allowed")
        begin = self._start + HEADER.size
        end = begin + length - 1
        if kind == BLOCK:
            return self._block(begin, end)
        if len(self._buffer) < end:
            return None
        self._start = end
        return decode_control(self._bytes(begin, end))

    def _bytes(self, begin: int, end: int) -> bytes:
        with memoryview(self._buffer) as view:
            return bytes(view[begin:end])

    def _block(self, begin: int, end: int) -> Block | None:
        length = end - begin - BLOCK_HEADER.size
        if length <= 0:
            raise RemoteProtocolError("a block without data")
        here = len(self._buffer) - begin - BLOCK_HEADER.size
        if here < 0:
            return None
        piece, offset = BLOCK_HEADER.unpack_from(self._buffer, begin)
        if not self._expects(PieceIndex(piece), offset, length):
            raise RemoteProtocolError(f"a block that was not asked for: piece {piece} at {offset}")
        if here >= length:
            self._start = end
            return Block(PieceIndex(piece), offset, self._bytes(begin + BLOCK_HEADER.size, end))
        data = bytearray(length)
        data[:here] = self._buffer[begin + BLOCK_HEADER.size :]
        self._arriving = _Arriving(PieceIndex(piece), offset, data, here)
        self._buffer.clear()
        self._start = 0
        return None

    def _arrived(self, block: _Arriving) -> Block | None:
        if block.here < len(block.data):
            return None
        self._arriving = None
        return Block(block.piece, block.offset, block.data)
