"""Length-prefixed msgpack frames between a parent and its child process.

Owns: the encoding of one message (a map with text keys), its size cap, and cutting a byte stream back into
messages. Does not own: sockets, processes, or what the messages mean. The other end is our own code, so
anything that does not decode is `WorkerError`: restart the child.
"""

from typing import Any

import msgpack

from paris_p2p.errors import LocalProtocolError, WorkerError

Message = dict[str, Any]
"""Plain data with text keys; values are whatever msgpack carries (NaN included: a loss may be one)."""

MAX_FRAME_BYTES = 32 * 1024 * 1024
"""The largest message either side accepts: a few DHT reads of the largest keys fit, a tensor does not."""

_HEADER_BYTES = 4


def encode(message: Message) -> bytes:
    """The frame of `message`: 4 bytes big-endian length, then msgpack.

    Raises `LocalProtocolError` when the message is not plain data or is over `MAX_FRAME_BYTES`.
    """
    try:
        body: bytes = msgpack.packb(message, use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"message cannot be sent to another process: {error}") from error
    if len(body) > MAX_FRAME_BYTES:
        raise LocalProtocolError(f"message of {len(body)} bytes, at most {MAX_FRAME_BYTES} are allowed")
    return len(body).to_bytes(_HEADER_BYTES, "big") + body


class FrameReader:
    """Cuts received bytes, in whatever chunks they arrive, into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Append bytes received from the other end."""
        self._buffer += data

    def next(self) -> Message | None:
        """The next complete message, or None until more bytes come. Raises `WorkerError` on nonsense."""
        if len(self._buffer) < _HEADER_BYTES:
            return None
        length = int.from_bytes(self._buffer[:_HEADER_BYTES], "big")
        if length > MAX_FRAME_BYTES:
            raise WorkerError(f"frame of {length} bytes, at most {MAX_FRAME_BYTES} are allowed")
        if len(self._buffer) < _HEADER_BYTES + length:
            return None
        body = bytes(self._buffer[_HEADER_BYTES : _HEADER_BYTES + length])
        del self._buffer[: _HEADER_BYTES + length]
        return _decode(body)


def _decode(body: bytes) -> Message:
    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise WorkerError(f"frame does not decode: {error}") from None
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise WorkerError("frame is not a map with text keys")
    return message
