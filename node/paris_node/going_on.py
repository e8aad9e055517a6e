"""What a training job may go on from: which checkpoints are tried, in which order, and for how long.

Owns: which are looked at before the role is trained, fetching bundles, what was tried in vain. Does not own:
their standing (`judging`), the trainer that goes on from one (`training_job`).
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from paris_node.judging import Candidate, going_on_order
from paris_node.run_node import RunNode
from paris_p2p import clock
from paris_p2p.core.accept import Standing
from paris_p2p.errors import TransportError
from paris_p2p.ids import Role
from paris_p2p.wire.checkpoint import statement_digest
from paris_p2p.wire.content import ContentRef
from paris_p2p.wire.manifest import Manifest
from paris_p2p.workers.nursery import open_inner_nursery

T = TypeVar("T")

RESUME_STALL_S = 30.0
RESUME_DEADLINE_S = 600.0
RESUME_BYTES_PER_S = 256 << 10
"""A credible checkpoint's bundle may take so long, and besides what its bytes take at this rate."""
UNBACKED_STALL_S = 15.0
"""For checkpoints that are only their signers' word: nobody need serve them ..."""
UNBACKED_DEADLINE_S = 60.0
UNBACKED_BYTES_PER_S = 4 << 20
"""... or serve them faster than piece by piece: each item has 60 s and its bytes at this rate, twice that in
the next round, ..."""
UNBACKED_TOTAL_S = 900.0
"""... and all of them together no more than this of the time for which a job keeps its role from others."""
RESUME_ROUNDS = 3
"""How often the announced checkpoints are tried before a role starts afresh because none can be reached."""
MAX_ROUNDS = 8
"""As often as this while there are some that were not tried yet."""
RESUME_CANDIDATES = 8
"""Tried in one round. Credible ones come first; strangers can announce as many others as they like."""
TRIED_AGAIN = RESUME_CANDIDATES // 2
"""Of these, at most so many that could not be had in an earlier round, while there are others: credible ones
that cannot be had are worth waiting for, but keys that vouch for each other must not have all places."""
MAX_ENDS_TRIED = 2
"""Unchecked checkpoints of the last step that are looked at first; each costs at most a stall and a check."""


def order_to_try(
    found: Sequence[Candidate], manifest: Manifest, unreached: Collection[bytes] = ()
) -> list[Candidate]:
    """The credible ones first, but a role that somebody calls finished is looked at before it is trained on:
    its trainer's claim lapses, and the check of its last checkpoint may take longer on a busy machine.

    `unreached`: signed statements whose items could not be had in earlier rounds; they give their places to
    those that were not tried yet.
    """
    interval = manifest.recipe.checkpoint_interval_steps
    ends = [one for one in found if one.statement.finished]
    known = any(one.credible for one in ends)
    said = [one for one in ends if one.standing is Standing.UNCHECKED and one.data not in unreached]
    first = going_on_order([] if known else said, MAX_ENDS_TRIED, within_steps=interval)
    tried = {one.data for one in first}
    new = [one for one in found if one.data not in unreached]
    again = [one for one in found if one.data in unreached and (one.credible or not new)]
    places = TRIED_AGAIN if new else RESUME_CANDIDATES
    some = going_on_order(again, places, within_steps=interval)
    some += going_on_order(new, RESUME_CANDIDATES - len(some), within_steps=interval)
    others = going_on_order(some, RESUME_CANDIDATES, within_steps=interval)
    return [*first, *(one for one in others if one.data not in tried)]


async def unless(stopping: trio.Event, work: Callable[[], Awaitable[T]]) -> T | None:
    """What `work` returns; `None` when `stopping` is set before it is done."""
    result: T | None = None
    async with open_inner_nursery() as nursery:

        async def watch() -> None:
            await stopping.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        result = await work()
        nursery.cancel_scope.cancel()
    return result


