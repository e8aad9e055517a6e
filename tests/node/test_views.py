"""Tests of `paris_node.views`."""

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console

from paris_node.snapshot import RoleLine, Snapshot
from paris_node.views import (
    MAX_MEMBERS_SHOWN,
    WIDE,
    RunLine,
    human_bytes,
    member_table,
    peer_name,
    runs_view,
    status_view,
)
from paris_p2p.ids import Role, Term
from paris_p2p.wire.identity import Identity, peer_id_text
from paris_p2p.wire.records import MemberRecord

HOLDER = Identity(b"h" * 32).node_id
LINE = RoleLine(
    Role("expert-0"), "training", HOLDER, 3, 150, 200, 100, 12.0, 0.1234, 94.0, 125.0, "ab" * 32, 2,
    heldout_loss=0.2347,
)  # fmt: skip
LINES = (
    LINE,
    dataclasses.replace(LINE, role=Role("expert-1"), state="finished", step=200, eta_s=None),
    RoleLine(Role("expert-12"), "unclaimed", None, 0, 0, 200, 0, None, None, None, None, None, 0),
    dataclasses.replace(LINE, role=Role("expert-3"), state="claimed", step=0),
    dataclasses.replace(LINE, role=Role("router"), state="stale"),
)
MEMBER = MemberRecord(
    (), "training", Role("expert-0"), Term(3), 150, 200, 0.1, 94.0, 12_345, 5_432_100, 1000.0
)  # fmt: skip
SNAPSHOT = Snapshot("ab" * 32, "digits", LINES, ((peer_id_text(HOLDER), MEMBER),), 1010.0)


