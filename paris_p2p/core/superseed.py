"""A seeder alone with a crowd sends each piece once before it repeats any: what it shows to whom, and when.

Owns: which pieces are still hidden, to which peer each was shown, when showing all is better. Does not own:
the messages (a zero bitfield, then `Have`s to one peer each; requests for pieces that are another's now are
rejected), upload slots, or what leechers do.

Why: leechers that see everything at once pick without knowing what the others are picking; towards the end
of the first copy most of what they ask for twice is asked of the seeder, whose uplink is what the whole
crowd waits for. Pieces are shown in small portions, first to the peers whose earlier pieces were seen
elsewhere: who does not pass on gets no more than its share of patience. As soon as every piece was
sent once or is held by a peer, or while there is only one peer, everything is shown to everyone.
"""

import random
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from paris_p2p.core.rate import RateMeter
from paris_p2p.ids import PieceIndex

P = TypeVar("P", bound=Hashable)

FIRST_PORTION_BYTES = 1 << 20
PORTION_S = 0.7  # of what it takes: shown and not sent yet
MIN_PORTION = 2  # pieces
MAX_PORTION = 128
ALONE_S = 0.5  # a single peer for so long: it is no crowd
ALONE_PORTION_BYTES = 32 << 20  # until then
DEBT_FACTOR = 1.5  # of the usual number of pieces not passed on: above that others come first
DEBT_SLACK = 4  # pieces
STUCK_S = 10.0  # a shown piece without a byte sent
HAVES_AT_ONCE = 4096
MAX_PIECES = 16_384  # of an item that is shown piece by piece: more would cost more than it saves


@dataclass(slots=True)
class _Shown:
    since: float  # of the last thing that happened to it
    left: int  # bytes not sent
    requested: bool = False


@dataclass(slots=True)
class _Peer:
    since: float
    taken: RateMeter  # bytes of shown pieces that it was sent or announced
    has: set[PieceIndex] = field(default_factory=set)
    shown: set[PieceIndex] = field(default_factory=set)
    waiting: dict[PieceIndex, _Shown] = field(default_factory=dict)  # shown to it alone, not sent in full
    debt: set[PieceIndex] = field(default_factory=set)  # shown to it alone, not seen at anyone else
    everything: bool = False  # all pieces are shown to it
    idled: int = 0  # pieces that were taken from it because nothing came of them, since it last took one


