"""What the DHT worker read, verified once more in the node process.

Owns: which rows are believed, and that verifying many of them leaves other tasks their turns. Does not own:
reading (`client`), the rules of a record (`wire.records`).
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import trio

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.wire.records import Record, check_record, key_id

log = logging.getLogger(__name__)

CHECKED_AT_ONCE = 32
"""Signatures checked in a row before other tasks have their turn: a few milliseconds. A key may have a
thousand new ones."""


async def checked(key: bytes, rows: Iterable[Sequence[Any]], now_unix: float) -> list[Record]:
    """The rows (subkey, value, expiration) that are live, rightful records of `key` (not hashed)."""
    found: list[Record] = []
    hashed = key_id(key)
    for number, (subkey, value, expiration_unix) in enumerate(rows, 1):
        if number % CHECKED_AT_ONCE == 0:
            await trio.lowlevel.checkpoint()
        if expiration_unix <= now_unix:
            continue
        try:
            found.append(check_record(hashed, subkey, value, expiration_unix, now_unix))
        except RemoteProtocolError as error:  # the worker's validator let it through: it must not happen
            log.warning("refused a record that was read: %s", error)
    await trio.lowlevel.checkpoint()
    return found
