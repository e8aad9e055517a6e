"""What a chaos run showed, from its events and kills: who trained what, what was lost, which bars are met.

Owns: the reckoning of `benchmarks/chaos.py`, without I/O. Does not own: the run.
"""

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

KINDS = ("node", "dht", "p2pd", "trainer")
ENDING = ("node", "trainer")
"""The kinds whose death ends the training of the role."""
SETTLED_S = 2.0
"""A checkpoint counts as safe when it was seen to be so this long before a kill: observing takes a while."""


@dataclass(frozen=True)
class Event:
    """One JSON line of one volunteer's life; `at`: when it was read."""

    at: float
    node: str
    life: int
    what: dict[str, Any]


@dataclass
class Stint:
    """One node's training of one role, from its claim on: when and what it said of its steps."""

    role: str
    node: str
    life: int
    term: int
    claimed_at: float
    start_step: int = 0
    ready_at: float | None = None
    first_at: float | None = None
    last_at: float = 0.0
    last_step: int = 0
    finished: bool = False


@dataclass
class Kill:
    """One SIGKILL. `role`: what the victim's node held; `safe`: the role's safe step as seen before; `gone`:
    whether its node came back only after a lease; `again_s`: until the node had another such process."""

    at: float
    kind: str
    node: str
    life: int
    role: str | None
    safe: int
    gone: bool = False
    again_s: float | None = None


@dataclass
class Story:
    """All that was seen. `safe`: by role, when each safe step was first seen; `orphans`: processes that
    outlived their killed node; `complete`: every role was seen finished; `cpu`: seconds by kind of process
    and process; `peak_bytes`: resident, of all processes."""

    events: list[Event] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    safe: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    roles: tuple[str, ...] = ()
    exit_codes: dict[str, int | None] = field(default_factory=dict)
    orphans: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    complete: bool = False
    seconds: float = 0.0
    cpu: dict[tuple[str, int], float] = field(default_factory=dict)
    peak_bytes: int = 0

    def safe_step(self, role: str, at: float) -> int:
        """The role's safe step as it was seen at a moment."""
        return max((step for seen_at, step in self.safe[role] if seen_at <= at), default=0)


@dataclass
class Loss:
    """Steps of a role that were trained again. `kill`: the one that explains it, if one does."""

    role: str
    reached: int
    resumed: int
    safe: int
    kill: Kill | None

    @property
    def steps(self) -> int:
        """How many."""
        return self.reached - self.resumed

    @property
    def beyond_safe(self) -> int:
        """Those of them that had been safe."""
        return max(0, self.safe - self.resumed)


def stints(events: Iterable[Event]) -> list[Stint]:
    """Who trained what and how far, in the order of the claims."""
    made: list[Stint] = []
    current: dict[str, Stint] = {}
    for event in events:
        kind, stint = event.what.get("event"), current.get(event.node)
        if kind == "claimed":
            before, role = stint, event.what["role"]
            stint = Stint(role, event.node, event.life, event.what["term"], event.at)
            if before is not None and (before.role, before.life) == (role, event.life):
                stint.start_step = before.last_step  # it trained on without a lease, and still does
            current[event.node] = stint
            made.append(stint)
        elif stint is None or stint.life != event.life or stint.role != event.what.get("role"):
            continue
        elif kind in ("resumed", "rolled_back"):
            if stint.first_at is not None:  # the trainer died and another goes on under the same lease
                stint = current[event.node] = Stint(stint.role, event.node, event.life, stint.term, event.at)
                made.append(stint)
            stint.start_step, stint.ready_at = int(event.what["step"]), event.at
        elif kind == "step":
            if stint.ready_at is None and int(event.what["step"]) < stint.start_step:
                stint.start_step = 0
            stint.first_at = stint.first_at or event.at
            stint.last_at, stint.last_step = event.at, max(stint.last_step, int(event.what["step"]))
        elif kind == "finished":
            stint.finished = True
    return made


def losses(story: Story, every: Sequence[Stint]) -> list[Loss]:
    """Every time that a role went back: from where to where, and what is to blame."""
    found = []
    for role in story.roles:
        reached, last_at = 0, 0.0
        for stint in (one for one in every if one.role == role and one.first_at is not None):
            first_at = stint.first_at or 0.0
            if reached > stint.start_step:
                kill = _to_blame(story.kills, role, last_at - SETTLED_S, first_at)
                safe = story.safe_step(role, (kill.at if kill else last_at) - SETTLED_S)
                found.append(Loss(role, reached, stint.start_step, safe, kill))
            reached, last_at = max(stint.start_step, stint.last_step), stint.last_at
    return found


def _to_blame(kills: Sequence[Kill], role: str, after: float, before: float) -> Kill | None:
    """The last kill of the role's holder between two moments, one that ends training rather than another."""
    found = [kill for kill in kills if kill.role == role and after < kill.at < before]
    ending = [kill for kill in found if kill.kind in ENDING]
    return next(reversed(ending or found), None)


def longest_overlap(every: Sequence[Stint]) -> float:
    """Seconds that two nodes stepped one role at once, at most."""
    spans = [(one, one.first_at, one.last_at) for one in every if one.first_at is not None]
    shared = [
        min(end, other_end) - max(begin, other_begin)
        for place, (one, begin, end) in enumerate(spans)
        for other, other_begin, other_end in spans[place + 1 :]
        if one.role == other.role and one.node != other.node
    ]
    return max([0.0, *shared])


