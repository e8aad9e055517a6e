"""Which piece to begin next with which peer: one `Picker` is shared by all sessions of one item.

Owns: who has what, the order of pieces (a few at random first, then rarest first with shuffled ties), which
pieces nobody has begun. Does not own: blocks within a piece (`core.blocks`), who works on a begun piece and
the endgame (`core.scheduler`), time, or bytes.

Free pieces lie in buckets by availability; a bucket is an array with swap-removal, so that moving a piece
and picking from a peer that has everything cost O(1). So does every message of a peer but its bitfield, and
the one `Have` with which it comes to have everything: what it lacks from then on is noted apart.
"""

import random
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import PieceIndex

P = TypeVar("P", bound=Hashable)

RANDOM_FIRST_PIECES = 4
FEW = 48  # wanted pieces: looking at each is then faster than searching the buckets
MANY = 10_000  # free pieces: to draw some until the peer has one is then faster than to list those it has
DRAWS = 16


def bitfield_length(pieces: int) -> int:
    """Bytes of a bitfield over `pieces` pieces."""
    return (pieces + 7) // 8


def make_bitfield(have: Iterable[bool]) -> bytes:
    """The bitfield (bit 7 of byte 0 is piece 0) of a sequence of flags."""
    flags = list(have)
    bits = bytearray(bitfield_length(len(flags)))
    for piece, flag in enumerate(flags):
        if flag:
            bits[piece >> 3] |= 0x80 >> (piece & 7)
    return bytes(bits)


def read_bitfield(bits: bytes, pieces: int) -> set[PieceIndex]:
    """The pieces in a bitfield. Raises `RemoteProtocolError` for a wrong length or set spare bits."""
    if len(bits) != bitfield_length(pieces):
        raise RemoteProtocolError(f"a bitfield of {len(bits)} bytes for {pieces} pieces")
    if pieces & 7 and bits[-1] & (0xFF >> (pieces & 7)):
        raise RemoteProtocolError("a bitfield with spare bits set")
    return {PieceIndex(p) for p in range(pieces) if bits[p >> 3] & (0x80 >> (p & 7))}


