"""Releases of claims that nobody has confirmed yet.

Owns: which claims of ours must still be released, and when to try again. An owner cannot take a record
back; a `released` record that expires later replaces it, and is pointless once the claim itself has
expired. Does not own: the claims (`core.lease`).
"""

import math
from dataclasses import dataclass

from paris_p2p.ids import Role
from paris_p2p.wire.records import ClaimRecord


@dataclass(slots=True)
class _Tombstone:
    claim: ClaimRecord
    until_unix: float  # when the claim it releases expires
    retry_at: float = -math.inf
    writing: bool = False


class Tombstones:
    """The tombstones still to be accepted, at most one a role. Times: `now` monotonic, `*_unix` wall."""

    def __init__(self) -> None:
        self._due: dict[Role, _Tombstone] = {}

    def add(self, role: Role, claim: ClaimRecord, until_unix: float) -> None:
        """Release `claim`, which expires at `until_unix`."""
        self._due[role] = _Tombstone(ClaimRecord("released", claim.term, claim.since_unix), until_unix)

    def drop(self, role: Role) -> None:
        """A new claim on `role` replaces the old one by itself."""
        self._due.pop(role, None)

    def take_due(self, now: float, now_unix: float) -> list[tuple[Role, ClaimRecord]]:
        """What to write now; each counts as being written until `stored`."""
        self._due = {role: stone for role, stone in self._due.items() if stone.until_unix >= now_unix}
        ready = [(r, s) for r, s in self._due.items() if not s.writing and s.retry_at <= now]
        for _, stone in ready:
            stone.writing = True
        return [(role, stone.claim) for role, stone in ready]

    def stored(self, role: Role, expiration_unix: float, ok: bool, retry_at: float) -> None:
        """A tombstone expiring at `expiration_unix` was accepted or not. Ignored if a later claim of ours
        has made it irrelevant."""
        stone = self._due.get(role)
        if stone is None or expiration_unix <= stone.until_unix:
            return
        if ok:
            del self._due[role]
        else:
            stone.writing, stone.retry_at = False, retry_at

    def next_due(self) -> float:
        """When the next one is to be written; infinity if none is."""
        return min((s.retry_at for s in self._due.values() if not s.writing), default=math.inf)