def safe_intervals(story: Story) -> list[int]:
    """The stretches, in steps, from one safe step to the next that was seen, of all roles."""
    found = []
    for seen in story.safe.values():
        steps = [0, *sorted({step for _, step in seen if step})]
        found += [later - sooner for sooner, later in itertools.pairwise(steps)]
    return found


def successor(kill: Kill, every: Sequence[Stint]) -> Stint | None:
    """Who trained the role next after a kill that ended its training."""
    if kill.role is None or kill.kind not in ENDING:
        return None
    later = [one for one in every if one.role == kill.role and one.claimed_at > kill.at]
    return min(later, key=lambda one: one.claimed_at, default=None)


def tell(kill: Kill, every: Sequence[Stint], lost: Sequence[Loss], began: float) -> dict[str, Any]:
    """One kill for people: who, what it cost, who went on when."""
    loss = next((one for one in lost if one.kill is kill), None)
    line: dict[str, Any] = {"at_s": round(kill.at - began), "kind": kill.kind, "node": kill.node}
    line |= {"role": kill.role, "safe": kill.safe if kill.role else None}
    if loss is not None:
        line |= {"reached": loss.reached, "resumed": loss.resumed, "lost": loss.steps}
    after = successor(kill, every)
    if after is not None:
        line |= {"next": after.node, "next_s": round(after.claimed_at - kill.at, 1)}
        line |= {"trained_again_s": round((after.first_at or after.claimed_at) - kill.at, 1)}
    if kill.again_s is not None:
        line["again_s"] = round(kill.again_s, 1)
    return line


def cpu_by_kind(story: Story) -> dict[str, float]:
    """CPU seconds by kind of process, as last seen of each."""
    spent: dict[str, float] = defaultdict(float)
    for (kind, _pid), seconds in story.cpu.items():
        spent[kind] += seconds
    return spent


def middle(values: Sequence[float]) -> float | None:
    """The median, rounded; None of nothing."""
    return round(statistics.median(values), 1) if values else None


def bars(
    story: Story, every: Sequence[Stint], lost: Sequence[Loss], *, nodes: int, kills: int, lease_s: float
) -> dict[str, dict[str, Any]]:
    """Each of the issue's demands: the figure, the limit, and whether it is met."""
    done = {one.role for one in every if one.finished}
    ended_well = sum(code == 0 for code in story.exit_codes.values())
    interval = statistics.median(safe_intervals(story) or [0])
    steps = sum(loss.steps for loss in lost)
    overlap_s = round(longest_overlap(every), 1)
    kinds = len({kill.kind for kill in story.kills})
    left = len(story.left_behind) + len(story.orphans)
    found: dict[str, tuple[float, float, bool]] = {
        "kills": (len(story.kills), kills, len(story.kills) == kills),
        "kinds_of_victim": (kinds, min(kills, len(KINDS)), kinds >= min(kills, len(KINDS))),
        "roles_finished": (len(done), len(story.roles), story.complete and done >= set(story.roles)),
        "volunteers_ended_with_0": (ended_well, nodes, ended_well == nodes),
        "overlap_s": (overlap_s, lease_s, overlap_s <= lease_s),
        "lost_steps": (steps, interval * kills, steps <= interval * kills),
        "lost_safe_steps": (sum(loss.beyond_safe for loss in lost), 0, not any(x.beyond_safe for x in lost)),
        "left_behind": (left, 0, not left),
    }
    return {name: {"value": value, "limit": limit, "met": met} for name, (value, limit, met) in found.items()}


def figures(story: Story, *, nodes: int, kills: int, lease_s: float) -> dict[str, Any]:
    """What the run showed; `bars` has the demands, the rest explains them."""
    every = stints(story.events)
    lost = losses(story, every)
    intervals = safe_intervals(story)
    began = story.events[0].at if story.events else 0.0
    restarts = [kill.again_s for kill in story.kills if kill.again_s is not None]
    after = [(kill, one) for kill in story.kills if (one := successor(kill, every)) is not None]
    by_others = [one.claimed_at - kill.at for kill, one in after if one.node != kill.node]
    by_itself = [one.claimed_at - kill.at for kill, one in after if one.node == kill.node]
    said = Counter(event.what.get("event") for event in story.events)
    return {
        "seconds": round(story.seconds, 1),
        "cpu_s": {kind: round(spent) for kind, spent in sorted(cpu_by_kind(story).items())},
        "peak_gb": round(story.peak_bytes / 1e9, 1),
        "kinds": dict(Counter(kill.kind for kill in story.kills)),
        "holders_killed": sum(kill.role is not None for kill in story.kills),
        "each": [tell(kill, every, lost, began) for kill in story.kills],
        "lost_per_kill": round(sum(loss.steps for loss in lost) / max(1, len(story.kills)), 1),
        "unexplained_losses": [
            {"role": x.role, "reached": x.reached, "resumed": x.resumed} for x in lost if x.kill is None
        ],
        "safe_interval_median": middle(intervals),
        "safe_interval_max": max(intervals, default=0),
        "taken_over_median_s": middle(by_others),
        "taken_over_max_s": round(max(by_others), 1) if by_others else None,
        "gone_on_median_s": middle(by_itself),
        "restart_median_s": middle(restarts),
        "restart_max_s": round(max(restarts), 1) if restarts else None,
        "given_up": said["stopped"],
        "failed": said["failed"],
        "orphans": story.orphans,
        "left": story.left_behind,
        "exit_codes": {node: code for node, code in story.exit_codes.items() if code},
        "bars": bars(story, every, lost, nodes=nodes, kills=kills, lease_s=lease_s),
    }
