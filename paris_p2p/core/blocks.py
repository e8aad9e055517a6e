"""One piece on its way: its blocks, shared by all peers that deliver parts of it.

Owns: which blocks are still to be asked for, who was asked, what is here and from whom. Does not own: which
piece (`core.picker`), who asks next (`core.scheduler`).
"""

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from paris_p2p.wire.bep52 import Buffer

P = TypeVar("P", bound=Hashable)
Span = tuple[int, int]
"""(offset in the piece, length) of a block, bytes."""


class OpenPiece(Generic[P]):
    """`grid`: bytes of a block, the last one may be shorter. `exclusive`: one peer at a time may deliver."""

    __slots__ = (
        "_todo",
        "asked",
        "exclusive",
        "grid",
        "here",
        "length",
        "received",
        "senders",
        "spared_since",
        "workers",
    )

    def __init__(self, length: int, grid: int, exclusive: bool = False) -> None:
        self.length = length
        self.grid = grid
        self.exclusive = exclusive
        self.workers: set[P] = set()  # who goes on with this piece
        self.asked: dict[int, list[P]] = {}  # offset -> who was asked and has not answered
        self.here: dict[int, Buffer] = {}
        self.senders: dict[int, P] = {}
        self.received = 0
        self.spared_since: float | None = None  # nobody works on it, and a peer that could was passed over
        self._todo = list(range(0, length, grid))[::-1]  # offsets; those asked for next at the end

    @property
    def todo(self) -> int:
        """Blocks that nobody was asked for."""
        return len(self._todo)

    @property
    def complete(self) -> bool:
        return self.received == self.length

    @property
    def untouched(self) -> bool:
        """Nothing is here, nobody was asked: the piece may as well be begun anew."""
        return not (self.here or self.asked)

    def span(self, offset: int) -> Span:
        left = self.length - offset
        return offset, self.grid if self.grid < left else left

    def spans(self) -> Iterator[Span]:
        """All unasked blocks, those asked for next first."""
        return map(self.span, reversed(self._todo))

    def ask(self, peer: P, offset: int) -> None:
        """`peer` is asked for the block at `offset`, alone or as a second one."""
        if offset in self._todo:
            self._todo.remove(offset)
        self.asked.setdefault(offset, []).append(peer)

    def give_back(self, peer: P, offset: int) -> None:
        """`peer` will not deliver this block."""
        asked = self.asked.get(offset)
        if asked is None or peer not in asked:
            return
        asked.remove(peer)
        if not asked:
            del self.asked[offset]
            if offset not in self.here:
                self._todo.append(offset)

    def put(self, peer: P, offset: int, data: Buffer) -> list[P]:
        """Takes a block that was not here. Returns who else was asked for it."""
        others = [other for other in self.asked.pop(offset, ()) if other != peer]
        if offset in self._todo:  # it had been given back before it came after all
            self._todo.remove(offset)
        self.here[offset] = data
        self.senders[offset] = peer
        self.received += len(data)
        return others

    def drop_from(self, peer: P) -> int:
        """Forgets what `peer` sent; returns how many bytes that was."""
        mine = [offset for offset, sender in self.senders.items() if sender == peer]
        dropped = 0
        for offset in mine:
            dropped += len(self.here.pop(offset))
            del self.senders[offset]
            self._todo.append(offset)
        self.received -= dropped
        return dropped

    def regrid(self, grid: int) -> None:
        """Smaller blocks, for a peer that accepts no larger ones; only while nobody is asked."""
        blocks = [
            (at + start, data[start : start + grid], self.senders[at])
            for at, data in self.here.items()
            for start in range(0, len(data), grid)
        ]
        self.grid = grid
        self.here = {offset: data for offset, data, _ in blocks}
        self.senders = {offset: sender for offset, _, sender in blocks}
        self._todo = [offset for offset in range(0, self.length, grid) if offset not in self.here][::-1]

    def data(self) -> list[Buffer]:
        """The blocks in order, once all are here."""
        return [self.here[offset] for offset in sorted(self.here)]
