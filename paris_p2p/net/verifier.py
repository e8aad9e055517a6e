"""Whole pieces on their way to the disk: checked as soon as they are whole, written several at a time.

Owns: what is checked and not yet written, how much of it there may be. Does not own: the disk and the hashes
(`store.partial`), what follows from a good or a bad piece (`net.download`).

A piece is hashed in the event loop, while the processor still has it near by. That holds up the reading of
further ones, as it should: nothing piles up unhashed. A second thread that hashes would take the interpreter
from this one and back for every 16 KiB, which costs more than the hashes. The disk may make us wait: a worker
thread writes, and all that has become ready meanwhile goes with the next call.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from paris_p2p.ids import PieceIndex
from paris_p2p.net.blocking import Blocking
from paris_p2p.store.partial import PartialItem
from paris_p2p.wire.bep52 import Buffer

T = TypeVar("T")

AT_ONCE_BYTES = 1 << 20  # hashed without a pause: a millisecond
WRITE_BYTES = 8 << 20  # handed to a worker thread together
MAX_PENDING_BYTES = 16 << 20  # then nothing more is asked for


@dataclass(frozen=True, slots=True)
class Arrival(Generic[T]):
    """A piece that is whole. `data`: its consecutive parts, `length` bytes; `sender`: of its last part."""

    piece: PieceIndex
    data: Sequence[Buffer]
    length: int
    sender: T


class Verifier(Generic[T]):
    """Of one item whose layers are known. `good` is called for a piece that is right and written, `bad` for
    one that is not right; `room` when more may be asked for again."""

    def __init__(
        self,
        partial: PartialItem,
        blocking: Blocking,
        *,
        good: Callable[[Arrival[T]], None],
        bad: Callable[[Arrival[T]], None],
        room: Callable[[], None],
    ) -> None:
        self._partial = partial
        self._blocking = blocking
        self._good = good
        self._bad = bad
        self._room = room
        self._long: deque[Arrival[T]] = deque()  # not checked, too long to be checked at once
        self._checked: deque[Arrival[T]] = deque()
        self._pending = 0
        self._to_check = trio.Event()
        self._to_write = trio.Event()

    @property
    def full(self) -> bool:
        """Whether nothing more should be asked for: the disk does not keep up."""
        return self._pending > MAX_PENDING_BYTES

    def add(self, piece: PieceIndex, data: Sequence[Buffer], sender: T) -> None:
        """A piece is whole. `bad` may be called before this returns, `good` is not."""
        arrival = Arrival(piece, data, sum(map(len, data)), sender)
        self._pending += arrival.length
        if arrival.length > AT_ONCE_BYTES:
            self._long.append(arrival)
            self._to_check.set()
        else:
            steps = self._partial.check_in_steps(piece, data)
            while (verdict := _step(steps)) is None:
                pass
            self._decided(arrival, verdict)

    def _decided(self, arrival: Arrival[T], right: bool) -> None:
        if right:
            self._checked.append(arrival)
            self._to_write.set()
        else:
            self._settled(arrival, self._bad)

    def _settled(self, arrival: Arrival[T], report: Callable[[Arrival[T]], None]) -> None:
        was_full = self.full
        self._pending -= arrival.length
        report(arrival)
        if was_full and not self.full:
            self._room()

    async def run(self) -> None:
        """Until cancelled. Raises `StoreError` when the disk refuses."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._check)
            nursery.start_soon(self._write)

    async def _check(self) -> None:
        while True:
            while self._long:
                arrival = self._long.popleft()
                steps = self._partial.check_in_steps(arrival.piece, arrival.data)
                while (verdict := _step(steps)) is None:
                    await trio.lowlevel.checkpoint()
                self._decided(arrival, verdict)
            self._to_check = trio.Event()
            await self._to_check.wait()

    async def _write(self) -> None:
        while True:
            while batch := self._next_batch():
                await self._blocking(lambda batch=batch: self._write_all(batch))  # type: ignore[misc]
                for arrival in batch:
                    self._settled(arrival, self._good)
            self._to_write = trio.Event()
            await self._to_write.wait()

    def _next_batch(self) -> list[Arrival[T]]:
        batch: list[Arrival[T]] = []
        left = WRITE_BYTES
        while self._checked and left > 0:
            batch.append(self._checked.popleft())
            left -= batch[-1].length
        return batch

    def _write_all(self, batch: Sequence[Arrival[T]]) -> None:
        for arrival in batch:
            self._partial.write_piece(arrival.piece, arrival.data, checked=True)


def _step(steps: Generator[None, None, bool]) -> bool | None:
    """One step of a check; its verdict, or None while there is none."""
    try:
        next(steps)
    except StopIteration as done:
        return bool(done.value)
    return None
