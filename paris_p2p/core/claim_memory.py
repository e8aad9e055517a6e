"""What a node remembers of the claims and checkpoints it has read.

Owns: merging successive reads, each of which may be partial, into one picture. Does not own: judging it
(`core.assignment`, `core.lease`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from paris_p2p.core.assignment import MAX_ROLES_PER_NODE, SeenClaim, View, honoured, newest_statement
from paris_p2p.ids import NodeId, Role, Term
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.records import CLOCK_TOLERANCE_S
from paris_p2p.wire.terms import highest_number, term_number


@dataclass(frozen=True, slots=True)
class _Heard:
    """The claims that count from `since_unix` until `until_unix`, unless others are read."""

    claims: Mapping[Role, Sequence[SeenClaim]]
    since_unix: float
    until_unix: float


class ClaimMemory:
    """Everything known about `roles`, so that a lossy read does not make a held role look free.

    A claim is kept for `keep_s` after its expiry: an expired HOLD shows that there is something to take
    over. The newest checkpoint of a role is kept as long after it was last seen: who found it bad, or out of
    reach for good, no longer shows it. The highest term of a role is never forgotten.
    """

    def __init__(
        self,
        node_id: NodeId,
        roles: Iterable[Role],
        keep_s: float,
        max_roles_per_node: int = MAX_ROLES_PER_NODE,
    ) -> None:
        self._node_id = node_id
        self._keep_s = keep_s
        self._max_roles_per_node = max_roles_per_node
        self._claims: dict[Role, dict[NodeId, SeenClaim]] = {role: {} for role in roles}
        self._statements: dict[Role, CheckpointStatement] = {}
        self._shown_unix: dict[Role, float] = {}  # when the newest checkpoint was last in a reading
        self._terms: dict[Role, Term] = {}
        self._own_expiration: dict[Role, float] = {}
        self._forget_unix = math.inf  # when the first claim is to be forgotten
        self._views: dict[bool, _Heard] = {}  # with and without the own claims; emptied by every change

    def observe(self, view: View, now_unix: float) -> None:
        """Take in one reading."""
        for role, shown in view.claims.items():
            if role in self._claims:
                for claim in shown:
                    self.add(role, claim)
        if self._forget_unix < now_unix:
            self._forget(now_unix)
        for role in {**view.statements, **self._statements}:
            if role in self._claims:
                self._take_statement(role, view.statements.get(role), now_unix)

    def _forget(self, now_unix: float) -> None:
        """Drop the claims that ended `keep_s` ago."""
        self._views.clear()
        for role, claims in self._claims.items():
            self._claims[role] = {
                owner: claim
                for owner, claim in claims.items()
                if claim.expiration_unix >= now_unix - self._keep_s
            }
        ends = (claim.expiration_unix for claims in self._claims.values() for claim in claims.values())
        self._forget_unix = min(ends, default=math.inf) + self._keep_s

    def add(self, role: Role, claim: SeenClaim) -> None:
        """Take in one claim; of one owner's claims the one that expires last stands, as in the DHT."""
        known = self._claims[role].get(claim.owner)
        if known is claim:
            return
        if known is None or claim.expiration_unix > known.expiration_unix:
            self._claims[role][claim.owner] = claim
            self._forget_unix = min(self._forget_unix, claim.expiration_unix + self._keep_s)
            self._views.clear()
        self._terms[role] = max(self.highest_term(role), claim.term)
        if claim.owner == self._node_id:
            self._own_expiration[role] = max(self.own_expiration(role), claim.expiration_unix)

    def _take_statement(self, role: Role, statement: CheckpointStatement | None, now_unix: float) -> None:
        if now_unix - self._shown_unix.get(role, now_unix) > self._keep_s:
            del self._statements[role], self._shown_unix[role]
        if statement is None or term_number(statement.term) > highest_number(now_unix + CLOCK_TOLERANCE_S):
            return
        known = self._statements.get(role)
        shown = [statement] if known is None else [known, statement]
        newest = newest_statement(shown, within_steps=math.inf)  # which counts, the reading has decided
        if newest == statement:
            self._shown_unix[role] = now_unix
        self._statements[role] = newest or statement
        self._terms[role] = max(self.highest_term(role), statement.term)

    def release_own(self, role: Role) -> None:
        """For this node its claim on `role` is over now, whether or not the tombstone arrives anywhere."""
        known = self._claims[role].get(self._node_id)
        if known is not None:
            self._claims[role][self._node_id] = replace(known, state="released")
            self._views.clear()

    def own(self, role: Role) -> SeenClaim | None:
        """The claim on `role` that stands under this node's own name, if one does."""
        return self._claims[role].get(self._node_id)

    def own_live(self, now_unix: float) -> dict[Role, SeenClaim]:
        """The live claims under this node's own name."""
        own = ((role, claims.get(self._node_id)) for role, claims in self._claims.items())
        return {role: claim for role, claim in own if claim is not None and claim.live(now_unix)}

    def own_expiration(self, role: Role) -> float:
        """When the last of this node's records on `role` expires (unix seconds), minus infinity if none."""
        return self._own_expiration.get(role, -math.inf)

    def highest_term(self, role: Role) -> Term:
        """The highest term seen in any claim, live or not, or any checkpoint of `role`; 0 if none."""
        return self._terms.get(role, Term(0))

    def statement(self, role: Role) -> CheckpointStatement | None:
        """The newest checkpoint of `role`, if any is known."""
        return self._statements.get(role)

    def view(self, now_unix: float, *, own: bool = True) -> View:
        """Everything remembered; without the claims under this node's name unless `own`."""
        return View(now_unix, self._heard(now_unix, own), self._statements)

    def _heard(self, now_unix: float, own: bool) -> Mapping[Role, Sequence[SeenClaim]]:
        """The claims of a view. Asked for several times a step: worked out anew only when they changed or
        the first of those that live has ended since."""
        own = own or not self._own_expiration  # the same for who never claimed anything
        heard = self._views.get(own)
        if heard is None or not heard.since_unix <= now_unix < heard.until_unix:
            claims = {
                role: [claim for owner, claim in by_owner.items() if own or owner != self._node_id]
                for role, by_owner in self._claims.items()
            }
            ends = [
                c.expiration_unix for some in claims.values() for c in some if c.expiration_unix > now_unix
            ]
            honest = honoured(claims, now_unix, self._max_roles_per_node)
            heard = self._views[own] = _Heard(honest, now_unix, min(ends, default=math.inf))
        return heard.claims
