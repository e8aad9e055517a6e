"""Whole crowds that make the real decisions, on simulated links: what must hold for the swarm.

The simulator is `benchmarks/swarm_simulator.py`; these are small scenarios of `benchmarks/swarm_sim.py`.
"""

from typing import Any

import pytest

from benchmarks.swarm_sim import Figures, crowd, simulate
from benchmarks.swarm_simulator import Behaviour, Peer

SEEDER = Peer(has=1.0)


def run(seed: int = 1, mib: int = 24, **changes: Any) -> Figures:
    return simulate(crowd(8, mib, **changes), seed)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_flash_crowd_is_nearly_as_fast_as_its_links(seed: int) -> None:
    figures = run(seed)
    assert figures.completed and figures.efficiency >= 0.85
    assert figures.seeder_copies <= 1.2 and figures.duplicates <= 0.01 and figures.fairness >= 0.99


def test_slow_uploaders_do_not_hold_up_the_fast_ones() -> None:
    peers = (SEEDER, *(Peer(up=10.0 if n % 2 else 50.0) for n in range(8)))
    figures = run(peers=peers)
    assert figures.completed and figures.efficiency >= 0.75 and figures.duplicates <= 0.01


def test_late_joiners_get_theirs_as_fast() -> None:
    peers = (SEEDER, *(Peer(joins=2.0 * (n // 2)) for n in range(8)))
    figures = run(peers=peers)
    assert figures.completed and figures.efficiency >= 0.85 and figures.duplicates <= 0.01


def test_the_seeder_may_leave_once_one_copy_is_out() -> None:
    figures = run(seeder_leaves=True)
    assert figures.completed and figures.efficiency >= 0.85


def test_a_leecher_killed_at_half_fetches_again_only_what_was_in_flight() -> None:
    figures = run(kill=(1, 0.5, 2.0))
    assert figures.completed and 0 <= figures.refetched <= 8 << 20 and figures.duplicates <= 0.01


def test_liars_cost_little_time_and_are_banned_after_their_first_proven_lie() -> None:
    liars: tuple[Behaviour, ...] = ("corrupt", "late", "mute", "corrupt")
    honest = (SEEDER, SEEDER, *(Peer() for _ in range(8)))
    peers = (*honest, *(Peer(has=1.0, behaviour=b) for b in liars))
    truth, lies = run(peers=honest), run(peers=peers)
    assert lies.completed and lies.seconds <= 1.3 * truth.seconds
    assert lies.most_bad_pieces <= 1 and lies.unbanned_liars == 0


def test_a_larger_crowd_in_which_nobody_knows_everybody_completes_fairly() -> None:
    figures = simulate(crowd(24, 8, 64, degree=6), 1)
    assert figures.completed and figures.fairness >= 0.95
    assert figures.seeder_copies <= 2.0 and figures.duplicates <= 0.02
