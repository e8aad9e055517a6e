"""Whether the network, seen through several bootstrap nodes, is one.

Owns: comparing what they lead to, when it is certain that parts do not know each other, and what each then
lacks. Does not own: looking, introducing the parts to each other, telling anyone (`membership`). Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

MAX_COMPARED = 256
"""Records of one key. A key that somebody floods differs everywhere and always: that is no split."""
UNSEEN_ROUNDS = 4
"""After so many looks in a row that settle nothing, an earlier finding is no longer held to be true."""


@dataclass(slots=True)
class Part:
    """The network as one bootstrap node leads to it.

    `nodes`: DHT ids nearest to us, with its own; `nearest`: per target {DHT id: peer}, nearest first;
    `found`: live records, per key {owner: value with expiration}.
    """

    address: str
    nodes: frozenset[Any]
    nearest: Mapping[Any, Mapping[Any, Any]] = field(default_factory=dict)
    found: Mapping[Any, Mapping[Any, Any]] = field(default_factory=dict)

    def lacks(self, other: "Part") -> frozenset[tuple[Any, Any]]:
        """(key, owner) of the records that only one of the two shows, of keys that are not flooded."""
        keys = _comparable((self, other))
        mine, theirs = (
            {(key, owner) for key in keys for owner in part.found.get(key, ())} for part in (self, other)
        )
        return frozenset(mine ^ theirs)


Pair = tuple[Part, Part]


def _comparable(parts: Sequence[Part]) -> list[Any]:
    """The keys that no part shows flooded."""
    keys = {key: None for part in parts for key in part.found}
    return [key for key in keys if max(len(part.found.get(key, ())) for part in parts) <= MAX_COMPARED]


def missing(parts: Sequence[Part], apart: Sequence[Pair]) -> list[tuple[Part, Any, dict[Any, Any]]]:
    """(part, key, {owner: its latest value with expiration}) of the records that a part lacks and one that is
    certainly apart from it shows, of keys that none of the `parts` shows flooded: what is completed is
    delivered in the name of who completes it, and takes places from what that one delivers for itself."""
    keys = _comparable(parts)
    lacking: dict[tuple[str, Any], tuple[Part, Any, dict[Any, Any]]] = {}
    for part, other in [*apart, *((two, one) for one, two in apart)]:
        for key in keys:
            held = part.found.get(key, {})
            for owner, item in other.found.get(key, {}).items():
                if owner in held:
                    continue
                latest = lacking.setdefault((part.address, key), (part, key, {}))[2]
                if owner not in latest or latest[owner].expiration_time < item.expiration_time:
                    latest[owner] = item
    return list(lacking.values())


@dataclass(frozen=True, slots=True)
class Verdict:
    """`suspects`: pairs that seem not to know each other. `proven`: those where it is certain. `whole`: it is
    certain that all know each other. With neither, the next look decides."""

    suspects: tuple[Pair, ...] = ()
    proven: tuple[Pair, ...] = ()
    whole: bool = False


class Comparison:
    """Look after look. Two parts are apart when they have no node in common (a lone bootstrap node may just
    have started: certain at the first look or the second time running) or when the same record is missing in
    one of them twice running: one that has just been stored may have been seen by one look only."""

    def __init__(self) -> None:
        self._before: dict[frozenset[str], frozenset[Any]] = {}  # suspected pair -> records missing last time
        self._first = True
        self._unsettled = 0

    @property
    def unseen(self) -> bool:
        """Whether nothing has been certain for so long that an earlier finding says nothing any more."""
        return self._unsettled >= UNSEEN_ROUNDS

    def judge(self, parts: Sequence[Part]) -> Verdict:
        """What one look says; fewer than two parts: that there was nothing to compare."""
        if len(parts) < 2:
            self._unsettled += 1
            return Verdict()
        before, self._before, first, self._first = self._before, {}, self._first, False
        suspects, proven, separate_pairs = [], [], 0
        for one, other in combinations(parts, 2):
            pair = frozenset({one.address, other.address})
            separate, missing = not one.nodes & other.nodes, one.lacks(other)
            if separate or missing:
                suspects.append((one, other))
                self._before[pair] = missing
            lone = min(len(one.nodes), len(other.nodes)) == 1
            separate_pairs += separate
            if (separate and (first or not lone or pair in before)) or missing & before.get(
                pair, frozenset()
            ):
                proven.append((one, other))
        whole = not proven and not separate_pairs
        self._unsettled = 0 if proven or whole else self._unsettled + 1
        return Verdict(tuple(suspects), tuple(proven), whole)
