"""The pieces one peer is delivering: which blocks to ask for next, and the bytes as they come.

Owns: blocks within pieces, the request window (bandwidth times delay), partial pieces kept across a
choke. Does not own: which pieces (`core.picker`), whether a request may be sent (`core.session`).
"""

from collections import deque
from dataclasses import dataclass, field

from paris_p2p.core.rate import RateMeter
from paris_p2p.ids import PieceIndex

MIN_WINDOW_BYTES = 512 * 1024
MAX_WINDOW_BYTES = 8 * 1024 * 1024
WINDOW_S = 1.0
MAX_KEPT_PIECES = 2


@dataclass(slots=True)
class _Piece:
    length: int
    todo: deque[tuple[int, int]]  # (offset, length) not asked for
    blocks: dict[int, bytes] = field(default_factory=dict)
    received: int = 0


class Pipeline:
    """`block_bytes`: how much to ask for at once."""

    def __init__(self, block_bytes: int, now: float) -> None:
        self._block_bytes = block_bytes
        self._active: dict[PieceIndex, _Piece] = {}
        self._kept: dict[PieceIndex, _Piece] = {}
        self.meter = RateMeter(now)

    @property
    def active(self) -> list[PieceIndex]:
        """Pieces being fetched, in the order they were started."""
        return list(self._active)

    @property
    def kept(self) -> list[PieceIndex]:
        """Pieces of which a part is here, from before this peer choked us."""
        return list(self._kept)

    def window(self, now: float) -> int:
        """Bytes to keep asked for: what the peer delivers in a second, within bounds."""
        return max(MIN_WINDOW_BYTES, min(MAX_WINDOW_BYTES, int(self.meter.rate(now) * WINDOW_S)))

    def start(self, piece: PieceIndex, length: int) -> None:
        """`piece` of `length` bytes was assigned to this peer."""
        kept = self._kept.pop(piece, None)
        self._active[piece] = _Piece(length, self._blocks(length)) if kept is None else kept

    def _blocks(self, length: int) -> deque[tuple[int, int]]:
        size = self._block_bytes
        return deque((offset, min(size, length - offset)) for offset in range(0, length, size))

    def next_block(self) -> tuple[PieceIndex, int, int] | None:
        """The next (piece, offset, length) to ask for; None when all of the active pieces is asked for."""
        for piece, state in self._active.items():
            while state.todo:
                offset, length = state.todo.popleft()
                if offset not in state.blocks:  # an answer to an earlier request may have brought it
                    return piece, offset, length
        return None

    def put_back(self, piece: PieceIndex, offset: int, length: int) -> None:
        """This block was not delivered and must be asked for again."""
        for state in (self._active.get(piece), self._kept.get(piece)):
            if state is not None:
                state.todo.append((offset, length))

    def block(self, piece: PieceIndex, offset: int, data: bytes, now: float) -> bytes | None:
        """Takes a block; returns the whole piece when it was the last one."""
        self.meter.add(len(data), now)
        state = self._active.get(piece) or self._kept.get(piece)
        if state is None or offset in state.blocks:
            return None
        state.blocks[offset] = data
        state.received += len(data)
        if state.received < state.length:
            return None
        self.drop(piece)
        return b"".join(state.blocks[at] for at in sorted(state.blocks))

    def keep(self, piece: PieceIndex) -> None:
        """Stops fetching `piece` but keeps what came, should the peer continue later."""
        state = self._active.pop(piece, None)
        if state is not None and state.blocks:
            self._kept[piece] = state
        while len(self._kept) > MAX_KEPT_PIECES:
            del self._kept[next(iter(self._kept))]

    def drop(self, piece: PieceIndex) -> int:
        """Forgets `piece`; returns how many bytes of it had come."""
        state = self._active.pop(piece, None) or self._kept.pop(piece, None)
        return 0 if state is None else state.received
