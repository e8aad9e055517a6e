"""What to ask of whom: every decision of one item's download, without I/O.

Owns: begun pieces and their blocks, which peer goes on with which, joining and doubling at the end, requests
that are late, who is to blame for a bad piece. Does not own: which piece is begun next (`core.picker`), when
a request is legal (`core.session`), bytes on their way, hashing.

The driver calls `requests` whenever a peer may have room, and reports what comes: `block`, `rejected`,
`timed_out`, `good`, `bad`. A block is asked of one peer; of two only when no block of the whole item is left
to ask for and the second would bring it much sooner. A piece may be put together from several peers. If it
is bad, it is fetched again from one peer alone: once that is right, the two are compared, and whoever sent
a block that differs is proven a liar.
"""

import hashlib
import random
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from paris_p2p.core.blocks import OpenPiece
from paris_p2p.core.picker import Picker
from paris_p2p.core.pipeline import Key, Pipeline
from paris_p2p.ids import PieceIndex
from paris_p2p.wire.bep52 import Buffer

P = TypeVar("P", bound=Hashable)

MAX_REQUESTERS = 2
REFILL = 0.7  # of the window; above that nothing more is asked for yet
GAIN = 2.0  # a second peer is asked when it would bring a block this many times sooner
MIN_DOUBLE_S = 0.3  # ... and when the first would still take this long
MAX_OPEN_BYTES = 96 << 20  # of begun pieces; then only these are gone on with
MAX_SUSPECTS = 64
SPARED_S = 5.0  # a piece that was bad waits so long for a peer that had no part in it


@dataclass(frozen=True, slots=True)
class Arrived(Generic[P]):
    """What a block did. `piece`: all its blocks in order, when it was the last one (to be verified);
    `cancels`: requests to take back; `wasted`: bytes that were here already."""

    piece: list[Buffer] | None = None
    cancels: tuple[tuple[P, Key], ...] = ()
    wasted: int = 0


@dataclass(frozen=True, slots=True)
class Good(Generic[P]):
    """What a right piece showed. `useless`: peers that have nothing more that is missing here; `liars`: who
    sent a wrong block of it before."""

    useless: list[P]
    liars: set[P]


@dataclass(slots=True)
class _Peer:
    pipeline: Pipeline
    max_block: int  # bytes it accepts at once
    pieces: dict[PieceIndex, None] = field(default_factory=dict)  # it works on, in order


@dataclass(frozen=True, slots=True)
class _Suspect(Generic[P]):
    """One block of a bad piece that several peers sent."""

    piece: PieceIndex
    offset: int
    length: int
    sender: P
    digest: bytes


Allowed = Callable[[PieceIndex, int, int], bool]


def _digest(data: Buffer) -> bytes:
    return hashlib.sha256(data).digest()


def _always(piece: PieceIndex, offset: int, length: int) -> bool:
    return True


