"""What a reader remembers of each key's conduct: a key that keeps taking held roles over is not heard.

Any key may write a HOLD of the next term and so take a role from a healthy holder (docs/protocol/claims.md,
*Who wins*). Honest nodes come to that after a partition or a lost read; a key that goes from role to role
stops every holder of the run. So a reader lets a key do it a few times, then only now and then.

Owns: which claims are such take-overs, how many each key has left, what is made of the claims of a reading.
Does not own: the order of claims (`core.assignment`), one key's claims on many roles at once (`honoured`).
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from paris_p2p.core.assignment import SeenClaim, claim_rank, honoured
from paris_p2p.ids import NodeId, Role, Term

TAKEOVERS_AT_ONCE = 3
"""Take-overs of held roles that a key may come to in a row: one a partition that heals is what honest keys
need, and a link may come and go."""
TAKEOVER_EVERY_S = 1200.0
"""One more comes back after so long."""
MAX_KEYS = 1024
"""Keys remembered; the one that did nothing for longest makes way. Who has more keys needs no second try."""
HEALTHY_SHARE = 1 / 3
"""A lease with less than this share of its life left has missed renewals: it may be over by another clock."""


@dataclass(frozen=True, slots=True)
class Heard:
    """The `claims` of a reading; those left out of it count as released. `news`: keys, each with a role, that
    are left out from this reading on."""

    claims: Mapping[Role, Sequence[SeenClaim]]
    news: tuple[tuple[NodeId, Role], ...]


@dataclass(slots=True)
class _Key:
    """`left`: take-overs that it has at `at_unix`; `taken`: those that counted, and until when they are
    remembered; `told`: whether it was in a reading's news since it last had any."""

    at_unix: float
    left: float = TAKEOVERS_AT_ONCE
    taken: dict[tuple[Role, Term], float] = field(default_factory=dict)
    told: bool = False


class Conduct:
    """One reader's memory of a run. Times are unix seconds."""

    def __init__(self) -> None:
        self._holders: dict[Role, SeenClaim] = {}  # as last read
        self._keys: OrderedDict[NodeId, _Key] = OrderedDict()  # the one that was charged last at the end

    def hear(
        self,
        claims: Mapping[Role, Sequence[SeenClaim]],
        now_unix: float,
        *,
        me: NodeId | None,
        ttl_s: float,
        max_roles: int,
    ) -> Heard:
        """One reading, perhaps of some roles only. `me`: the reader's key, which is always heard; `ttl_s`,
        `max_roles`: the run's."""
        standing = self._standing(claims, now_unix, max_roles)
        kept: dict[Role, Sequence[SeenClaim]] = {}
        news: list[tuple[NodeId, Role]] = []
        for role, some in claims.items():
            left_out = self._left_out(role, standing[role], now_unix, me, ttl_s)
            news += [(owner, role) for owner in sorted(left_out) if self._is_news(owner)]
            kept[role] = [replace(c, state="released") if c.owner in left_out else c for c in some]
            if left_out and all(claim.owner != self._holders[role].owner for claim in some):
                kept[role] = [*kept[role], self._holders[role]]  # in its favour: the reading is partial
        return Heard(kept, tuple(news))

    def _standing(
        self, claims: Mapping[Role, Sequence[SeenClaim]], now_unix: float, max_roles: int
    ) -> dict[Role, list[SeenClaim]]:
        """The live HOLDs: those read, and the holders' where this reading lacks them; without those of keys
        that have moved on to other roles, whoever takes over what they left."""
        known = {role: list(some) for role, some in claims.items()}
        for role, holder in self._holders.items():
            some = known.setdefault(role, [])
            if all(claim.owner != holder.owner for claim in some):
                some.append(holder)
        heard = honoured(known, now_unix, max_roles)
        return {
            role: [claim for claim in some if claim.state == "hold" and claim.live(now_unix)]
            for role, some in heard.items()
        }

    def _left_out(
        self, role: Role, holds: Sequence[SeenClaim], now_unix: float, me: NodeId | None, ttl_s: float
    ) -> set[NodeId]:
        """The owners of those of the live `holds` that are not heard; the best of the others is the holder
        from now on."""
        before = self._holders.get(role)
        holder = next((c for c in holds if before and (c.owner, c.term) == (before.owner, before.term)), None)
        healthy = holder is not None and holder.expiration_unix - now_unix > ttl_s * HEALTHY_SHARE
        left_out = {
            claim.owner
            for claim in holds
            if holder is not None
            and healthy
            and claim.owner not in (me, holder.owner)
            and claim.term > holder.term
            and not self._may(role, claim, now_unix, ttl_s)
        }
        others = [claim for claim in holds if claim.owner not in left_out]
        if others:
            self._holders[role] = min(others, key=lambda claim: claim_rank(role, claim))
        else:
            self._holders.pop(role, None)
        return left_out

    def _may(self, role: Role, claim: SeenClaim, now_unix: float, ttl_s: float) -> bool:
        """Whether a key may take over by `claim`: one claim is charged for once, however often it is read."""
        key = self._keys.setdefault(claim.owner, _Key(now_unix))
        key.taken = {one: until for one, until in key.taken.items() if until > now_unix}
        key.left += max(0.0, now_unix - key.at_unix) / TAKEOVER_EVERY_S
        key.left, key.at_unix = min(key.left, TAKEOVERS_AT_ONCE), now_unix
        counted = (role, claim.term) in key.taken
        if counted or key.left >= 1.0:
            key.left -= 0.0 if counted else 1.0
            key.taken[role, claim.term] = claim.expiration_unix + ttl_s
            key.told = False
        self._keys.move_to_end(claim.owner)
        while len(self._keys) > MAX_KEYS:
            self._keys.popitem(last=False)
        return (role, claim.term) in key.taken

    def _is_news(self, owner: NodeId) -> bool:
        key = self._keys.get(owner, _Key(0.0, told=True))
        told, key.told = key.told, True
        return not told
