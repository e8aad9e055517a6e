"""What a node says that finds no role to claim: how the run stands, and what the node does meanwhile.

Owns: telling such situations apart, their event, saying one only when it is another. Does not own: which
roles this node may claim (`fitting`, `--role`), claiming one (`core.lease`), copying and checking
(`run_node`).
"""

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from paris_node.snapshot import Observation
from paris_p2p.core.assignment import RoleState, View, role_states
from paris_p2p.ids import NodeId, Role
from paris_p2p.programs import Output

FETCH_MODEL = "paris-node fetch-model"
MAX_NAMED = 4
_STANDS_BY = "this node stands by: it copies, seeds and checks what there is, the least replicated first"
_LEAVES = "this node checks what only strangers vouch for, then leaves"


class Why(Enum):
    """Why there is nothing to claim: every role of the run is `FINISHED`; every one is of those that this
    node may claim; none of them is free."""

    FINISHED = "finished"
    OURS_FINISHED = "ours_finished"
    HELD = "held"


@dataclass(frozen=True, slots=True)
class Situation:
    """The run as a node without a role sees it; each role is in one of the four groups. `checking`: said to
    be finished, by nobody whose word counts yet; `left`: free, but not for this node."""

    why: Why
    finished: tuple[Role, ...]
    checking: tuple[Role, ...]
    held: tuple[Role, ...]
    left: tuple[Role, ...]


def situation(
    observation: Observation, roles: Sequence[Role], claimable: Collection[Role], me: NodeId
) -> Situation | None:
    """How the run of `roles` stands; None where one of the `claimable` roles is free for `me`, and where the
    reading lacks a role."""
    if not observation.view.claims.keys() >= set(roles):
        return None
    statuses = role_states(roles, _of_others(observation.view, me))
    states = {role: status.state for role, status in statuses.items()}
    finished = tuple(role for role in roles if observation.finished([role]))
    checking = tuple(r for r in roles if states[r] is RoleState.FINISHED and r not in finished)
    free = tuple(r for r in roles if states[r] in (RoleState.UNCLAIMED, RoleState.STALE))
    if set(free) & set(claimable):
        return None
    held = tuple(role for role in roles if role not in {*finished, *checking, *free})
    if len(finished) == len(roles):
        why = Why.FINISHED
    else:
        why = Why.OURS_FINISHED if claimable and set(claimable) <= set(finished) else Why.HELD
    return Situation(why, finished, checking, held, free)


def _of_others(view: View, me: NodeId) -> View:
    """Without this node's own claims: it has given them up, whether or not that is seen yet."""
    claims = {role: [one for one in some if one.owner != me] for role, some in view.claims.items()}
    return replace(view, claims=claims)


def fetch_model_command(home: Path | None) -> str:
    """The command that gets the model of the run, from the home named by `--home`, if any."""
    return FETCH_MODEL if home is None else f"{FETCH_MODEL} --home {shlex.quote(str(home))}"


class StandingBy:
    """Says how the run stands while this node has no role, once for each change.

    `fetch_model`: the command that gets the model; `said`: what was said otherwise already."""

    def __init__(
        self,
        output: Output,
        roles: Sequence[Role],
        me: NodeId,
        *,
        fetch_model: str = FETCH_MODEL,
        said: Why | None = None,
    ) -> None:
        self._output = output
        self._roles = roles
        self._me = me
        self._fetch_model = fetch_model
        self._said = said
        self.leaves = False
        """Whether the node leaves when all is finished."""
        self._before: Why | None = None

    def has_claimed(self) -> None:
        """This node has a role: what is so when it has none again is news."""
        self._said = None

    def see(self, observation: Observation, claimable: Collection[Role], *, sure: bool = False) -> None:
        """Say how the run stands if that is news. A change is believed when two readings in a row show it, or
        when it is `sure`: one reading may lack records."""
        found = situation(observation, self._roles, claimable, self._me)
        before, self._before = self._before, None if found is None else found.why
        if found is None or found.why is self._said:
            return
        if self._said is None or sure or found.why is before:
            self._said = found.why
            self._say(found, bool(claimable))

    def _say(self, found: Situation, claims: bool) -> None:
        more = {"fetch_model": self._fetch_model} if found.why is Why.FINISHED else {}
        self._output.event(
            "standing_by",
            self._text(found, claims),
            why=found.why.value,
            finished=list(found.finished),
            checking=list(found.checking),
            held=list(found.held),
            left=list(found.left),
            **more,
        )

    def _text(self, found: Situation, claims: bool) -> str:
        if found.why is Why.FINISHED:
            does = _LEAVES if self.leaves else _STANDS_BY
            return f"every role is finished: {does}; get the model with: {self._fetch_model}"
        if found.why is Why.OURS_FINISHED:
            ours = f"what this node may claim is finished, others are not ({_listed(found)})"
            return f"{ours}: {_STANDS_BY}"
        also = ", and claims a role that becomes free" if claims else ""
        return f"no role is free for this node ({_listed(found)}): {_STANDS_BY}{also}"


def _listed(found: Situation) -> str:
    groups = (
        ("held by others", found.held),
        ("finished", found.finished),
        ("finished, to be checked", found.checking),
        ("left to others", found.left),
    )
    return "; ".join(f"{what}: {_named(roles)}" for what, roles in groups if roles)


def _named(roles: Sequence[Role]) -> str:
    more = f" and {len(roles) - MAX_NAMED} more" if len(roles) > MAX_NAMED else ""
    return ", ".join(roles[:MAX_NAMED]) + more
