"""Bencode, the encoding of BitTorrent metadata (BEP 3), in its one canonical form.

Owns: encoding plain values, and strict decoding of bytes a stranger sent: every value has exactly one
accepted encoding (no leading zeros, keys strictly ascending), size and depth are capped.
Does not own: what the values mean (`wire.bep52`).
"""

from typing import TypeAlias, Union

from paris_p2p.errors import LocalProtocolError, RemoteProtocolError

Bencoded: TypeAlias = Union[int, bytes, "list[Bencoded]", "dict[bytes, Bencoded]"]

MAX_DEPTH = 64
"""Nesting of lists and dictionaries beyond this is refused in either direction."""
MAX_INT_DIGITS = 19
"""Digits of an integer: every 63-bit number fits, and converting text stays cheap."""
_MAX_SIZE_DIGITS = 10


def bencode(value: Bencoded) -> bytes:
    """The canonical encoding of `value`; dictionary keys are sorted as raw bytes.

    Raises `LocalProtocolError` for other types, integers of more than `MAX_INT_DIGITS` digits, and
    nesting past `MAX_DEPTH`.
    """
    parts: list[bytes] = []
    _write(value, parts, 0)
    return b"".join(parts)


def _write(value: object, parts: list[bytes], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise LocalProtocolError("value is nested too deeply to bencode")
    if isinstance(value, bytes):
        parts.append(b"%d:%b" % (len(value), value))
    elif isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 10**MAX_INT_DIGITS:
            raise LocalProtocolError("integer is too large to bencode")
        parts.append(b"i%de" % value)
    elif isinstance(value, list):
        parts.append(b"l")
        for item in value:
            _write(item, parts, depth + 1)
        parts.append(b"e")
    elif isinstance(value, dict):
        _write_dict(value, parts, depth)
    else:
        raise LocalProtocolError(f"{type(value).__name__} cannot be bencoded")


def _write_dict(value: dict[object, object], parts: list[bytes], depth: int) -> None:
    keys = [key for key in value if isinstance(key, bytes)]
    if len(keys) != len(value):
        raise LocalProtocolError("dictionary keys must be bytes to be bencoded")
    parts.append(b"d")
    for key in sorted(keys):
        parts.append(b"%d:%b" % (len(key), key))
        _write(value[key], parts, depth + 1)
    parts.append(b"e")


def bdecode(data: bytes, max_bytes: int) -> Bencoded:
    """The value whose canonical encoding `data` is, all of it.

    Raises `RemoteProtocolError` when `data` is longer than `max_bytes`, is not bencode, or is not the
    canonical encoding of what it says.
    """
    if len(data) > max_bytes:
        raise RemoteProtocolError(f"{len(data)} bytes where at most {max_bytes} are allowed")
    reader = _Reader(data)
    value = reader.value(0)
    if reader.at != len(data):
        raise RemoteProtocolError(f"bencode: {len(data) - reader.at} bytes after the value")
    return value


class _Reader:
    """A position in the input, moved past each value read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def value(self, depth: int) -> Bencoded:
        if depth > MAX_DEPTH:
            raise RemoteProtocolError("bencode: nested too deeply")
        lead = self.data[self.at : self.at + 1]
        if lead.isdigit():
            return self.string()
        self.at += 1
        if lead == b"i":
            return self.number(b"e", MAX_INT_DIGITS)
        if lead == b"l":
            return self.items(depth)
        if lead == b"d":
            return self.entries(depth)
        raise RemoteProtocolError(f"bencode: no value starts at byte {self.at - 1}")

    def number(self, end: bytes, max_digits: int) -> int:
        stop = self.data.find(end, self.at, self.at + max_digits + 2)  # a sign and the end mark
        text = self.data[self.at : stop] if stop >= 0 else b""
        digits = text.removeprefix(b"-")
        if not digits.isdigit() or len(digits) > max_digits or b"%d" % int(text) != text:
            raise RemoteProtocolError(f"bencode: no canonical number at byte {self.at}")
        self.at = stop + 1
        return int(text)

    def string(self) -> bytes:
        size = self.number(b":", _MAX_SIZE_DIGITS)
        if not 0 <= size <= len(self.data) - self.at:
            raise RemoteProtocolError("bencode: a string reaches past the end")
        self.at += size
        return self.data[self.at - size : self.at]

    def ended(self) -> bool:
        if self.data[self.at : self.at + 1] != b"e":
            return False
        self.at += 1
        return True

    def items(self, depth: int) -> list[Bencoded]:
        items: list[Bencoded] = []
        while not self.ended():
            items.append(self.value(depth + 1))
        return items

    def entries(self, depth: int) -> dict[bytes, Bencoded]:
        entries: dict[bytes, Bencoded] = {}
        last: bytes | None = None
        while not self.ended():
            if not self.data[self.at : self.at + 1].isdigit():
                raise RemoteProtocolError("bencode: a dictionary key is not a string")
            key = self.string()
            if last is not None and key <= last:
                raise RemoteProtocolError("bencode: dictionary keys are not in ascending order")
            entries[key] = self.value(depth + 1)
            last = key
        return entries
