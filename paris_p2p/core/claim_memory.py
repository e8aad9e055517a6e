"""What a node remembers of the claims and checkpoints it has read.

Owns: merging successive reads, each of which may be partial, into one picture. Does not own: judging it
(`core.assignment`, `core.lease`).
"""

import math
from collections.abc import Iterable
from dataclasses import replace

from paris_p2p.core.assignment import MAX_ROLES_PER_NODE, SeenClaim, View, honoured, newest_statement
from paris_p2p.ids import NodeId, Role, Term
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.records import CLOCK_TOLERANCE_S
from paris_p2p.wire.terms import highest_number, term_number


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

    def observe(self, view: View, now_unix: float) -> None:
        """Take in one reading."""
        for role, claims in self._claims.items():
            for claim in view.claims.get(role, ()):
                self.add(role, claim)
            for owner in [o for o, c in claims.items() if c.expiration_unix < now_unix - self._keep_s]:
                del claims[owner]
            self._take_statement(role, view.statements.get(role), now_unix)

    def add(self, role: Role, claim: SeenClaim) -> None:
        """Take in one claim; of one owner's claims the one that expires last stands, as in the DHT."""
        known = self._claims[role].get(claim.owner)
        if known is None or claim.expiration_unix > known.expiration_unix:
            self._claims[role][claim.owner] = claim
        self._terms[role] = max(self.highest_term(role), claim.term)
        if claim.owner == self._node_id:
            self._own_expiration[role] = max(self.own_expiration(role), claim.expiration_unix)

    def _take_statement(self, role: Role, statement: CheckpointStatement | None, now_unix: float) -> None:
        if now_unix - self._shown_unix.get(role, now_unix) > self._keep_s:
            del self._statements[role], self._shown_unix[role]
        if statement is None or term_number(statement.term) > highest_number(now_unix + CLOCK_TOLERANCE_S):
            return
        known = self._statements.get(role)
        newest = newest_statement([statement] if known is None else [known, statement])
        if newest == statement:
            self._shown_unix[role] = now_unix
        self._statements[role] = newest or statement
        self._terms[role] = max(self.highest_term(role), statement.term)

    def release_own(self, role: Role) -> None:
        """For this node its claim on `role` is over now, whether or not the tombstone arrives anywhere."""
        known = self._claims[role].get(self._node_id)
        if known is not None:
            self._claims[role][self._node_id] = replace(known, state="released")

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
        claims = {
            role: [claim for owner, claim in by_owner.items() if own or owner != self._node_id]
            for role, by_owner in self._claims.items()
        }
        return View(now_unix, honoured(claims, now_unix, self._max_roles_per_node), self._statements)
