"""Who may download from us now: one ranking function over a sequence of peers, and its timing.

Owns: the upload slots, their ranking every 10 s, the optimistic slot every 30 s, the allowance for
newcomers. Does not own: sending `Choke` and `Unchoke`, measuring rates.

While we fetch, the slots go to those who give us most (who gives, gets). Where we only serve there is
nothing to compare: whoever holds a slot keeps it for `TENURE_S`, then the longest waiting goes first. One
slot is given by chance, mostly to newcomers, who have nothing to give yet.
"""

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

P = TypeVar("P", bound=Hashable)

UPLOAD_SLOTS = 8
TENURE_S = 10.0
OPTIMISTIC_S = 30.0
NEWCOMER_S = 60.0
NEWCOMER_WEIGHT = 3
NOISE = 1.3  # a rate must be so many times another's to count as higher


@dataclass(frozen=True, slots=True)
class Candidate(Generic[P]):
    """A peer that may get a slot. `since`: when it was last choked or unchoked; `joined`: when its session
    opened (monotonic seconds); `gives`: bytes per second it sends us, None where we fetch nothing from it
    or have not measured it."""

    peer: P
    interested: bool
    unchoked: bool
    since: float
    joined: float = 0.0
    gives: float | None = None


def choose_unchoked(candidates: Sequence[Candidate[P]], now: float, slots: int = UPLOAD_SLOTS) -> set[P]:
    """The peers to keep or make unchoked by rotation, at most `slots`.

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


def rank_by_giving(candidates: Sequence[Candidate[P]], now: float) -> list[Candidate[P]]:
    """Those who want something, best first: by what they give, a holder before others of about its rate."""

    def worth(candidate: Candidate[P]) -> float:
        gives = candidate.gives or 0.0
        return gives * NOISE if candidate.unchoked else gives

    wanting = [candidate for candidate in candidates if candidate.interested]
    return sorted(wanting, key=lambda c: (-worth(c), not c.unchoked, c.since))


class Choker(Generic[P]):
    """`choose` is called about once a second, and whenever interest changes."""

    def __init__(self, slots: int = UPLOAD_SLOTS) -> None:
        self.slots = slots
        self._ranked_at = float("-inf")
        self._best: set[P] = set()
        self._optimistic: P | None = None
        self._optimistic_since = float("-inf")

    def choose(self, candidates: Sequence[Candidate[P]], now: float, rng: random.Random) -> set[P]:
        """The peers to keep or make unchoked, at most `slots`."""
        wanting = sum(1 for candidate in candidates if candidate.interested or candidate.unchoked)
        if wanting <= self.slots:
            return {c.peer for c in candidates if c.interested or c.unchoked}
        optimistic = self._choose_optimistic(candidates, now, rng)
        regular = [candidate for candidate in candidates if candidate.peer not in optimistic]
        slots = self.slots - len(optimistic)
        trading = [candidate for candidate in regular if candidate.gives is not None]
        serving = [candidate for candidate in regular if candidate.gives is None]
        for_trade = self._share(trading, serving, slots)
        chosen = self._traders(trading, now, for_trade)
        return optimistic | chosen | choose_unchoked(serving, now, slots - len(chosen))

    def _share(self, trading: list[Candidate[P]], serving: list[Candidate[P]], slots: int) -> int:
        """Slots for those who give: in proportion, so that who only takes is served as well."""
        traders = sum(1 for candidate in trading if candidate.interested)
        takers = sum(1 for candidate in serving if candidate.interested)
        if not traders or not takers:
            return slots if traders else 0
        return min(max(1, round(slots * traders / (traders + takers))), slots - 1)

    def _traders(self, trading: list[Candidate[P]], now: float, slots: int) -> set[P]:
        ranked = [candidate.peer for candidate in rank_by_giving(trading, now)]
        if now - self._ranked_at >= TENURE_S:
            self._ranked_at = now
            self._best = set(ranked[:slots])
        kept = [peer for peer in ranked if peer in self._best][:slots]
        # Between two rankings only slots that became free are given away.
        return set((kept + [peer for peer in ranked if peer not in self._best])[:slots])

    def _choose_optimistic(
        self, candidates: Sequence[Candidate[P]], now: float, rng: random.Random
    ) -> set[P]:
        if self.slots < 2:
            return set()
        interested = {candidate.peer for candidate in candidates if candidate.interested}
        due = now - self._optimistic_since >= OPTIMISTIC_S or self._optimistic not in interested
        if due:
            waiting = [c for c in candidates if c.interested and not c.unchoked]
            if waiting:
                weights = [NEWCOMER_WEIGHT if now - c.joined < NEWCOMER_S else 1 for c in waiting]
                self._optimistic = rng.choices([c.peer for c in waiting], weights)[0]
                self._optimistic_since = now
        if self._optimistic is None or self._optimistic not in interested:
            return set()
        return {self._optimistic}
