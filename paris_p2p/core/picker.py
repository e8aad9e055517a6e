"""Which piece to fetch next from which peer: one `Picker` is shared by all sessions of one item.

Owns: the order of pieces (a few at random first, then rarest first with shuffled ties), who is fetching
what, and the bounded endgame. A piece is assigned to a peer as a whole, so that a bad piece names its
sender. Does not own: blocks within a piece (`core.pipeline`), time, or bytes.

Free pieces lie in buckets by availability; a bucket is an array with swap-removal, so that moving a piece
and picking from a peer that has everything cost O(1).
"""

import random
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import PieceIndex

P = TypeVar("P", bound=Hashable)

RANDOM_FIRST_PIECES = 4
MAX_OWNERS = 2


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
    """The shared state of one item's download. `P` identifies a peer (any hashable value)."""

    def __init__(self, pieces: int, have: Iterable[PieceIndex], rng: random.Random) -> None:
        self.pieces = pieces
        self._rng = rng
        self._have = set(have)
        self._availability = [0] * pieces  # peers with every piece are counted in _seeds instead
        self._seeds = 0
        self._peers: dict[P, set[PieceIndex] | None] = {}  # None: has everything
        self._owners: dict[PieceIndex, list[P]] = {}  # in order of assignment
        self._delivered: set[PieceIndex] = set()  # all bytes here, not yet verified
        self._buckets: list[list[PieceIndex]] = [[]]
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

    def has(self, piece: PieceIndex) -> bool:
        return piece in self._have

    def bitfield(self) -> bytes:
        """The bitfield of the verified pieces."""
        return make_bitfield(piece in self._have for piece in range(self.pieces))

    def availability(self, piece: PieceIndex) -> int:
        """How many known peers have `piece`."""
        return self._availability[piece] + self._seeds

    def peer_has_all(self, peer: P) -> bool:
        return peer in self._peers and self._peers[peer] is None

    def peer_has(self, peer: P, piece: PieceIndex) -> bool:
        if peer not in self._peers:
            return False
        pieces = self._peers[peer]
        return pieces is None or piece in pieces

    def owners(self, piece: PieceIndex) -> list[P]:
        """The peers that fetch `piece` now."""
        return list(self._owners.get(piece, ()))

    def interesting(self, peer: P) -> bool:
        """Whether `peer` has a piece that is missing here."""
        if peer not in self._peers or self.complete:
            return False
        pieces = self._peers[peer]
        return pieces is None or not pieces <= self._have

    # -- what peers have -------------------------------------------------------------------------

    def set_peer(self, peer: P, pieces: set[PieceIndex]) -> None:
        """A peer's bitfield arrived (once per peer)."""
        self.remove_peer(peer)
        if len(pieces) == self.pieces:
            self._peers[peer] = None
            self._seeds += 1
            return
        self._peers[peer] = set(pieces)
        for piece in sorted(pieces):
            self._adjust(piece, 1)

    def peer_got(self, peer: P, piece: PieceIndex) -> None:
        """A peer said `Have`. Raises `RemoteProtocolError` when the piece does not exist."""
        if not 0 <= piece < self.pieces:
            raise RemoteProtocolError(f"piece {piece} of an item of {self.pieces}")
        pieces = self._peers.setdefault(peer, set())
        if pieces is None or piece in pieces:
            return
        pieces.add(piece)
        self._adjust(piece, 1)
        if len(pieces) == self.pieces:
            self.set_peer(peer, pieces)

    def remove_peer(self, peer: P) -> None:
        """A peer is gone: its pieces count no more, and what it was fetching is free again."""
        if peer not in self._peers:
            return
        for piece in [piece for piece, owners in self._owners.items() if peer in owners]:
            self.release(peer, piece)
        pieces = self._peers.pop(peer)
        if pieces is None:
            self._seeds -= 1
            return
        for piece in sorted(pieces):
            self._adjust(piece, -1)

    # -- picking ---------------------------------------------------------------------------------

    def pick(self, peer: P, prefer: Iterable[PieceIndex] = (), endgame: bool = False) -> PieceIndex | None:
        """Assigns a piece to `peer` and returns it; None when it has nothing that is wanted.

        `prefer`: pieces of which this peer already delivered a part. `endgame`: allow a second peer on a
        piece once no piece is free, the longest assigned first.
        """
        if peer not in self._peers:
            return None
        piece = self._preferred(peer, prefer)
        if piece is None and self.done < RANDOM_FIRST_PIECES:
            piece = self._random(peer)
        if piece is None:
            piece = self._rarest(peer)
        if piece is None and endgame and not self._place:
            piece = self._doubled(peer)
        if piece is not None:
            self._take(piece)
            self._owners.setdefault(piece, []).append(peer)
        return piece

    def _preferred(self, peer: P, prefer: Iterable[PieceIndex]) -> PieceIndex | None:
        return next((p for p in prefer if p in self._place and self.peer_has(peer, p)), None)

    def _random(self, peer: P) -> PieceIndex | None:
        wanted = [p for p in self._place if self.peer_has(peer, p)]
        return self._rng.choice(wanted) if wanted else None

    def _rarest(self, peer: P) -> PieceIndex | None:
        pieces = self._peers[peer]
        for bucket in self._buckets:
            for piece in bucket:
                if pieces is None or piece in pieces:
                    return piece
        return None

    def _doubled(self, peer: P) -> PieceIndex | None:
        for piece, owners in self._owners.items():
            room = len(owners) < MAX_OWNERS and peer not in owners and piece not in self._delivered
            if room and self.peer_has(peer, piece):
                return piece
        return None

    def delivered(self, piece: PieceIndex) -> None:
        """All bytes of `piece` came from one of its owners and wait to be verified: no endgame on it."""
        self._delivered.add(piece)

    def release(self, peer: P, piece: PieceIndex) -> None:
        """`peer` no longer fetches `piece` (refused, late, bad, gone)."""
        owners = self._owners.get(piece, [])
        if peer not in owners:
            return
        owners.remove(peer)
        self._delivered.discard(piece)
        if not owners:
            del self._owners[piece]
            if piece not in self._have:
                self._free(piece)

    def verified(self, piece: PieceIndex) -> list[P]:
        """`piece` is on disk and right. Returns the peers that were fetching it."""
        self._have.add(piece)
        self._delivered.discard(piece)
        self._take(piece)
        return self._owners.pop(piece, [])

    # -- buckets ---------------------------------------------------------------------------------

    def _adjust(self, piece: PieceIndex, by: int) -> None:
        free = piece in self._place
        self._take(piece)
        self._availability[piece] += by
        if free:
            self._free(piece)

    def _free(self, piece: PieceIndex) -> None:
        level = self._availability[piece]
        while len(self._buckets) <= level:
            self._buckets.append([])
        bucket = self._buckets[level]
        bucket.append(piece)
        # A random seat keeps ties shuffled whatever the order of events.
        seat = self._rng.randrange(len(bucket))
        other = bucket[seat]
        bucket[-1], bucket[seat] = other, piece
        self._place[other] = len(bucket) - 1
        self._place[piece] = seat

    def _take(self, piece: PieceIndex) -> None:
        seat = self._place.pop(piece, None)
        if seat is None:
            return
        bucket = self._buckets[self._availability[piece]]
        last = bucket.pop()
        if last != piece:
            bucket[seat] = last
            self._place[last] = seat