class SuperSeed(Generic[P]):
    """One item that is complete here. `piece_bytes`: its piece length; `length_of`: bytes of a piece, where
    some are shorter. `active` False: show all from the start."""

    def __init__(
        self,
        pieces: int,
        piece_bytes: int,
        rng: random.Random,
        *,
        length_of: Callable[[PieceIndex], int] | None = None,
        active: bool = True,
    ) -> None:
        self.pieces = pieces
        self.active = active and 1 < pieces <= MAX_PIECES
        self._piece_bytes = piece_bytes
        self._length_of = length_of or (lambda piece: piece_bytes)
        order = [PieceIndex(p) for p in range(pieces)] if self.active else []
        rng.shuffle(order)
        self._hidden: dict[PieceIndex, None] = dict.fromkeys(order)
        self._seen = [0] * pieces  # peers that announced it
        self._given: set[PieceIndex] = set()  # sent in full, or seen at a peer
        self._target: dict[PieceIndex, P] = {}
        self._peers: dict[P, _Peer] = {}

    # -- peers -----------------------------------------------------------------------------------

    def opened(self, peer: P, now: float) -> bool:
        """A session is open. True: send an empty bitfield; False: the full one."""
        state = self._peers[peer] = _Peer(now, RateMeter(now, 2.0))
        state.everything = not self.active
        return self.active

    def closed(self, peer: P) -> None:
        """The peer is gone; what only it has, or was to get, is hidden again."""
        state = self._peers.pop(peer, None)
        if state is None:
            return
        for piece in state.has:
            self._seen[piece] -= 1
        for piece in sorted(state.has | state.debt):
            if self._target.get(piece) == peer:
                del self._target[piece]  # a piece seen elsewhere has no target any more
            if self.active and not self._seen[piece] and piece not in self._target:
                self._given.discard(piece)
                self._hidden[piece] = None

    def has(self, peer: P, pieces: Iterable[PieceIndex], now: float) -> None:
        """The peer announced these pieces, by bitfield or one at a time."""
        state = self._peers.get(peer)
        if state is None:
            return
        for piece in pieces:
            if not 0 <= piece < self.pieces or piece in state.has:
                continue
            state.has.add(piece)
            self._seen[piece] += 1
            self._hidden.pop(piece, None)
            self._give(peer, state, piece, now)
            target = self._target.get(piece)
            if target is not None and target != peer:
                del self._target[piece]
                self._peers[target].debt.discard(piece)
                self._peers[target].waiting.pop(piece, None)

    def _give(self, peer: P, state: _Peer, piece: PieceIndex, now: float) -> None:
        """The peer has all of `piece`."""
        if state.waiting.pop(piece, None) is not None:
            state.taken.add(self._piece_bytes, now)
            state.idled = 0
        self._given.add(piece)
        if self.active and len(self._given) == self.pieces:
            self._end()

    def _end(self) -> None:
        self.active = False
        self._hidden.clear()
        self._target.clear()
        for state in self._peers.values():
            state.waiting.clear()
            state.debt.clear()

    # -- requests --------------------------------------------------------------------------------

    def requested(self, peer: P, piece: PieceIndex, now: float) -> bool:
        """Whether to serve this request; False: it is another's piece now, reject it."""
        state = self._peers.get(peer)
        if not self.active or state is None or not 0 <= piece < self.pieces:
            return True
        if piece in state.waiting:
            state.waiting[piece].requested = True
            return True
        target = self._target.get(piece)
        if target is not None and target != peer and not self._seen[piece] and len(self._peers) > 1:
            state.shown.discard(piece)
            if state.everything:
                state.everything = False
                state.shown = {PieceIndex(p) for p in range(self.pieces) if p != piece}
            return False
        if piece in self._hidden:
            self._show(peer, state, piece, now)
            state.waiting[piece].requested = True
        return True

    def sent(self, peer: P, piece: PieceIndex, count: int, now: float) -> None:
        """`count` bytes of `piece` were sent to `peer`."""
        state = self._peers.get(peer)
        shown = None if state is None else state.waiting.get(piece)
        if state is not None and shown is not None:
            shown.left -= count
            shown.since = now
            if shown.left <= 0:
                self._give(peer, state, piece, now)

    # -- showing ---------------------------------------------------------------------------------

    def reveals(self, serving: Collection[P], now: float) -> list[tuple[P, PieceIndex]]:
        """What to show now (`Have` to that peer). `serving`: the peers that are unchoked.

        To be called after anything that happens, and about twice a second.
        """
        if not self.active:
            return self._show_all(list(self._peers), now)
        if len(self._peers) == 1:
            peer, state = next(iter(self._peers.items()))
            if now - state.since >= ALONE_S:
                return self._show_all([peer], now)
        out: list[tuple[P, PieceIndex]] = []
        for peer, state in self._peers.items():
            # A first piece makes a choked peer interested, so that it can get a slot.
            if not (state.shown or state.everything) and peer not in serving:
                out += self._show_one(peer, state, now)
        open_ = {peer for peer in serving if peer in self._peers}
        while (chosen := self._neediest(open_, now)) is not None:
            shown = self._show_one(chosen, self._peers[chosen], now)
            if not shown:
                open_.discard(chosen)
            out += shown
        return out

    def _neediest(self, among: Collection[P], now: float) -> P | None:
        """Whom to show the next piece: of those whose portion is not full the least in debt, but first those
        who make something of what they are shown: else a few who do not could hand the last pieces back and
        forth, and nobody would get them."""
        debts = sorted(len(self._peers[peer].debt) for peer in among)
        if not debts:
            return None
        limit = DEBT_FACTOR * debts[(len(debts) - 1) // 2] + self._slack()
        room = [
            (state.idled, len(state.debt), number, peer)
            for number, (peer, state) in enumerate(self._peers.items())
            if peer in among
            and not state.everything  # it knows what to ask for
            and len(state.debt) <= limit
            and len(state.waiting) < self._portion(state, now)
        ]
        return min(room, key=lambda entry: entry[:3])[3] if room else None

    def _slack(self) -> int:
        return max(DEBT_SLACK, FIRST_PORTION_BYTES // self._piece_bytes)

    def _portion(self, state: _Peer, now: float) -> int:
        first = ALONE_PORTION_BYTES if len(self._peers) == 1 else FIRST_PORTION_BYTES
        wanted = max(first, int(state.taken.rate(now) * PORTION_S))
        return max(MIN_PORTION, min(MAX_PORTION, wanted // self._piece_bytes))

    def _show_one(self, peer: P, state: _Peer, now: float) -> list[tuple[P, PieceIndex]]:
        piece = next((p for p in self._hidden if p not in state.has and p not in state.shown), None)
        if piece is None:
            piece = self._taken_over(peer, state, now)
        if piece is None:
            return []
        self._show(peer, state, piece, now)
        return [(peer, piece)]

    def _show(self, peer: P, state: _Peer, piece: PieceIndex, now: float) -> None:
        self._hidden.pop(piece, None)
        self._target[piece] = peer
        state.shown.add(piece)
        state.waiting[piece] = _Shown(now, self._length_of(piece))
        state.debt.add(piece)

    def _taken_over(self, peer: P, state: _Peer, now: float) -> PieceIndex | None:
        """A piece that was shown to another peer, who has not asked for it or does not get on with it."""
        victims = sorted(
            (entry for entry in self._peers.items() if entry[0] != peer),
            key=lambda entry: -len(entry[1].waiting),
        )
        for _, other in victims:
            for piece, shown in reversed(other.waiting.items()):
                spare = not shown.requested and len(other.waiting) > len(state.waiting) + 1
                stuck = now - shown.since > STUCK_S
                if piece not in state.has and (spare or stuck):
                    other.idled += stuck
                    del other.waiting[piece]
                    other.debt.discard(piece)
                    if not other.everything:
                        other.shown.discard(piece)
                    return piece
        return None

    def _show_all(self, peers: list[P], now: float) -> list[tuple[P, PieceIndex]]:
        out: list[tuple[P, PieceIndex]] = []
        for peer in peers:
            state = self._peers[peer]
            if state.everything:
                continue
            hidden = [
                PieceIndex(p) for p in range(self.pieces) if p not in state.shown and p not in state.has
            ]
            for piece in hidden[:HAVES_AT_ONCE]:
                state.shown.add(piece)
                out.append((peer, piece))
            state.everything = len(hidden) <= HAVES_AT_ONCE
        return out
