"""The figures of `benchmarks/swarm_crowd.py`: bounds and ratios, without a network."""

from pathlib import Path

import pytest

from benchmarks import swarm_crowd
from benchmarks.lab.children import json_lines
from benchmarks.lab.content import CopyWatch, make_content
from benchmarks.lab.noise import spread
from benchmarks.lab.tracker import answer, query_bytes
from benchmarks.swarm_crowd import Figures, make_plan, options, ratios


def bound(*argv: str) -> float:
    return make_plan(options(argv)).bound_s()


def test_the_seeders_uplink_bounds_a_crowd_of_equals() -> None:
    assert bound("--mib", "64") == pytest.approx(64 * 2**20 / (50 * 125_000))


def test_the_sum_of_uplinks_bounds_a_crowd_of_slow_ones() -> None:
    total = 50 + 4 * 50 + 4 * 1
    expected = 8 * 64 * 2**20 / (total * 125_000)
    assert bound("--scenario", "heterogeneous", "--slow-up", "1") == pytest.approx(expected)


def test_the_last_to_join_needs_a_whole_download_after_it_has_joined() -> None:
    alone = bound()
    assert bound("--scenario", "late") == pytest.approx(alone + 7 * alone / 4)


def test_about_thirty_percent_of_all_peers_lie() -> None:
    plan = make_plan(options(["--scenario", "liars"]))
    assert len(plan.lies) / (1 + len(plan.leechers) + len(plan.lies)) == pytest.approx(0.3, abs=0.02)


def test_runs_are_compared_pair_by_pair_and_failed_ones_left_out() -> None:
    ours = [Figures("ours", 1.0, last_s=s) for s in (10.0, None, 30.0)]
    others = [Figures("libtorrent", 1.0, last_s=s) for s in (20.0, 20.0, 20.0)]
    assert ratios(ours, others) == {"median": 1.0, "min": 0.5, "max": 1.5}
    assert spread([]) is None


def test_a_full_copy_is_seen_when_folders_hold_it_together(tmp_path: Path) -> None:
    content = make_content(tmp_path / "source" / "content.bin", 5 << 15, 1 << 15)
    data = content.path.read_bytes()
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, keep in zip(folders, (range(3), range(3, 5)), strict=True):
        folder.mkdir()
        held = bytearray(len(data))
        for piece in keep:
            held[piece << 15 : (piece + 1) << 15] = data[piece << 15 : (piece + 1) << 15]
        (folder / "content.bin.part").write_bytes(held)
    assert not CopyWatch(content, folders[:1]).complete()
    assert CopyWatch(content, folders).complete()


def test_only_json_objects_are_events() -> None:
    assert json_lines(b'warning\n{"event": "listening"}\n[1]\n') == [{"event": "listening"}]


def test_the_tracker_answers_compactly() -> None:
    assert query_bytes("info_hash=%00a&port=1") == {"info_hash": b"\0a", "port": b"1"}
    assert answer({("198.18.77.1", 4001)}).endswith(b"5:peers6:\xc6\x12M\x01\x0f\xa1e")


def test_without_root_it_says_so_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(swarm_crowd, "cannot_run", lambda: "network namespaces need root")
    swarm_crowd.main([])
    assert '"skipped": "network namespaces need root"' in capsys.readouterr().out