class Scheduler(Generic[P]):
    """`length_of`: bytes of a piece. `P` identifies a session with a peer (any hashable value)."""

    def __init__(
        self,
        pieces: int,
        length_of: Callable[[PieceIndex], int],
        have: Iterable[PieceIndex],
        rng: random.Random,
    ) -> None:
        self.picker: Picker[P] = Picker(pieces, have, rng)
        self._length_of = length_of
        self._peers: dict[P, _Peer] = {}
        self._open: dict[PieceIndex, OpenPiece[P]] = {}  # begun and not all here
        self._unasked: dict[PieceIndex, None] = {}  # those of them with blocks to ask for
        self._open_bytes = 0
        self._checking: dict[PieceIndex, OpenPiece[P]] = {}  # all here, not verified
        self._suspects: dict[PieceIndex, list[_Suspect[P]]] = {}

    # -- peers -----------------------------------------------------------------------------------

    def add_peer(self, peer: P, block_bytes: int, now: float, *, max_block: int | None = None) -> None:
        """A session is open. `block_bytes`: how much to ask of this peer at once in the pieces it begins;
        `max_block`: how much may be asked of it at once, the same when None."""
        self._peers[peer] = _Peer(Pipeline(block_bytes, now), max_block or block_bytes)

    def remove_peer(self, peer: P, *, distrust: bool = False) -> int:
        """The session is over; what it did not deliver goes to others. `distrust`: forget its blocks too.

        Returns how many bytes were forgotten.
        """
        state = self._peers.pop(peer, None)
        self.picker.remove_peer(peer)
        if state is None:
            return 0
        for key in list(state.pipeline.asked):
            self._give_back(peer, state, key)
        self._stop_work(peer, state)
        return sum(self._forget_blocks(peer, piece) for piece in list(self._open)) if distrust else 0

    def _forget_blocks(self, peer: P, piece: PieceIndex) -> int:
        dropped = self._open[piece].drop_from(peer)
        if dropped:
            self._unasked[piece] = None
            self._close_untouched(piece)
        return dropped

    def _stop_work(self, peer: P, state: _Peer) -> None:
        """The peer goes on with nothing; what nobody has begun in earnest is free again."""
        for piece in list(state.pieces):
            self._open[piece].workers.discard(peer)
            self._close_untouched(piece)
        state.pieces.clear()

    def _close_untouched(self, piece: PieceIndex) -> None:
        opened = self._open[piece]
        if opened.untouched and not opened.workers and not opened.exclusive:
            self._close(piece)
            self.picker.put_back(piece)

    def _close(self, piece: PieceIndex) -> OpenPiece[P]:
        opened = self._open.pop(piece)
        self._unasked.pop(piece, None)
        self._open_bytes -= opened.length
        for peer in opened.workers:
            self._peers[peer].pieces.pop(piece, None)
        return opened

    def rate(self, peer: P, now: float) -> float | None:
        """Bytes per second that this peer delivers; None while it has delivered nothing."""
        state = self._peers.get(peer)
        return state.pipeline.meter.rate(now) if state is not None and state.pipeline.measured else None

    def ranked(self, now: float) -> list[P]:
        """All peers: the fastest first, those without a measurement after the faster half of the others."""
        rates = {peer: self.rate(peer, now) for peer in self._peers}
        known = sorted((rate for rate in rates.values() if rate is not None), reverse=True)
        middle = known[len(known) // 2] if known else 0.0
        return sorted(rates, key=lambda peer: -(rate if (rate := rates[peer]) is not None else middle))

    def working(self) -> bool:
        """Whether any request is under way."""
        return any(state.pipeline.asked for state in self._peers.values())

    # -- asking ----------------------------------------------------------------------------------

    def has_room(self, peer: P, now: float) -> bool:
        """Whether `requests` would ask this peer for anything: cheap, for after every read."""
        state = self._peers.get(peer)
        # Small writes cost as much as large ones: several blocks are asked for at once.
        return state is not None and state.pipeline.asked_bytes <= state.pipeline.window(now) * REFILL

    def requests(
        self,
        peer: P,
        room: int,
        now: float,
        *,
        allowed: Allowed = _always,
        budget: float = float("inf"),
        block_bytes: int | None = None,
    ) -> list[Key]:
        """What to ask `peer` for now, at most `room` requests and about `budget` bytes.

        `allowed` says whether a request may be sent: not while an earlier one for the same block stands.
        `block_bytes`: as for `add_peer`, where it has changed since.
        """
        state = self._peers.get(peer)
        if state is None or room <= 0 or not self.has_room(peer, now):
            return []
        pipeline = state.pipeline
        if block_bytes is not None:
            pipeline.block_bytes = block_bytes
        window = pipeline.window(now)
        keys: list[Key] = []
        while pipeline.asked_bytes < window and len(keys) < room and budget > 0:
            key = self._next(peer, state, now, allowed)
            if key is None:
                break
            self._ask(peer, state, key, now)
            keys.append(key)
            budget -= key[2]
        return keys

    def _ask(self, peer: P, state: _Peer, key: Key, now: float) -> None:
        piece, offset, _ = key
        opened = self._open[piece]
        opened.ask(peer, offset)
        opened.workers.add(peer)
        opened.spared_since = None
        state.pieces[piece] = None
        state.pipeline.ask(key, now)
        if not opened.todo:
            self._unasked.pop(piece, None)

    def _next(self, peer: P, state: _Peer, now: float, allowed: Allowed) -> Key | None:
        # Pieces that the peer works on or that nobody does; then a new one; then a share in another's.
        key = self._unasked_block(peer, state, now, allowed, join=False)
        if key is None and self._may_open():
            piece = self.picker.pick(peer)
            if piece is not None:
                self._begin(piece, state.pipeline.block_bytes)
                key = self._block_of(piece, allowed)
        if key is None:
            key = self._unasked_block(peer, state, now, allowed, join=True)
        if key is None and not self._unasked and not self.picker.free and not state.pipeline.snubbed:
            key = self._doubled(peer, state, now, allowed)
        return key

    def _may_open(self) -> bool:
        return self._open_bytes < MAX_OPEN_BYTES

    def _begin(self, piece: PieceIndex, grid: int, exclusive: bool = False) -> None:
        opened: OpenPiece[P] = OpenPiece(self._length_of(piece), grid, exclusive)
        self._open[piece] = opened
        self._unasked[piece] = None
        self._open_bytes += opened.length

    def _unasked_block(
        self, peer: P, state: _Peer, now: float, allowed: Allowed, *, join: bool
    ) -> Key | None:
        for piece in self._unasked:
            opened = self._open[piece]
            mine = peer in opened.workers
            if not mine and opened.workers and (opened.exclusive or not join):
                continue
            if not self.picker.peer_has(peer, piece) or not self._fits(opened, state):
                continue
            if not mine and opened.exclusive and not self._takes_alone(peer, piece, opened, now):
                continue
            key = self._block_of(piece, allowed)
            if key is not None:
                return key
        return None

    def _fits(self, opened: OpenPiece[P], state: _Peer) -> bool:
        """Whether the peer accepts blocks of this piece's size, which is changed when it can be."""
        if opened.grid > state.max_block:
            if opened.asked:
                return False
            opened.regrid(state.max_block)
        return True

    def _takes_alone(self, peer: P, piece: PieceIndex, opened: OpenPiece[P], now: float) -> bool:
        """Whether `peer` fetches this piece, which was bad before, now alone: one who sent no part of it
        then, if there is such a one who begins soon. To have it is not to give it."""
        senders = {suspect.sender for suspect in self._suspects.get(piece, ())}
        if peer in senders:
            others = [p for p, s in self._peers.items() if p not in senders and not s.pipeline.snubbed]
            if any(self.picker.peer_has(other, piece) for other in others):
                opened.spared_since = now if opened.spared_since is None else opened.spared_since
                if now - opened.spared_since < SPARED_S:
                    return False
        for other in set(opened.senders.values()) - {peer}:
            opened.drop_from(other)
        return True

    def _block_of(self, piece: PieceIndex, allowed: Allowed) -> Key | None:
        for offset, length in self._open[piece].spans():
            if allowed(piece, offset, length):
                return piece, offset, length
        return None

    def _doubled(self, peer: P, state: _Peer, now: float, allowed: Allowed) -> Key | None:
        """A block that another peer was asked for and that this one would bring much sooner."""
        for other, theirs in self._peers.items():
            if other == peer or not theirs.pipeline.asked:
                continue
            if not self._worth_doubling(state.pipeline, theirs.pipeline, now):
                continue
            for key in reversed(theirs.pipeline.asked):
                piece, offset, length = key
                opened = self._open.get(piece)
                if opened is None or opened.exclusive or len(opened.asked.get(offset, ())) >= MAX_REQUESTERS:
                    continue
                fits = length <= state.max_block and peer not in opened.asked.get(offset, ())
                if fits and self.picker.peer_has(peer, piece) and allowed(piece, offset, length):
                    return key
        return None

    def _worth_doubling(self, mine: Pipeline, theirs: Pipeline, now: float) -> bool:
        # If it never delivered, how long it has kept us waiting is the best guess of how long it will.
        waited = now - next(iter(theirs.asked.values()))
        left = theirs.eta(0, now) if theirs.measured else waited
        needed = mine.eta(mine.block_bytes, now) if mine.measured else MIN_DOUBLE_S
        return left > MIN_DOUBLE_S and left > GAIN * needed

    # -- what comes ------------------------------------------------------------------------------

    def block(self, peer: P, piece: PieceIndex, offset: int, data: Buffer, now: float) -> Arrived[P]:
        """A block that answers a request of ours."""
        key = (piece, offset, len(data))
        state = self._peers.get(peer)
        if state is None:
            return Arrived(wasted=len(data))
        state.pipeline.block(key, now)
        opened = self._open.get(piece)
        unwanted = opened is None or offset in opened.here or opened.span(offset) != (offset, len(data))
        if opened is None or unwanted or (opened.exclusive and peer not in opened.workers):
            if opened is not None:
                opened.give_back(peer, offset)
                self._note_unasked(piece, opened)
            return Arrived(wasted=len(data))
        cancels = []
        for other in opened.put(peer, offset, data):
            self._peers[other].pipeline.give_up(key)
            cancels.append((other, key))
        self._note_unasked(piece, opened)
        if not opened.complete:
            return Arrived(cancels=tuple(cancels))
        self._checking[piece] = self._close(piece)
        return Arrived(opened.data(), tuple(cancels))

    def _note_unasked(self, piece: PieceIndex, opened: OpenPiece[P]) -> None:
        if opened.todo:
            self._unasked[piece] = None
        else:
            self._unasked.pop(piece, None)

    def _give_back(self, peer: P, state: _Peer, key: Key) -> None:
        if not state.pipeline.give_up(key):
            return
        piece, offset, _ = key
        opened = self._open.get(piece)
        if opened is not None:
            opened.give_back(peer, offset)
            self._note_unasked(piece, opened)

    def rejected(self, peer: P, key: Key, *, lacks: bool) -> None:
        """The peer will not answer this request. `lacks`: it serves us, so it is for want of the piece."""
        state = self._peers.get(peer)
        if state is None:
            return
        self._give_back(peer, state, key)
        if lacks:
            self.picker.peer_lacks(peer, key[0])
        opened = self._open.get(key[0])
        if opened is not None and not any(peer in asked for asked in opened.asked.values()):
            opened.workers.discard(peer)
            state.pieces.pop(key[0], None)
            self._close_untouched(key[0])

    def timed_out(self, peer: P, key: Key) -> list[Key]:
        """The session gave a request up: the peer is late. Returns its other requests, to be cancelled."""
        state = self._peers.get(peer)
        if state is None:
            return []
        self._give_back(peer, state, key)
        return self._snub(peer, state)

    def _snub(self, peer: P, state: _Peer) -> list[Key]:
        keys = list(state.pipeline.asked)
        for key in keys:
            self._give_back(peer, state, key)
        self._stop_work(peer, state)
        state.pipeline.snubbed = True
        return keys

    def overdue(self, now: float) -> list[tuple[P, Key]]:
        """Requests to cancel because their peer is late and another one could deliver them.

        About once a second. The peer then gets one block at a time until it delivers again.
        """
        cancels: list[tuple[P, Key]] = []
        for peer, state in self._peers.items():
            if state.pipeline.late(now) and self._replaceable(peer, state):
                cancels += [(peer, key) for key in self._snub(peer, state)]
        return cancels

    def _replaceable(self, peer: P, state: _Peer) -> bool:
        pieces = {key[0] for key in state.pipeline.asked}
        others = [p for p, other in self._peers.items() if p != peer and not other.pipeline.snubbed]
        return any(self.picker.peer_has(other, piece) for piece in pieces for other in others)

    # -- verification ----------------------------------------------------------------------------

    def good(self, piece: PieceIndex) -> Good[P]:
        """`piece` is right and stored."""
        useless = self.picker.verified(piece)
        opened = self._checking.pop(piece, None)
        suspects = self._suspects.pop(piece, None)
        if opened is None or not suspects:
            return Good(useless, set())
        data = b"".join(opened.data())
        liars = {s.sender for s in suspects if _digest(data[s.offset : s.offset + s.length]) != s.digest}
        return Good(useless, liars)

    def bad(self, piece: PieceIndex) -> set[P]:
        """The hash of `piece` is wrong. Returns who is proven to have lied: its sender, if it was one."""
        opened = self._checking.pop(piece, None)
        if opened is None:
            return set()
        senders = set(opened.senders.values())
        if len(senders) == 1:
            if piece in self._suspects:
                self._begin(piece, opened.grid, exclusive=True)
            else:
                self.picker.put_back(piece)
            return senders
        suspects = self._suspects.setdefault(piece, [])
        for offset, data in opened.here.items():
            suspects.append(_Suspect(piece, offset, len(data), opened.senders[offset], _digest(data)))
        while len(self._suspects) > MAX_SUSPECTS:
            del self._suspects[next(iter(self._suspects))]
        self._begin(piece, opened.grid, exclusive=True)
        return set()
