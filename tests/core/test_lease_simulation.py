"""Many real lease machines over a simulated DHT: what must hold for the whole run.

The simulator is `benchmarks/claims_simulator.py`; these are its small, fast scenarios.
"""

import json
from pathlib import Path

import pytest

from benchmarks import claims
from benchmarks.claims_report import Figures, code_digest, percentile
from benchmarks.claims_simulator import TIMES, Scenario


def figures(scenario: Scenario, seeds: int) -> list[Figures]:
    return [claims.simulate(scenario, seed) for seed in range(seeds)]


@pytest.mark.parametrize("loss", [0.0, 0.05, 0.10])
@pytest.mark.parametrize("nodes", [4, 12])
def test_no_two_nodes_hold_one_role_and_every_role_is_held(nodes: int, loss: float) -> None:
    scenario = Scenario(nodes=nodes, roles=5, loss=loss, duration_s=240.0)
    for one in figures(scenario, 12):
        assert one.double_holders == 0
        assert one.long_overlaps == 0
        assert one.settle_s < 60.0


def test_a_dead_holders_role_is_taken_over_within_a_lease_and_25_seconds() -> None:
    scenario = Scenario(nodes=10, roles=5, loss=0.05, duration_s=420.0)
    taken = [seconds for one in figures(scenario, 16) for seconds in one.takeover_s]
    assert len(taken) >= 40
    taken_p95 = percentile(taken, 0.95)
    assert taken_p95 is not None and taken_p95 <= TIMES.ttl_s + 25.0


@pytest.mark.parametrize("loss", [0.0, 0.10])
def test_after_a_partition_heals_every_role_has_one_holder_within_a_minute(loss: float) -> None:
    cut = (60.0, 180.0)
    scenario = Scenario(12, 5, loss, churn=False, partition=cut, duration_s=300.0)
    for one in figures(scenario, 8):
        assert one.overlaps > 0  # both sides held roles: the partition was a real one
        assert one.double_holders == 0  # and never under one term
        assert one.heal_s is not None and one.heal_s <= 60.0


def test_ten_percent_loss_does_not_livelock_many_nodes_that_want_one_role() -> None:
    scenario = Scenario(nodes=24, roles=1, loss=0.10, churn=False, duration_s=120.0)
    assert all(one.settle_s < 45.0 and one.overlaps == 0 for one in figures(scenario, 24))


def test_the_same_seed_gives_the_same_run() -> None:
    scenario = Scenario(nodes=6, roles=4, loss=0.05, duration_s=200.0)
    assert claims.simulate(scenario, 3) == claims.simulate(scenario, 3)


def test_the_last_line_of_the_benchmark_is_json_with_the_promised_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    claims.main(["--seeds", "1", "--nodes", "4", "--roles", "3", "--partition"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["double_holders"] == 0
    assert {"settle_p95_s", "takeover_p95_s", "heal_p95_s"} <= set(last)
    assert last["bars"]["no_two_holders_of_a_term"] and last["bars"]["heal_every_run"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    claims.main(arguments)
    return capsys.readouterr().out.splitlines()


SMALL = ("--nodes", "3", "4", "--roles", "2", "--churn", "0")


def test_a_matrix_run_in_slices_gives_the_figures_of_one_run_in_one_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(capsys, *SMALL, "--seeds", "3")
    first, second = str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl")
    run(capsys, *SMALL, "--seeds", "2", "--out", first)
    kept = Path(first).read_bytes()
    run(capsys, *SMALL, "--seeds", "2", "--out", first)  # again: nothing is left to run
    run(capsys, *SMALL, "--first-seed", "2", "--seeds", "1", "--out", second)
    assert Path(first).read_bytes() == kept and len(kept.splitlines()) == 4
    assert run(capsys, "--report", first, second) == whole


def test_a_slice_that_was_cut_short_is_gone_on_with_and_one_of_other_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "slice.jsonl"
    run(capsys, *SMALL, "--seeds", "1", "--out", str(path))
    text = path.read_text()
    path.write_text(text[:-9])  # killed in the middle of a line
    run(capsys, *SMALL, "--seeds", "1", "--out", str(path))
    assert path.read_text() == text
    path.write_text(text.replace(code_digest(), "0" * 16))
    with pytest.raises(SystemExit, match="of other code"):
        claims.main(["--report", str(path)])
    path.write_text("[]\n")
    with pytest.raises(SystemExit, match="line 1 is not a run"):
        claims.main(["--report", str(path)])
