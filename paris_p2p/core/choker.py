"""Who may download from us now: one ranking function over a sequence of peers.

Owns: the number of upload slots and their rotation. Does not own: sending `Choke` and `Unchoke`.
Fair queueing: whoever holds a slot keeps it for `TENURE_S`, then the longest waiting goes first.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

P = TypeVar("P", bound=Hashable)

UPLOAD_SLOTS = 8
TENURE_S = 10.0


@dataclass(frozen=True, slots=True)
class Candidate(Generic[P]):
    """A peer that may get a slot. `since`: when it was last choked or unchoked (monotonic seconds)."""

    peer: P
    interested: bool
    unchoked: bool
    since: float


def choose_unchoked(candidates: Sequence[Candidate[P]], now: float, slots: int = UPLOAD_SLOTS) -> set[P]:
    """The peers to keep or make unchoked, at most `slots`.

    A holder that wants nothing at the moment keeps its slot while nobody else needs it: interest comes and
    goes with every piece, and each choke costs the requests under way.
    """

    def rank(candidate: Candidate[P]) -> tuple[int, float]:
        if not candidate.interested:
            return (3, -candidate.since)
        in_tenure = candidate.unchoked and now - candidate.since < TENURE_S
        if in_tenure:
            return (0, candidate.since)
        # Waiting peers come before a holder whose tenure is over; among equals the longest wait wins.
        return (2, -candidate.since) if candidate.unchoked else (1, candidate.since)

    wanting = sorted((c for c in candidates if c.interested or c.unchoked), key=rank)
    return {candidate.peer for candidate in wanting[:slots]}