class Picker(Generic[P]):
    """`P` identifies a peer (any hashable value)."""

    def __init__(self, pieces: int, have: Iterable[PieceIndex], rng: random.Random) -> None:
        self.pieces = pieces
        self._rng = rng
        self._have = set(have)
        # Peers with every piece are counted in _seeds instead; those that refused one count here as -1.
        self._availability = [0] * pieces
        self._seeds = 0
        self._peers: dict[P, set[PieceIndex] | None] = {}  # None: has everything but what is in _refused
        self._wanted: dict[P, set[PieceIndex]] = {}  # what it has and we lack; not kept for seeds
        self._refused: dict[P, set[PieceIndex]] = {}  # by seeds that refused any
        self._withheld: dict[P, set[PieceIndex]] = {}  # those of them that are missing here
        self._buckets: dict[int, list[PieceIndex]] = {}
        self._place: dict[PieceIndex, int] = {}
        order = [PieceIndex(p) for p in range(pieces) if p not in self._have]
        rng.shuffle(order)
        for piece in order:
            self._free(piece)

    # -- what is known ---------------------------------------------------------------------------

    @property
    def done(self) -> int:
        """Pieces that are verified."""
        return len(self._have)

    @property
    def complete(self) -> bool:
        return len(self._have) == self.pieces

    @property
    def free(self) -> int:
        """Pieces that are missing and that nobody has begun."""
        return len(self._place)

    def has(self, piece: PieceIndex) -> bool:
        return piece in self._have

    def bitfield(self) -> bytes:
        """The bitfield of the verified pieces."""
        return make_bitfield(piece in self._have for piece in range(self.pieces))

    def availability(self, piece: PieceIndex) -> int:
        """How many known peers have `piece`."""
        return self._availability[piece] + self._seeds

    def peer_has_all(self, peer: P) -> bool:
        return peer in self._peers and self._peers[peer] is None and not self._refused.get(peer)

    def peer_has(self, peer: P, piece: PieceIndex) -> bool:
        if peer not in self._peers:
            return False
        pieces = self._peers[peer]
        return piece not in self._refused.get(peer, ()) if pieces is None else piece in pieces

    def interesting(self, peer: P) -> bool:
        """Whether `peer` has a piece that is missing here."""
        wanted = self._wanted.get(peer)
        if wanted is not None:
            return bool(wanted)
        return peer in self._peers and self.pieces - self.done > len(self._withheld.get(peer, ()))

    # -- what peers have -------------------------------------------------------------------------

    def set_peer(self, peer: P, pieces: set[PieceIndex]) -> None:
        """A peer's bitfield arrived (once per peer)."""
        self.remove_peer(peer)
        if len(pieces) == self.pieces:
            self._peers[peer] = None
            self._seeds += 1
            return
        self._peers[peer] = set(pieces)
        self._wanted[peer] = pieces - self._have
        for piece in sorted(pieces):
            self._adjust(piece, 1)

    def peer_got(self, peer: P, piece: PieceIndex) -> bool:
        """A peer said `Have`. Whether that piece is missing here and was not known of that peer.

        Raises `RemoteProtocolError` when the piece does not exist.
        """
        if not 0 <= piece < self.pieces:
            raise RemoteProtocolError(f"piece {piece} of an item of {self.pieces}")
        if peer not in self._peers:
            self.set_peer(peer, set())
        if self.peer_has(peer, piece):
            return False
        pieces, missing = self._peers[peer], piece not in self._have
        if pieces is None:
            self._refused[peer].remove(piece)
            self._withheld[peer].discard(piece)
            self._adjust(piece, 1)
            return missing
        pieces.add(piece)
        if missing:
            self._wanted[peer].add(piece)
            self._adjust(piece, 1)
        else:
            self._availability[piece] += 1
        if len(pieces) == self.pieces:
            self.set_peer(peer, pieces)
        return missing

    def peer_lacks(self, peer: P, piece: PieceIndex) -> None:
        """A peer refused `piece` although it serves us: it counts as lacking it until it says `Have`."""
        if not self.peer_has(peer, piece):
            return
        pieces = self._peers[peer]
        if pieces is None:
            self._refused.setdefault(peer, set()).add(piece)
            withheld = self._withheld.setdefault(peer, set())
            if piece not in self._have:
                withheld.add(piece)
        else:
            pieces.remove(piece)
            self._wanted[peer].discard(piece)
        self._adjust(piece, -1)

    def remove_peer(self, peer: P) -> None:
        """A peer is gone: its pieces count no more."""
        if peer not in self._peers:
            return
        pieces = self._peers.pop(peer)
        self._wanted.pop(peer, None)
        self._withheld.pop(peer, None)
        for piece in sorted(self._refused.pop(peer, ())):
            self._adjust(piece, 1)
        if pieces is None:
            self._seeds -= 1
            return
        for piece in sorted(pieces):
            self._adjust(piece, -1)

    # -- picking ---------------------------------------------------------------------------------

    def pick(self, peer: P) -> PieceIndex | None:
        """Takes a free piece for `peer`; None when it has nothing that is wanted and not begun."""
        if peer not in self._peers or not self._place:
            return None
        wanted = self._wanted.get(peer)
        if wanted is not None and len(wanted) <= FEW:
            piece = self._of_few(wanted)
        elif self.done < RANDOM_FIRST_PIECES:
            piece = self._random(peer)
        else:
            piece = self._rarest(peer)
        if piece is not None:
            self._take(piece)
        return piece

    def _of_few(self, wanted: set[PieceIndex]) -> PieceIndex | None:
        free = [piece for piece in sorted(wanted) if piece in self._place]
        if not free:
            return None
        if self.done >= RANDOM_FIRST_PIECES:
            rarest = min(self._availability[piece] for piece in free)
            free = [piece for piece in free if self._availability[piece] == rarest]
        return self._rng.choice(free)

    def _random(self, peer: P) -> PieceIndex | None:
        among: Iterable[PieceIndex] = self._place
        if len(self._place) > MANY:
            for _ in range(DRAWS):
                piece = self._drawn()
                if self.peer_has(peer, piece):
                    return piece
            among = sorted(self._wanted[peer] & self._place.keys()) if peer in self._wanted else among
        free = [piece for piece in among if self.peer_has(peer, piece)]
        return self._rng.choice(free) if free else None

    def _drawn(self) -> PieceIndex:
        """Any free piece, of which there is one."""
        number = self._rng.randrange(len(self._place))
        for bucket in self._buckets.values():
            if number < len(bucket):
                return bucket[number]
            number -= len(bucket)
        raise AssertionError("the buckets hold all free pieces")

    def _rarest(self, peer: P) -> PieceIndex | None:
        wanted, refused = self._wanted.get(peer), self._refused.get(peer, ())
        misses = 0
        for level in sorted(self._buckets):
            for piece in self._buckets[level]:
                if piece not in refused if wanted is None else piece in wanted:
                    return piece
                misses += 1
                if wanted is not None and misses > len(wanted):  # then to look at those is faster after all
                    return self._of_few(wanted)
        return None

    def put_back(self, piece: PieceIndex) -> None:
        """Nobody works on `piece` any more, and nothing of it is here."""
        if piece not in self._have and piece not in self._place:
            self._free(piece)

    def verified(self, piece: PieceIndex) -> list[P]:
        """`piece` is on disk and right. Returns the peers that have nothing more that is missing here."""
        self._have.add(piece)
        self._take(piece)
        useless = []
        for peer, wanted in self._wanted.items():
            if piece in wanted:
                wanted.remove(piece)
                if not wanted:
                    useless.append(peer)
        for peer, withheld in self._withheld.items():
            withheld.discard(piece)
            if not self.interesting(peer):
                useless.append(peer)
        return useless

    # -- buckets ---------------------------------------------------------------------------------

    def _adjust(self, piece: PieceIndex, by: int) -> None:
        free = piece in self._place
        self._take(piece)
        self._availability[piece] += by
        if free:
            self._free(piece)

    def _free(self, piece: PieceIndex) -> None:
        bucket = self._buckets.setdefault(self._availability[piece], [])
        bucket.append(piece)
        # A random seat keeps ties shuffled whatever the order of events.
        seat = int(self._rng.random() * len(bucket))
        other = bucket[seat]
        bucket[-1], bucket[seat] = other, piece
        self._place[other] = len(bucket) - 1
        self._place[piece] = seat

    def _take(self, piece: PieceIndex) -> None:
        seat = self._place.pop(piece, None)
        if seat is None:
            return
        level = self._availability[piece]
        bucket = self._buckets[level]
        last = bucket.pop()
        if last != piece:
            bucket[seat] = last
            self._place[last] = seat
        if not bucket:
            del self._buckets[level]
