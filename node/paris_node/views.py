"""Views: pure functions from status values to rich renderables. No I/O, no clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from paris_node.snapshot import RoleLine, Snapshot
from paris_node.text import printable
from paris_p2p.wire.identity import peer_id_text
from paris_p2p.wire.records import MemberRecord

_STATE_STYLE = {
    "unclaimed": "dim",
    "claimed": "yellow",
    "training": "cyan",
    "stale": "red",
    "finished": "green",
}


WIDE = 100
"""Columns from which every value has room; in fewer, gaps are smaller, copies and safe steps are left out."""
MAX_MEMBERS_SHOWN = 16


def human_bytes(count: float) -> str:
    """A byte count for people: `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float | None) -> str:
    """A duration for people: `45s`, `3m20s`, `2h05m`; a dash when unknown."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def peer_name(peer: str, names: Mapping[str, str]) -> str:
    """A peer's given name, else the end of its id (the beginnings are all alike)."""
    return names.get(peer, "…" + peer[-6:])


def role_table(snapshot: Snapshot, names: Mapping[str, str], *, wide: bool = True) -> Table:
    """The table of roles."""
    gap = (0, 1) if wide else (0, 1, 0, 0)
    table = Table(expand=True, pad_edge=False, box=None, header_style="bold", padding=gap)
    for header in ("role", "state", "holder"):
        table.add_column(header, no_wrap=True)
    for header in ("term", "step"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("progress" if wide else "", min_width=10 if wide else 4, ratio=1)
    wide_only = ("loss", "images/s", "ETA", "copies", "safe", "age")
    for header in wide_only if wide else ("loss", "img/s", "ETA", "age"):
        table.add_column(header, justify="right", no_wrap=True)
    for line in snapshot.roles:
        table.add_row(*_role_cells(line, names, wide))
    return table


def _role_cells(line: RoleLine, names: Mapping[str, str], wide: bool) -> Sequence[RenderableType]:
    style = _STATE_STYLE[line.state]
    bar = ProgressBar(total=max(1, line.total_steps), completed=line.step, complete_style=style)
    kind = f" ({printable(line.variant)})" if wide and line.variant else ""  # the organiser's words
    return (
        Text(line.role + kind),
        Text(line.state + (" ✓" if line.checked else ""), style=style),
        peer_name(peer_id_text(line.holder), names) if line.holder else "–",
        str(line.term) if line.term else "–",
        f"{line.step}/{line.total_steps}",
        bar,
        "–" if line.loss is None else f"{line.loss:.3f}",
        "–" if line.images_per_s is None else f"{line.images_per_s:.0f}",
        human_seconds(line.eta_s),
        *([_copies(line), Text(str(line.safe_step) if line.announced_step else "–")] if wide else []),
        human_seconds(line.age_s),
    )


def _copies(line: RoleLine) -> Text:
    late = f" ({line.overdue} overdue)" if line.overdue else ""
    return Text(f"{line.providers}{late}", style="yellow" if late else "")


def overdue_note(snapshot: Snapshot) -> str:
    """The warning that announcements were not renewed in time; empty when all were."""
    late = [f"{line.role} ({line.overdue} of {line.providers})" for line in snapshot.roles if line.overdue]
    return f"overdue announcements, their nodes may be gone: {', '.join(late)}" if late else ""


def member_table(snapshot: Snapshot, names: Mapping[str, str]) -> Table:
    """The table of peers."""
    table = Table(expand=True, pad_edge=False, box=None, header_style="bold")
    for header in ("peer", "doing", "reach"):
        table.add_column(header, no_wrap=True)
    for header in ("up", "down", "age"):
        table.add_column(header, justify="right", no_wrap=True)
    shown = sorted(snapshot.members, key=lambda member: member[0] not in names)[:MAX_MEMBERS_SHOWN]
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


def status_view(snapshot: Snapshot, names: Mapping[str, str] | None = None, note: str = "") -> RenderableType:
    """The whole status screen. `names` maps peer ids to names; `note` stands below the tables."""
    return _StatusView(snapshot, names or {}, note)


@dataclass(frozen=True, slots=True)
class _StatusView:
    """The screen, laid out for the width it is drawn at."""

    snapshot: Snapshot
    names: Mapping[str, str]
    note: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        snapshot = self.snapshot
        finished = sum(line.state == "finished" for line in snapshot.roles)
        title = Text.assemble(
            "run ", (printable(snapshot.name), "bold"), f" ({snapshot.run_id[:12]})", no_wrap=True
        )
        summary = f"{finished} of {len(snapshot.roles)} roles finished, {snapshot.peers} peers"
        roles = role_table(snapshot, self.names, wide=options.max_width >= WIDE)
        parts: list[RenderableType] = [roles, Text(), member_table(snapshot, self.names)]
        overdue = overdue_note(snapshot)
        if overdue:
            parts += [Text(), Text(overdue, style="yellow")]
        if self.note:
            parts += [Text(), Text(self.note)]
        yield Panel(Group(*parts), title=title, subtitle=summary, title_align="left", subtitle_align="left")
