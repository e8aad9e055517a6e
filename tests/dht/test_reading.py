"""Tests of `paris_p2p.dht.reading`."""

from typing import Any

import trio

from paris_p2p.dht.reading import CHECKED_AT_ONCE, checked
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import ProvideRecord, sign_record

NOW = 1_800_000_000.0
ITEM = b"i" * 32


def row(owner: int, expiration_unix: float = NOW + 60.0) -> tuple[bytes, list[Any]]:
    identity = Identity(owner.to_bytes(32, "big"))
    record = sign_record(identity, ProvideRecord(True, ("a",)), ITEM, expiration_unix)
    return record.key, [record.subkey, record.value, record.expiration_unix]


async def test_only_live_rightful_records_are_believed() -> None:
    key, good = row(1)
    _, forged = row(2)
    forged[1] = forged[1][:-1] + bytes([forged[1][-1] ^ 1])
    stolen = [b"f" * 32, *good[1:]]
    found = await checked(key, [row(3, NOW - 1.0)[1], forged, stolen, good], NOW)
    assert [record.owner for record in found] == [Identity((1).to_bytes(32, "big")).node_id]


async def test_others_have_their_turn_while_many_are_verified() -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    key, one = row(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        await trio.lowlevel.checkpoint()
        before = turns
        assert len(await checked(key, [one] * (8 * CHECKED_AT_ONCE), NOW)) == 8 * CHECKED_AT_ONCE
        assert turns - before >= 8
        nursery.cancel_scope.cancel()
