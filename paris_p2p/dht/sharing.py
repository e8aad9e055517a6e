"""Sharing out what is scarce among those who ask for it, or who filled it. Pure.

Owns: room for several by need, the order in which a flood stands behind everybody else, how much of a node's
time each peer may take. Does not own: what is shared (records: `record_storage`; checks: `hardened`).
"""

from collections.abc import Hashable, Iterable, Mapping
from itertools import chain, zip_longest
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
_NOTHING: Any = object()

MAX_KNOWN = 4096
"""Peers whose use is remembered. One that is forgotten has its burst again, as any new one."""


def levelled(wanted: Mapping[Key, int], total: int) -> dict[Key, int]:
    """What of `total` each gets: all the same, but nobody more than it wants; what that leaves goes to the
    others."""
    shares: dict[Key, int] = {}
    left = total
    for number, (key, want) in enumerate(sorted(wanted.items(), key=lambda item: item[1])):
        shares[key] = min(want, left // (len(wanted) - number))
        left -= shares[key]
    return shares


def in_turns(groups: Iterable[Iterable[Item]]) -> list[Item]:
    """The first of each group, then the second of each, and so on."""
    rounds = zip_longest(*groups, fillvalue=_NOTHING)
    return [item for item in chain.from_iterable(rounds) if item is not _NOTHING]


class Allowance:
    """How much each may take: `burst` at once, refilled at `per_s` a second."""

    def __init__(self, burst: int, per_s: float) -> None:
        self._burst, self._per_s = burst, per_s
        self._left: dict[Hashable, tuple[float, float]] = {}  # who -> what was left, when; the latest last

    def take(self, who: Hashable, wanted: int, now: float) -> int:
        """How many of the `wanted` it gets. `now`: monotonic seconds."""
        left, at = self._left.pop(who, (float(self._burst), now))
        left = min(float(self._burst), left + (now - at) * self._per_s)
        given = min(wanted, int(left))
        self._left[who] = (left - given, now)
        if len(self._left) > MAX_KNOWN:
            del self._left[next(iter(self._left))]
        return given
