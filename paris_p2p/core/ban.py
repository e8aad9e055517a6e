"""Bans that decay. Owns: who is not dialled or served for now, and why.

A ban always ends: the liar of an hour ago may be the last holder today, and what it sends is verified
anyway. While no other source is known a ban counts for `LAST_HOLDER_S` only.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

P = TypeVar("P", bound=Hashable)

FIRST_BAN_S = 60.0
MAX_BAN_S = 3600.0
LAST_HOLDER_S = 5.0
FORGIVE_S = 1800.0
FORGET_EVERY_S = 5.0  # looking through all of them at each strike would let a crowd of strangers hold us up
MAX_BANS = 10_000


@dataclass(frozen=True, slots=True)
class Ban:
    """`strikes` offences so far, the last at `since`; banned until `until` (monotonic seconds)."""

    strikes: int
    since: float
    until: float
    reason: str


class BanList(Generic[P]):
    """Each further strike bans four times as long; half an hour after its last ban a peer is forgotten,
    and the one struck longest ago when there are more than `MAX_BANS`."""

    def __init__(self) -> None:
        self._bans: dict[P, Ban] = {}  # the one struck longest ago first
        self._looked = float("-inf")  # for what can be forgotten

    def strike(self, peer: P, reason: str, now: float) -> Ban:
        """Bans `peer` from `now` on."""
        old = self._bans.pop(peer, None)
        strikes = 1 if old is None or now >= old.until + FORGIVE_S else old.strikes + 1
        length = min(FIRST_BAN_S * 4.0 ** min(strikes - 1, 8), MAX_BAN_S)
        ban = self._bans[peer] = Ban(strikes, now, now + length, reason)
        self._forget(now)
        return ban

    def banned(self, peer: P, now: float, *, last_holder: bool = False) -> bool:
        """Whether to leave `peer` alone at `now`. `last_holder`: no other source is known."""
        ban = self._bans.get(peer)
        if ban is None:
            return False
        return now < (min(ban.until, ban.since + LAST_HOLDER_S) if last_holder else ban.until)

    def _forget(self, now: float) -> None:
        if len(self._bans) > MAX_BANS:
            del self._bans[next(iter(self._bans))]
        if now >= self._looked + FORGET_EVERY_S:
            self._looked = now
            self._bans = {peer: ban for peer, ban in self._bans.items() if now < ban.until + FORGIVE_S}