class Parents:
    """The checkpoints that one job may go on from, all as signed statements. `unreached`: those whose items
    could not be had just now; `refused`: those that are not tried again by this job."""

    def __init__(self, node: RunNode, role: Role, stopping: trio.Event) -> None:
        self._node = node
        self._role = role
        self._stopping = stopping
        self._unbacked_s = UNBACKED_TOTAL_S  # left
        self.unreached: set[bytes] = set()
        self.refused: set[bytes] = set()

    async def find(self, *, here_will_do: bool = False) -> list[Candidate]:
        """What is announced of the role, and what is held here whether it is announced or not: work that was
        done while the network was away. Raises `TransportError`, but not if what is here will do, and
        something is."""
        announced: Sequence[Candidate] = ()
        known, ledger = self._node.checker.known(), self._node.ledger
        held = [(data, one) for data, one in ledger.held() if one.role == self._role]
        try:
            announced = (await self._node.observe(whole=True)).candidates[self._role]
        except TransportError:
            if not (held and here_will_do):
                raise
        me = frozenset({self._node.network.identity.node_id})
        shown = {candidate.data for candidate in announced} | set(known.rejected)
        found = list(announced)
        for data, statement in held:
            checked = statement_digest(data) in known.checked
            standing = Standing.CHECKED if checked else Standing.UNCHECKED
            if data not in shown:
                found.append(Candidate(statement, data, me, ledger.access(data), standing))
        return [one for one in found if one.data not in self.refused and one.standing is not Standing.REFUTED]

    def any_new(self, found: Sequence[Candidate]) -> bool:
        """Whether some of `found` were not tried, and there is time left for them."""
        return self._unbacked_s > 0 and any(one.data not in self.unreached for one in found)

    def order(self, found: Sequence[Candidate]) -> list[Candidate]:
        """Those of `found` to try in this round, in order."""
        return order_to_try(found, self._node.signed.manifest, self.unreached)

    async def refuse(self, candidate: Candidate, *, useless: bool) -> None:
        """Do not try it again in this job; nor in any other, if its bundle is `useless` and somebody
        else's."""
        self.refused.add(candidate.data)
        mine = candidate.statement.holder == self._node.network.identity.node_id
        if useless and not mine:
            await self._node.refuse(candidate)

    async def fetch(self, candidate: Candidate, attempt: int) -> Path | None:
        """The bundle's files, or None when asked to stop. Only what is credible goes before other fetches,
        and may take its time. Raises `TransportError`."""
        ref, swarm = candidate.statement.resume, self._node.network.swarm
        if candidate.credible:
            deadline_s, stall_s = RESUME_DEADLINE_S + ref.length / RESUME_BYTES_PER_S, RESUME_STALL_S
        else:
            deadline_s, stall_s = self._unbacked_deadline_s(ref, attempt), UNBACKED_STALL_S
        started = clock.monotonic()
        priority = int(candidate.credible)
        try:
            with trio.move_on_after(deadline_s):
                fetch = partial(swarm.fetch, ref, stall_timeout_s=stall_s, priority=priority)
                return await unless(self._stopping, fetch)
        finally:
            if not candidate.credible:
                self._unbacked_s -= clock.monotonic() - started
        raise TransportError(f"its bundle of {ref.length} bytes did not come within {deadline_s:.0f} s")

    def _unbacked_deadline_s(self, ref: ContentRef, attempt: int) -> float:
        patience_s = (UNBACKED_DEADLINE_S + ref.length / UNBACKED_BYTES_PER_S) * 2.0**attempt
        return max(0.0, min(patience_s, self._unbacked_s))

    def is_weighed(self, candidate: Candidate) -> bool:
        """Whether it may keep this machine from a role: noise of a kind that is too big must not."""
        return candidate.weighed or self._node.checker.has_measured(candidate.data)

    async def look_at(self, candidate: Candidate, attempt: int) -> None:
        """Strangers' word, however many keys it has, is not enough to leave a role untrained: look at the
        weights. Raises `TransportError` or `RemoteProtocolError` when they are not known to be good."""
        if candidate.assured if candidate.statement.finished else candidate.weighed:
            return
        deadline_s = self._unbacked_deadline_s(candidate.statement.weights, attempt)
        look = partial(self._node.fetch_weights, candidate, measure=True, stall_s=UNBACKED_STALL_S)
        started = clock.monotonic()
        try:
            await unless(self._stopping, partial(look, deadline_s=deadline_s))
        finally:
            self._unbacked_s -= clock.monotonic() - started
