"""Views: pure functions from status values to rich renderables. No I/O, no clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from paris_node.snapshot import RoleLine, Snapshot
from paris_node.text import counted, human_seconds, printable
from paris_p2p.wire.identity import peer_id_text
from paris_p2p.wire.records import MemberRecord

_STATE_STYLE = {
    "unclaimed": "dim",
    "claimed": "yellow",
    "training": "cyan",
    "checking": "magenta",
    "stale": "red",
    "finished": "green",
}


WIDE = 100
"""Columns from which every value has room; in fewer, terms, the training loss and safe steps are left
out."""
MAX_MEMBERS_SHOWN = 16
FEW_MEMBERS = 3
"""Peers that are shown when there is no room for all roles."""
_MATTERS = ("training", "checking", "claimed", "stale", "unclaimed", "finished")
"""Which roles are shown when not all can be: where something happens, then those that lack somebody."""
LEGEND = "✓ its checkpoint was checked by others; age: since its step was reported"


def human_bytes(count: float) -> str:
    """A byte count for people: `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def peer_name(peer: str, names: Mapping[str, str]) -> str:
    """A peer's given name, else the end of its id (the beginnings are all alike)."""
    return names.get(peer, "…" + peer[-6:])


def role_table(
    snapshot: Snapshot, names: Mapping[str, str], *, wide: bool = True, room: int | None = None
) -> RenderableType:
    """The table of roles, in `room` lines besides its header, if that is given: those that matter most."""
    table = Table(expand=True, pad_edge=False, box=None, header_style="bold", padding=(0, 1, 0, 0))
    named = max((len(_role_name(line, wide)) for line in snapshot.roles), default=0)
    digits = max((len(str(line.total_steps)) for line in snapshot.roles), default=0)
    holder = max((len(name) for name in names.values()), default=0)
    # Widths that hold whatever comes: columns that jump at every refresh cannot be read.
    for header, width in (("role", named), ("state", 10), ("holder", max(7, holder))):
        table.add_column(header, no_wrap=True, min_width=width)
    if wide:
        table.add_column("term", justify="right", no_wrap=True, min_width=4)
    table.add_column("step", justify="right", no_wrap=True, min_width=2 * digits + 1)
    table.add_column("progress" if wide else "", min_width=6 if wide else 3, ratio=1)
    if wide:
        table.add_column("loss", justify="right", no_wrap=True, min_width=5)
    rest = (("heldout", 7), ("img/s", 5), ("ETA", 6), ("copies", 6))
    for header, width in (*rest, *([("safe", max(4, digits))] if wide else []), ("age", 6 if wide else 4)):
        table.add_column(header, justify="right", no_wrap=True, min_width=width)
    lines, hidden = folded(snapshot.roles, room)
    for line in lines:
        table.add_row(*_role_cells(line, names, wide))
    return table if not hidden else _with_more(table, hidden)


def folded(lines: Sequence[RoleLine], room: int | None) -> tuple[Sequence[RoleLine], Sequence[RoleLine]]:
    """The roles to show in `room` lines (None: any number), one of them for a word about the others; and
    those others."""
    if room is None or len(lines) <= room:
        return lines, ()
    order = sorted(lines, key=lambda line: _MATTERS.index(line.state))
    shown = max(0, room - 1)
    return order[:shown], order[shown:]


def _with_more(table: Table, hidden: Sequence[RoleLine]) -> RenderableType:
    states = [f"{count} {state}" for state in _MATTERS if (count := sum(x.state == state for x in hidden))]
    more = f"… {len(hidden)} more: a taller window or --once shows them ({', '.join(states)})"
    return Group(table, Text(more, style="dim", no_wrap=True, overflow="ellipsis"))


def _role_name(line: RoleLine, wide: bool) -> str:
    kind = f" ({printable(line.variant)})" if wide and line.variant else ""  # the organiser's words
    return line.role + kind


def _role_cells(line: RoleLine, names: Mapping[str, str], wide: bool) -> Sequence[RenderableType]:
    style = _STATE_STYLE[line.state]
    bar = ProgressBar(total=max(1, line.total_steps), completed=line.step, complete_style=style)
    return (
        Text(_role_name(line, wide)),
        Text(line.state + (" ✓" if line.checked else ""), style=style),
        peer_name(peer_id_text(line.holder), names) if line.holder else "–",
        *([str(line.term) if line.term else "–"] if wide else []),
        f"{line.step}/{line.total_steps}",
        bar,
        *([_number(line.loss, 3)] if wide else []),
        _number(line.heldout_loss, 3),
        _number(line.images_per_s, 0),
        human_seconds(line.eta_s),
        _copies(line, wide),
        *([Text(str(line.safe_step) if line.announced_step else "–")] if wide else []),
        human_seconds(line.age_s),
    )


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _copies(line: RoleLine, wide: bool) -> Text:
    late = (f" ({line.overdue} overdue)" if wide else " late") if line.overdue else ""
    return Text(f"{line.providers}{late}", style="yellow" if late else "")


def overdue_note(snapshot: Snapshot) -> str:
    """The warning that announcements were not renewed in time; empty when all were."""
    late = [f"{line.role} ({line.overdue} of {line.providers})" for line in snapshot.roles if line.overdue]
    return f"overdue announcements, their nodes may be gone: {', '.join(late)}" if late else ""


def member_table(snapshot: Snapshot, names: Mapping[str, str], most: int = MAX_MEMBERS_SHOWN) -> Table:
    """The table of peers, `most` of them."""
    table = Table(expand=True, pad_edge=False, box=None, header_style="bold")
    for header in ("peer", "doing", "reach"):
        table.add_column(header, no_wrap=True)
    for header, width in (("up", 10), ("down", 10), ("age", 5)):
        table.add_column(header, justify="right", no_wrap=True, min_width=width)
    shown = sorted(snapshot.members, key=lambda member: member[0] not in names)[:most]
    for peer, record in shown:
        table.add_row(*_member_cells(peer, record, snapshot.now_unix, names))
    if len(shown) < snapshot.peers:
        table.add_row(f"… {snapshot.peers - len(shown)} more")
    return table


def _member_cells(
    peer: str, record: MemberRecord, now_unix: float, names: Mapping[str, str]
) -> Sequence[RenderableType]:
    doing = f"{record.activity} {record.role}" if record.role else record.activity
    return (
        peer_name(peer, names),
        Text(printable(doing)),  # never markup: a stranger wrote it
        Text(printable(record.reach) or "–"),
        human_bytes(record.up_bytes_per_s) + "/s",
        human_bytes(record.down_bytes_per_s) + "/s",
        human_seconds(max(0.0, now_unix - record.updated_unix)),
    )


@dataclass(frozen=True, slots=True)
class RunLine:
    """One of several runs; `finished` of its `roles` are finished, None where that could not be read."""

    name: str
    run_id: str
    organiser: str
    finished: int | None
    roles: int


def runs_view(lines: Sequence[RunLine]) -> RenderableType:
    """The table of runs, and how to choose one."""
    table = Table(pad_edge=False, box=None, header_style="bold")
    for header in ("run", "id", "organiser", "roles finished"):
        table.add_column(header, no_wrap=header != "organiser", overflow="fold")
    for line in lines:
        finished = "?" if line.finished is None else str(line.finished)
        ids = (line.run_id[:12], peer_name(line.organiser, {}))
        table.add_row(Text(printable(line.name)), *ids, f"{finished} of {line.roles}")
    return Group(table, Text(), Text("more of one: paris-node status --run NAME (or the id)"))


def status_view(
    snapshot: Snapshot,
    names: Mapping[str, str] | None = None,
    note: str = "",
    *,
    height: int | None = None,
) -> RenderableType:
    """The whole status screen. `names` maps peer ids to names; `note` stands below the tables; `height`: the
    lines that it must fit into, if any."""
    return _StatusView(snapshot, names or {}, note, height)


@dataclass(frozen=True, slots=True)
class _StatusView:
    """The screen, laid out for the size it is drawn at."""

    snapshot: Snapshot
    names: Mapping[str, str]
    note: str
    height: int | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        snapshot = self.snapshot
        finished = sum(line.state == "finished" for line in snapshot.roles)
        title = Text.assemble(
            "run ", (printable(snapshot.name), "bold"), f" ({snapshot.run_id[:12]})", no_wrap=True
        )
        peers = counted(snapshot.peers, "peer")
        summary = f"{finished} of {counted(len(snapshot.roles), 'role')} finished, {peers}"
        wide, notes = options.max_width >= WIDE, self._notes()
        inner = options.update(width=max(1, options.max_width - 4))
        below = sum(len(console.render_lines(part, inner)) for part in notes)
        room, most = self._share(below)
        roles = role_table(snapshot, self.names, wide=wide, room=room)
        peers_table: list[RenderableType] = [Text(), member_table(snapshot, self.names, most)] if most else []
        parts = [roles, *peers_table, *notes]
        yield Panel(Group(*parts), title=title, subtitle=summary, title_align="left", subtitle_align="left")

    def _notes(self) -> list[RenderableType]:
        notes: list[RenderableType] = [Text(), Text(LEGEND, style="dim")]
        overdue = overdue_note(self.snapshot)
        if overdue:
            notes.append(Text(overdue, style="yellow"))
        if self.note:
            notes.append(Text(self.note))
        return notes

    def _share(self, below: int) -> tuple[int | None, int]:
        """Lines for roles (None: as many as there are) and peers to show; notes take `below` lines."""
        roles, peers = len(self.snapshot.roles), min(self.snapshot.peers, MAX_MEMBERS_SHOWN)
        if self.height is None:
            return None, MAX_MEMBERS_SHOWN
        left = self.height - 2 - below - 1  # the frame, and the header of the roles
        if left >= roles + 2 + peers + (self.snapshot.peers > peers):
            return None, MAX_MEMBERS_SHOWN
        few = min(peers, max(FEW_MEMBERS, left - roles - 3))
        head = 2 + few + (self.snapshot.peers > few)
        if left - head < min(roles, FEW_MEMBERS):  # hardly a line: the roles are what it is about
            return max(1, left), 0
        return left - head, few
