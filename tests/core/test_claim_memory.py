"""Tests of `paris_p2p.core.claim_memory`: what is remembered, and what is not."""

from dataclasses import replace

from paris_p2p.core.assignment import SeenClaim, View
from paris_p2p.core.claim_memory import ClaimMemory
from paris_p2p.ids import InfoHash, NodeId, Role, RunId, Term
from paris_p2p.wire.checkpoint import CheckpointStatement
from paris_p2p.wire.content import ContentRef

ME, ANN = NodeId(b"m" * 32), NodeId(b"a" * 32)
ROLE = Role("expert-0")
KEEP_S = 20.0
REF = ContentRef(InfoHash(bytes(32)), 100, 1 << 14)
STATEMENT = CheckpointStatement(RunId(bytes(32)), ROLE, Term(3), ANN, 10, 100, 0, REF, REF, b"", 0.5, 1000.0)


def shown(now_unix: float, statement: CheckpointStatement | None = None) -> View:
    return View(now_unix, {}, {} if statement is None else {ROLE: statement})


def test_a_checkpoint_survives_the_readings_that_miss_it() -> None:
    memory = ClaimMemory(ME, [ROLE], KEEP_S)
    memory.observe(shown(1000, STATEMENT), 1000)
    memory.observe(shown(1019), 1019)
    assert memory.statement(ROLE) == STATEMENT


def test_a_checkpoint_nobody_shows_any_more_is_forgotten_but_not_its_term() -> None:
    """Who found it bad stops showing it: a liar's word must not keep a role from being claimed for ever."""
    memory = ClaimMemory(ME, [ROLE], KEEP_S)
    memory.observe(shown(1000, STATEMENT), 1000)
    memory.observe(shown(1021), 1021)
    assert memory.statement(ROLE) is None
    assert memory.highest_term(ROLE) == 3


def test_after_the_newest_is_forgotten_the_next_best_stands() -> None:
    older = replace(STATEMENT, term=Term(2), step=90)
    memory = ClaimMemory(ME, [ROLE], KEEP_S)
    memory.observe(shown(1000, STATEMENT), 1000)
    memory.observe(shown(1010, older), 1010)
    assert memory.statement(ROLE) == STATEMENT
    memory.observe(shown(1021, older), 1021)
    assert memory.statement(ROLE) == older


def test_an_expired_hold_is_kept_as_long_as_it_shows_something_to_take_over() -> None:
    memory = ClaimMemory(ME, [ROLE], KEEP_S)
    hold = SeenClaim(ANN, "hold", Term(1), 990.0, 1005.0)
    memory.observe(View(1000, {ROLE: [hold]}), 1000)
    memory.observe(View(1020, {}), 1020)
    assert memory.view(1020).claims[ROLE] == [hold]
    memory.observe(View(1026, {}), 1026)
    assert memory.view(1026).claims[ROLE] == []
