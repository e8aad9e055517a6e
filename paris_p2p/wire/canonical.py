"""Canonical msgpack, and the mapping between it and frozen dataclasses.

Owns: one byte string per value (sorted keys, shortest integers, 64-bit floats, no extension types), so
that a hash or a signature over a value means something; and decoding into typed values with the path of
the first thing that is wrong. Does not own: any message or record (they are plain dataclasses elsewhere).

A field made with `optional` is left out of the encoding while it has its default, and refused when it stands
there with it: formats grow, values that do not use the new field keep their bytes, and each value still has
one encoding.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgpack

from paris_p2p.errors import LocalProtocolError, RemoteProtocolError

T = TypeVar("T")

MAX_DEPTH = 16
"""Nesting beyond this is refused in either direction: nothing here needs half of it."""


_OPTIONAL = "canonical.optional"


def optional(default: T) -> T:
    """A dataclass field that is encoded only when it differs from `default` (an immutable value)."""
    return dataclasses.field(default=default, metadata={_OPTIONAL: True})


def pack(value: object) -> bytes:
    """The canonical encoding of plain data (None, bool, int, float, str, bytes, list, dict with str keys).

    Raises `LocalProtocolError` for anything else, for NaN and infinities, and for nesting past `MAX_DEPTH`.
    """
    return typing.cast(bytes, msgpack.packb(_sorted(value, 0), use_bin_type=True))


def _sorted(value: object, depth: int) -> object:
    if depth > MAX_DEPTH:
        raise LocalProtocolError("value is nested too deeply to encode")
    if value is None or isinstance(value, bool | int | str | bytes):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise LocalProtocolError(f"{value} cannot be encoded: only finite numbers are")
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise LocalProtocolError("only text keys are encoded")
        return {key: _sorted(value[key], depth + 1) for key in sorted(value)}
    if isinstance(value, Sequence):
        return [_sorted(item, depth + 1) for item in value]
    raise LocalProtocolError(f"{type(value).__name__} cannot be encoded")


def unpack(data: bytes, max_bytes: int) -> Any:
    """Plain data from its canonical encoding.

    Raises `RemoteProtocolError` when `data` is longer than `max_bytes`, is not msgpack, or is not the
    canonical encoding of what it says.
    """
    if len(data) > max_bytes:
        raise RemoteProtocolError(f"{len(data)} bytes where at most {max_bytes} are allowed")
    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise RemoteProtocolError(f"not valid msgpack: {error}") from None
    try:
        canonical = pack(value)
    except (LocalProtocolError, OverflowError, ValueError) as error:
        raise RemoteProtocolError(f"not plain data: {error}") from None
    if canonical != data:
        raise RemoteProtocolError("not the canonical encoding of its value")
    return value


def to_plain(value: Any) -> Any:
    """Plain data for a (nested) dataclass: each dataclass becomes a map of its fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        pairs = ((field, getattr(value, field.name)) for field in fields)
        return {
            field.name: to_plain(part)
            for field, part in pairs
            if not (_OPTIONAL in field.metadata and part == field.default)
        }
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def encode(value: Any) -> bytes:
    """`pack(to_plain(value))`."""
    return pack(to_plain(value))


def decode(kind: type[T], data: bytes, max_bytes: int) -> T:
    """A value of dataclass `kind` from bytes a stranger sent. Raises `RemoteProtocolError`."""
    return from_plain(kind, unpack(data, max_bytes))


def from_plain(kind: type[T], plain: object, where: str = "") -> T:
    """A value of type `kind` from plain data: exact fields, exact types, `__post_init__` checks run.

    Supports dataclasses, bool, int, float, str, bytes, `X | None`, `tuple[X, ...]`, `dict[str, X]`,
    `Any` (plain data as is). Raises `RemoteProtocolError` naming the place.
    """
    return typing.cast(T, _from_plain(kind, plain, where or getattr(kind, "__name__", "value")))


def _from_plain(kind: Any, plain: object, where: str) -> object:
    while isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    if kind is Any:
        return plain
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _from_optional(kind, plain, where)
    if origin is tuple:
        if not isinstance(plain, list):
            raise RemoteProtocolError(f"{where}: a list is expected")
        item = typing.get_args(kind)[0]
        return tuple(_from_plain(item, part, f"{where}[{i}]") for i, part in enumerate(plain))
    if origin is dict:
        if not isinstance(plain, dict):
            raise RemoteProtocolError(f"{where}: a map is expected")
        item = typing.get_args(kind)[1]
        return {key: _from_plain(item, part, f"{where}.{key}") for key, part in plain.items()}
    if dataclasses.is_dataclass(kind):
        return _from_fields(typing.cast(type[Any], kind), plain, where)
    if type(plain) is not kind:  # exact: a bool is no int, an int no float
        raise RemoteProtocolError(f"{where}: {kind.__name__} is expected, not {type(plain).__name__}")
    return plain


def _from_optional(kind: Any, plain: object, where: str) -> object:
    if plain is None:
        return None
    inner = [part for part in typing.get_args(kind) if part is not type(None)]
    return _from_plain(inner[0], plain, where)


@functools.cache
def _type_hints(kind: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields; working them out anew costs more than all of the decoding."""
    return typing.get_type_hints(kind)


def _from_fields(kind: Any, plain: object, where: str) -> object:
    if not isinstance(plain, dict):
        raise RemoteProtocolError(f"{where}: a map is expected")
    hints = _type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    absent = {name for name, field in fields.items() if _OPTIONAL in field.metadata} - plain.keys()
    names = fields.keys() - absent
    if plain.keys() != names:
        odd = sorted(plain.keys() ^ names)
        raise RemoteProtocolError(f"{where}: fields missing or unknown: {', '.join(map(str, odd))[:200]}")
    values = {name: _from_plain(hints[name], plain[name], f"{where}.{name}") for name in names}
    for name, value in values.items():
        if _OPTIONAL in fields[name].metadata and value == fields[name].default:
            raise RemoteProtocolError(f"{where}.{name}: a default is not encoded")
    try:
        return kind(**values)
    except ValueError as error:
        raise RemoteProtocolError(f"{where}: {error}") from None
