"""Tests of `paris_p2p.core.access` and of the pass it reads (`paris_p2p.wire.access_pass`)."""

import dataclasses
from typing import Any

import pytest

from paris_p2p.core.access import admitted, check_own_access, may_claim
from paris_p2p.errors import ConfigError, RemoteProtocolError
from paris_p2p.ids import RunId, Term, expert_role
from paris_p2p.wire.access_pass import Pass, check_pass, parse_pass_text, pass_text, sign_pass
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.manifest import SignedManifest
from paris_p2p.wire.records import AttestRecord, ClaimRecord, MemberRecord, Record, role_scope
from tests.samples import ORGANISER, manifest

ALICE, BOB = Identity(b"a" * 32), Identity(b"b" * 32)
RUN = RunId(b"r" * 32)
NOW = 1_750_000_000.0


def run(**changed: Any) -> SignedManifest:
    """A run's manifest, as far as access is concerned."""
    return SignedManifest(manifest(**{"restricted": True, **changed}), RUN, b"")


def leave(node: Identity = BOB, *, by: Identity = ORGANISER, run_id: RunId = RUN) -> bytes:
    return sign_pass(Pass(run_id, node.node_id, int(NOW) + 60), by)


def test_everybody_may_claim_in_an_open_run() -> None:
    assert may_claim(run(restricted=False), ALICE.node_id, b"", NOW)


def test_in_a_restricted_run_the_organiser_and_those_named_may() -> None:
    restricted = run(claimants=(ALICE.node_id,))
    assert may_claim(restricted, ORGANISER.node_id, b"", NOW)
    assert may_claim(restricted, ALICE.node_id, b"", NOW)
    assert not may_claim(restricted, BOB.node_id, b"", NOW)


def test_a_pass_lets_its_node_in_until_it_expires() -> None:
    assert may_claim(run(), BOB.node_id, leave(), NOW)
    assert not may_claim(run(), BOB.node_id, leave(), NOW + 60)
    assert not may_claim(run(), ALICE.node_id, leave(), NOW)


@pytest.mark.parametrize(
    "data",
    [b"x", bytes(72), leave(by=BOB), leave(run_id=RunId(b"s" * 32)), leave()[:-1], leave() + b"\0",
     (int(NOW) + 10**6).to_bytes(8, "big") + leave()[8:]],
)  # fmt: skip
def test_what_the_organiser_did_not_sign_is_no_pass(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        check_pass(data, RUN, BOB.node_id, ORGANISER.node_id)
    assert not may_claim(run(), BOB.node_id, data, NOW)


def test_claims_and_attestations_of_others_are_left_out() -> None:
    scope = role_scope(RUN, expert_role(0))
    claim = ClaimRecord("hold", Term(1), NOW)
    records = [
        Record("claim", scope, BOB.node_id, claim, NOW),
        Record("claim", scope, BOB.node_id, dataclasses.replace(claim, access=leave()), NOW),
        Record("claim", scope, ALICE.node_id, dataclasses.replace(claim, access=leave()), NOW),
        Record("attest", scope, ALICE.node_id, AttestRecord(()), NOW),
        Record("attest", scope, BOB.node_id, AttestRecord((), leave()), NOW),
        Record("attest", scope, ORGANISER.node_id, AttestRecord(()), NOW),
    ]
    assert admitted(run(), records, NOW) == [records[1], records[4], records[5]]
    assert admitted(run(restricted=False), records, NOW) == records


def test_a_node_learns_why_it_may_not_claim() -> None:
    assert check_own_access(run(), ORGANISER.node_id, b"", NOW) is None
    assert check_own_access(run(), BOB.node_id, leave(), NOW) is None
    assert "restricted" in (check_own_access(run(), BOB.node_id, b"", NOW) or "")
    with pytest.raises(ConfigError, match="expired"):
        check_own_access(run(), BOB.node_id, leave(), NOW + 60)
    with pytest.raises(ConfigError, match="peer id"):
        check_own_access(run(), ALICE.node_id, leave(), NOW)


def test_a_pass_is_one_line_of_text_and_back() -> None:
    assert parse_pass_text("  " + pass_text(leave()) + "\n") == leave()


@pytest.mark.parametrize(
    "text", ["", "hello", pass_text(leave())[:-4], pass_text(leave()) + "!", "paris-pass-1:"]
)
def test_other_text_is_no_pass(text: str) -> None:
    with pytest.raises(ConfigError, match="pass"):
        parse_pass_text(text)


def test_a_pass_needs_an_expiry_that_is_a_time() -> None:
    with pytest.raises(ConfigError):
        sign_pass(Pass(RUN, BOB.node_id, 0), ORGANISER)


def test_a_member_record_is_not_admitted_as_a_claim() -> None:
    member = MemberRecord((), "x", expert_role(0), Term(1), 0, 0, 0.0, 0.0, 0, 0, NOW)
    assert admitted(run(), [Record("member", RUN, ORGANISER.node_id, member, NOW)], NOW) == []