def drawn(view: Any, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(view)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_every_role_shows_state_step_bar_loss_rate_copies_and_age(width: int) -> None:
    text = drawn(status_view(SNAPSHOT), width)
    assert all(len(line) <= width for line in text)
    rows = {line.role: next(row for row in text if f" {line.role} " in row) for line in LINES}
    for line in LINES:
        assert f" {line.state} " in rows[line.role]
        assert f" {line.step}/{line.total_steps} " in rows[line.role]
    cells = ("━━━", "0.235", " 94 ", "2m05s", " 2 ", "12s", "…" + peer_id_text(HOLDER)[-6:])
    for cell in (*cells, *(("0.123",) if width >= WIDE else ())):
        assert cell in rows[Role("expert-0")], cell
    assert (
        rows[Role("expert-1")].count("━") > rows[Role("expert-0")].replace("╸", "").count("━") or width < 90
    )
    assert "1 of 5 roles finished, 1 peer" in text[-1] and "run digits (abababababab)" in text[0]


def test_a_checkpoint_that_was_checked_has_a_mark_and_its_safe_step_is_shown() -> None:
    line = dataclasses.replace(LINE, checked=True, safe_step=75)
    lines = drawn(status_view(dataclasses.replace(SNAPSHOT, roles=(line, LINES[1]))), 120)
    row = next(row for row in lines if " expert-0 " in row)
    assert "training ✓" in row and " 75 " in row
    assert "✓" not in next(row for row in lines if " expert-1 " in row)


def test_peers_show_what_they_do_and_their_rates() -> None:
    row = next(line for line in drawn(status_view(SNAPSHOT), 80) if "training expert-0" in line)
    assert "12.3 kB/s" in row and "5.4 MB/s" in row and "10s" in row


MANY = (
    *(dataclasses.replace(LINES[n % 5], role=Role(f"expert-{n}")) for n in range(16)),
    dataclasses.replace(LINE, role=Role("router")),
)


@pytest.mark.parametrize("height", [16, 24, 40])
@pytest.mark.parametrize("peers", [1, 6, 40])
def test_what_has_no_room_is_folded_and_the_bottom_is_always_there(height: int, peers: int) -> None:
    members = tuple((peer_id_text(Identity(bytes([n]) * 32).node_id), MEMBER) for n in range(peers))
    snapshot = dataclasses.replace(SNAPSHOT, roles=MANY, members=members)
    text = drawn(status_view(snapshot, note="Ctrl-C leaves this view", height=height), 80)
    assert len(text) <= height
    assert "of 17 roles finished" in text[-1] and "Ctrl-C leaves" in text[-2] and "✓" in text[-3]
    roles = [row for row in text if ("expert-" in row.split("reach")[0] and "…" in row) or " router " in row]
    assert "training" in roles[0]
    if height < 40:
        assert any("--once shows them" in row for row in text)
        assert len([row for row in text if " 150/200 " in row]) >= 3
    else:
        assert not any("--once" in row for row in text)
    assert len(drawn(status_view(snapshot), 80)) > 22  # without a height nothing is left out


def test_columns_stay_where_they_are_whatever_is_in_them() -> None:
    early = [dataclasses.replace(LINE, step=1, eta_s=None, loss=None, heldout_loss=None, age_s=1.0)]
    late = [dataclasses.replace(LINE, step=199, checked=True, age_s=59.0, images_per_s=9.0, eta_s=3599.0)]
    for width in (80, 120):
        heads = [
            drawn(status_view(dataclasses.replace(SNAPSHOT, roles=tuple(lines))), width)[1]
            for lines in (early, late)
        ]
        assert heads[0] == heads[1]


def test_several_runs_are_a_table_and_how_to_choose_one() -> None:
    organiser = peer_id_text(HOLDER)
    lines = [RunLine("digits", "ab" * 32, organiser, 2, 5), RunLine("[/]\x1b", "cd" * 32, organiser, None, 9)]
    text = drawn(runs_view(lines), 80)
    assert text[1].split() == ["digits", "abababababab", "…" + organiser[-6:], "2", "of", "5"]
    assert "? of 9" in text[2] and "[/]" in text[2] and "--run NAME" in text[-1]


def test_the_note_stands_below_the_tables() -> None:
    assert "Ctrl-C leaves" in drawn(status_view(SNAPSHOT, note="Ctrl-C leaves [not markup]"), 80)[-2]


def test_what_strangers_write_is_neither_markup_nor_terminal_control() -> None:
    member = dataclasses.replace(MEMBER, activity="[/bold]\x1b[2J", role=Role("[red]"), reach="[link=x]y")
    line = dataclasses.replace(LINE, variant="[blink]\x9b2J")
    snapshot = dataclasses.replace(
        SNAPSHOT, name="[/]\x1b]0;mine\x07", members=((peer_id_text(HOLDER), member),), roles=(line,)
    )
    text = "\n".join(drawn(status_view(snapshot), 150))
    assert all(part in text for part in ("[/bold]", "[red]", "[/]", "[link=x]y", "[blink]"))
    assert "\x9b" not in text
    assert "\x1b" not in text and "\x07" not in text


def test_a_crowd_of_peers_is_cut_with_named_ones_first() -> None:
    peers = [peer_id_text(Identity(bytes([n]) * 32).node_id) for n in range(100)]
    snapshot = dataclasses.replace(SNAPSHOT, members=tuple((peer, MEMBER) for peer in peers))
    text = drawn(member_table(snapshot, {peers[99]: "zoe"}), 80)
    assert len(text) == 1 + MAX_MEMBERS_SHOWN + 1
    assert text[1].startswith("zoe") and "84 more" in text[-1]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (12_345, "12.3 kB"), (5.4e6, "5.4 MB"), (2e12, "2.0 TB")]
)
def test_byte_counts_are_short(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_a_peer_is_called_by_its_name_or_the_end_of_its_id() -> None:
    assert peer_name("12D3KooWabcdef", {}) == "…abcdef"
    assert peer_name("12D3KooWabcdef", {"12D3KooWabcdef": "alice"}) == "alice"


def test_the_kind_of_an_expert_is_shown_where_the_run_has_several() -> None:
    line = dataclasses.replace(LINE, variant="xl2:ddpm")
    text = "\n".join(drawn(status_view(dataclasses.replace(SNAPSHOT, roles=(line, *LINES[1:]))), 120))
    assert "expert-0 (xl2:ddpm)" in text and "(None)" not in text


def test_announcements_that_are_overdue_are_pointed_out() -> None:
    late = dataclasses.replace(SNAPSHOT, roles=(dataclasses.replace(LINE, overdue=1), *LINES[1:]))
    text = "\n".join(drawn(status_view(late), 120))
    assert "2 (1 overdue)" in text and "may be gone: expert-0 (1 of 2)" in text
    assert "overdue" not in "\n".join(drawn(status_view(SNAPSHOT), 120))
