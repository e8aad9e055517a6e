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


@dataclass(frozen=True, slots=True)
class Ban:
    """`strikes` offences so far, the last at `since`; banned until `until` (monotonic seconds)."""

    strikes: int
    since: float
    until: float
    reason: str


class BanList(Generic[P]):
    """Each further strike bans four times as long; half an hour without one forgets the peer."""

    def __init__(self) -> None:
        self._bans: dict[P, Ban] = {}

    def strike(self, peer: P, reason: str, now: float) -> Ban:
        """Bans `peer` from `now` on."""
        self._forget(now)
        old = self._bans.get(peer)
        strikes = 1 if old is None else old.strikes + 1
        length = min(FIRST_BAN_S * 4.0 ** min(strikes - 1, 8), MAX_BAN_S)
        self._bans[peer] = Ban(strikes, now, now + length, reason)
        return self._bans[peer]

    def banned(self, peer: P, now: float, *, last_holder: bool = False) -> bool:
        """Whether to leave `peer` alone at `now`. `last_holder`: no other source is known."""
        ban = self._bans.get(peer)
        if ban is None:
            return False
        return now < (min(ban.until, ban.since + LAST_HOLDER_S) if last_holder else ban.until)

    def _forget(self, now: float) -> None:
        self._bans = {peer: ban for peer, ban in self._bans.items() if now < ban.until + FORGIVE_S}
