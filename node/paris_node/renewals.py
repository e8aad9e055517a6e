"""Whether a node loses its lease again and again.

Owns: counting the leases lost one after another. Does not own: the lease (`core.lease`), telling people
(`volunteer`).
"""

MANY = 3
STEADY_LEASES = 5.0
"""A lease that was kept for so many times its length ends the row."""


class Renewals:
    """The leases of one node that could not be renewed. `ttl_s`: a lease's length; times are monotonic."""

    def __init__(self, ttl_s: float) -> None:
        self._steady_s = STEADY_LEASES * ttl_s
        self._won_at = 0.0
        self._lost = 0
        self._said = False

    def won(self, now: float) -> None:
        """A role is held from now on."""
        self._won_at = now

    def lost(self, now: float) -> bool:
        """The lease could not be renewed. Whether that is to be said: the third time in a row, once."""
        self._lost = 1 if now - self._won_at > self._steady_s else self._lost + 1
        if self._lost < MANY or self._said:
            return False
        self._said = True
        return True
