"""Metadata within the upload limits: strangers who want much of it, beside blocks and one who asks once."""

from typing import Any, cast

import trio
from trio.testing import MockClock

from paris_p2p.core.limiter import Limiter
from paris_p2p.ids import NodeId
from paris_p2p.net.connection import Connection
from paris_p2p.net.metadata_turns import MetadataTurns
from paris_p2p.wire import messages as m

LIMIT = 100_000.0
BLOCK = 16_384


class Asker:
    """A session with somebody at `place`."""

    def __init__(self, number: int, place: str) -> None:
        self.node_id = NodeId(number.to_bytes(32, "big"))
        self.place, self.usable = place, True
        self.came: list[float] = []

    def ask(self, turns: MetadataTurns, *, again: bool) -> None:
        def answer() -> int:
            self.came.append(trio.current_time())
            if again:
                self.ask(turns, again=True)
            return m.MAX_CHUNK_BYTES

        turns.ask(cast(Connection, cast(Any, self)), answer)


async def test_a_flood_of_metadata_starves_neither_blocks_nor_who_asks_once(
    autojump_clock: MockClock,
) -> None:
    blocks: Limiter[NodeId] = Limiter(LIMIT, None, trio.current_time())
    turns = MetadataTurns(blocks)
    turns.set_limits(LIMIT, None, trio.current_time())
    flood = [Asker(number, "203.0.113.0/24") for number in range(64)]
    honest, reader = Asker(100, "198.51.100.0/24"), NodeId(b"r" * 32)
    sent = 0

    async def serve_blocks() -> None:
        nonlocal sent
        while True:
            while (wait := blocks.wait(reader, trio.current_time())) > 0:
                await trio.sleep(wait)
            blocks.take(reader, BLOCK, trio.current_time())
            sent += BLOCK

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        for asker in flood:
            for _ in range(8):
                asker.ask(turns, again=True)
        nursery.start_soon(serve_blocks)
        began = trio.current_time()
        await trio.sleep(10)
        honest.ask(turns, again=False)
        await trio.sleep(3)
        assert honest.came  # a place's keys have one turn
        await trio.sleep(7)
        took = trio.current_time() - began
        metadata = m.MAX_CHUNK_BYTES * sum(len(asker.came) for asker in flood)
        assert 0.4 * LIMIT * took < metadata < 0.6 * LIMIT * took
        assert 0.4 * LIMIT * took < sent and sent + metadata < 1.15 * LIMIT * took
        for asker in flood:
            asker.usable = False
        await trio.sleep(5)
        assert not turns._waiting  # what nobody reads any more is not kept
        nursery.cancel_scope.cancel()


async def test_without_limits_nobody_waits(autojump_clock: MockClock) -> None:
    turns = MetadataTurns(Limiter(None, None, trio.current_time()))
    asker = Asker(1, "")
    asker.ask(turns, again=False)
    assert asker.came
