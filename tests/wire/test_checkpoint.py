"""Tests of `paris_p2p.wire.checkpoint`."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.errors import LocalProtocolError, RemoteProtocolError
from paris_p2p.ids import InfoHash, NodeId, RunId, Term, expert_role
from paris_p2p.wire import canonical, checkpoint
from paris_p2p.wire.checkpoint import (
    MAX_STATEMENT_BYTES,
    CheckpointStatement,
    check_statement,
    sign_statement,
)
from paris_p2p.wire.content import MAX_ITEM_BYTES, MAX_PIECE_LENGTH, ContentRef
from paris_p2p.wire.identity import Identity

HOLDER = Identity(b"h" * 32)
STATEMENT = CheckpointStatement(
    run_id=RunId(b"r" * 32),
    role=expert_role(1023),
    term=Term(3),
    holder=HOLDER.node_id,
    step=50,
    total_steps=100,
    variant=0,
    weights=ContentRef(InfoHash(b"w" * 32), MAX_ITEM_BYTES, MAX_PIECE_LENGTH),
    resume=ContentRef(InfoHash(b"s" * 32), MAX_ITEM_BYTES, MAX_PIECE_LENGTH),
    parent=b"p" * 32,
    heldout_loss=0.25,
    created_unix=1.7e9,
)
SIGNED = sign_statement(STATEMENT, HOLDER)


def test_a_signed_statement_comes_back_as_it_went_in() -> None:
    assert check_statement(SIGNED) == STATEMENT and len(SIGNED) <= MAX_STATEMENT_BYTES


def test_the_answers_asked_for_last_are_remembered_refusals_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paris_p2p.wire.checkpoint.CACHED_STATEMENTS", 3)
    monkeypatch.setattr("paris_p2p.wire.checkpoint._answers", {})
    bad = [bytes([number]) for number in range(4)]
    for data in (SIGNED, bad[0], bad[1], SIGNED, bad[2], bad[3], SIGNED, bad[3]):
        if data == SIGNED:
            assert check_statement(data) == STATEMENT
        else:
            with pytest.raises(RemoteProtocolError):
                check_statement(data)
    assert list(checkpoint._answers) == [bad[2], SIGNED, bad[3]]


def test_any_changed_byte_is_refused() -> None:
    for position in range(len(SIGNED)):
        damaged = bytearray(SIGNED)
        damaged[position] ^= 1
        with pytest.raises(RemoteProtocolError):
            check_statement(bytes(damaged))


def test_a_statement_signed_by_another_than_its_holder_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="not signed by its holder"):
        check_statement(sign_statement(STATEMENT, Identity(b"x" * 32)))


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": 101},
        {"term": Term(0)},
        {"variant": -1},
        {"run_id": RunId(b"")},
        {"holder": NodeId(bytes(31))},
        {"parent": bytes(20)},
    ],
)
def test_a_statement_out_of_range_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"out of range|wrong length"):
        dataclasses.replace(STATEMENT, **change)
    plain = canonical.to_plain(STATEMENT) | change
    with pytest.raises(RemoteProtocolError):
        canonical.from_plain(CheckpointStatement, plain)


def test_a_loss_that_is_no_number_cannot_be_stated() -> None:
    for loss in (math.nan, math.inf):
        with pytest.raises(LocalProtocolError):
            sign_statement(dataclasses.replace(STATEMENT, heldout_loss=loss), HOLDER)


def test_an_oversized_statement_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="at most"):
        check_statement(bytes(MAX_STATEMENT_BYTES + 1))


def test_only_the_last_step_is_finished() -> None:
    assert not STATEMENT.finished and dataclasses.replace(STATEMENT, step=100).finished


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_remote_protocol_error(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        check_statement(data)
