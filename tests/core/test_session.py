"""The session: greetings, books of requests on both sides, deadlines, violations."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.core.session import (
    TRANSITIONS,
    Event,
    KeepAliveDue,
    Limits,
    MetadataTimedOut,
    RequestTimedOut,
    Session,
    State,
    WastedBlock,
)
from paris_p2p.errors import LocalProtocolError, RemoteProtocolError, TransportError
from paris_p2p.ids import FileIndex, InfoHash, PieceIndex
from paris_p2p.wire import messages as m

ITEM = InfoHash(bytes(range(32)))
P = PieceIndex
SPAN = (P(1), 0, 16)


def greeted(limits: Limits = Limits()) -> tuple[Session, Session]:  # noqa: B008 - frozen
    """(who dialled, who accepted), both open and unchoked, bitfields exchanged."""
    a, b = Session(0.0, limits), Session(0.0, limits)
    b.receive(a.hello(ITEM, (m.IGNORE_UNKNOWN,), ()), 0.0)
    a.receive(b.hello(ITEM, (m.IGNORE_UNKNOWN,), ()), 0.0)
    for one, other in ((a, b), (b, a)):
        other.receive(one.bitfield(b"\x00", 0.0) + one.unchoke(0.0), 0.0)
    return a, b


def block(data: bytes = bytes(16)) -> bytes:
    return m.encode_block(m.Block(P(1), 0, data))


def test_both_sides_open_after_their_greetings() -> None:
    a, b = greeted()
    assert a.state is b.state is State.OPEN
    assert a.shares(m.IGNORE_UNKNOWN) and not a.shares("other")


def test_a_request_is_answered_by_its_block() -> None:
    a, b = greeted()
    assert b.receive(a.request(*SPAN, now=1.0), 1.0) == [m.Request(*SPAN)]
    data = b.answer(*SPAN, now=1.0) + bytes(16)
    assert a.receive(data, 1.0) == [m.Block(P(1), 0, bytes(16))]
    assert a.asked(P(1)) == [] and a.can_request(*SPAN)


def test_a_request_may_be_rejected() -> None:
    a, b = greeted()
    b.receive(a.request(*SPAN, now=1.0), 1.0)
    assert a.receive(b.reject(*SPAN, now=1.0), 1.0) == [m.Reject(*SPAN)]


def test_a_cancelled_request_may_still_be_answered_either_way() -> None:
    for answer in ("block", "reject"):
        a, b = greeted()
        b.receive(a.request(*SPAN, now=1.0), 1.0)
        assert b.receive(a.cancel(P(1), 1.0), 1.0) == [m.Cancel(*SPAN)]
        assert not a.can_request(*SPAN)
        if answer == "block":
            assert a.receive(b.answer(*SPAN, now=1.0) + bytes(16), 1.0) == [WastedBlock(16)]
        else:
            assert a.receive(b.reject(*SPAN, now=1.0), 1.0) == []
        assert a.can_request(*SPAN)


def test_a_cancel_that_crosses_its_answer_is_ignored() -> None:
    a, b = greeted()
    b.receive(a.request(*SPAN, now=1.0), 1.0)
    b.answer(*SPAN, now=1.0)
    assert b.receive(a.cancel(P(1), 1.0), 1.0) == []


@pytest.mark.parametrize(
    "data",
    [
        block(),
        m.encode(m.Reject(*SPAN)),
        m.encode(m.Info(0, 1, b"x")),
        m.encode(m.Layer(FileIndex(0), 0, 1, b"x")),
        m.encode(m.Bitfield(b"\x00")),
        m.encode(m.Request(*SPAN)) * 2,
        m.encode(m.InfoRequest(0)) * 9,
        m.encode(m.Hello(1, ITEM, (), m.MIN_BLOCK_BYTES, 1, ())),
        b"\xff" * 20,
    ],
)
def test_what_the_protocol_forbids_closes_the_session(data: bytes) -> None:
    a, _ = greeted()
    with pytest.raises(RemoteProtocolError):
        a.receive(data, 1.0)
    assert a.state is State.CLOSED


def test_a_have_before_the_bitfield_is_a_violation() -> None:
    a, b = Session(0.0), Session(0.0)
    b.receive(a.hello(ITEM, (), ()), 0.0)
    b.hello(ITEM, (), ())
    with pytest.raises(RemoteProtocolError):
        b.receive(m.encode(m.Have(P(0))), 0.0)


def test_more_requests_than_were_offered_are_a_violation() -> None:
    a, _ = greeted(Limits(max_requests=3))
    with pytest.raises(RemoteProtocolError, match="more than 3"):
        a.receive(b"".join(m.encode(m.Request(P(1), i, 1)) for i in range(4)), 1.0)


def test_we_never_ask_for_more_than_the_peer_offers() -> None:
    a, _ = greeted(Limits(max_requests=2))
    a.request(P(1), 0, 1, 1.0)
    a.request(P(1), 1, 1, 1.0)
    assert a.request_room() == 0
    with pytest.raises(LocalProtocolError):
        a.request(P(1), 2, 1, 1.0)


def test_nothing_is_asked_of_a_peer_that_chokes_us() -> None:
    a, b = greeted()
    a.receive(b.choke(1.0), 1.0)
    assert a.request_room() == 0


def test_another_version_or_item_is_refused() -> None:
    for version, item in ((2, ITEM), (1, InfoHash(bytes(32)))):
        a = Session(0.0)
        a.hello(ITEM, (), ())
        with pytest.raises(RemoteProtocolError):
            a.receive(m.encode(m.Hello(version, item, (), m.MIN_BLOCK_BYTES, 1, ())), 0.0)


def test_unknown_messages_are_skipped_only_where_that_was_offered() -> None:
    from paris_p2p.wire import canonical

    payload = canonical.pack(["future", {}])
    frame = (len(payload) + 1).to_bytes(4, "big") + b"\x00" + payload
    a, _ = greeted()
    assert a.receive(frame, 1.0) == []
    plain = Session(0.0)
    plain.hello(ITEM, (), ())
    plain.receive(m.encode(m.Hello(1, ITEM, (), m.MIN_BLOCK_BYTES, 1, ())), 0.0)
    with pytest.raises(RemoteProtocolError):
        plain.receive(frame, 1.0)


def test_events_before_a_violation_are_delivered() -> None:
    a, _ = greeted()
    a.feed(m.encode(m.Have(P(3))) + block(), 1.0)
    assert a.next_event(1.0) == m.Have(P(3))
    with pytest.raises(RemoteProtocolError):
        a.next_event(1.0)


def test_a_silent_greeting_has_a_deadline() -> None:
    a = Session(0.0)
    a.hello(ITEM, (), ())
    assert a.tick(a.next_deadline() - 0.1) == []
    with pytest.raises(TransportError):
        a.tick(a.next_deadline())


def test_a_request_has_a_deadline_and_its_late_block_is_waste() -> None:
    a, b = greeted()
    b.receive(a.request(*SPAN, now=1.0), 1.0)
    deadline = a.next_deadline()
    assert deadline == 1.0 + a.limits.request_s
    assert a.tick(deadline) == [RequestTimedOut(*SPAN)]
    assert a.receive(b.answer(*SPAN, now=30.0) + bytes(16), 30.0) == [WastedBlock(16)]


def test_blocks_push_the_deadline_of_those_behind_them_but_not_for_ever() -> None:
    a, b = greeted()
    for offset in (0, 16, 32):
        b.receive(a.request(P(1), offset, 16, 0.0), 0.0)
    a.receive(b.answer(P(1), 0, 16, 15.0) + bytes(16), 15.0)
    assert not [e for e in a.tick(29.0) if isinstance(e, RequestTimedOut)]
    a.receive(b.answer(P(1), 16, 16, 70.0) + bytes(16), 70.0)
    assert RequestTimedOut(P(1), 32, 16) in a.tick(4 * a.limits.request_s)


def test_unanswered_metadata_is_reported() -> None:
    a, _ = greeted()
    a.info_request(0, 1.0)
    assert a.tick(1.0 + a.limits.metadata_s) == [MetadataTimedOut()]


def test_a_quiet_session_is_kept_alive_and_a_dead_one_is_not() -> None:
    a, b = greeted()
    assert a.tick(a.next_deadline()) == [KeepAliveDue()]
    assert b.receive(a.keep_alive(30.0), 30.0) == []
    with pytest.raises(TransportError):
        a.tick(a.limits.silence_s)


def test_nothing_comes_after_a_goodbye() -> None:
    a, b = greeted()
    assert a.receive(b.bye(m.BYE_DONE, "bye") + block(), 1.0) == [m.Bye(m.BYE_DONE, "bye")]
    assert a.state is b.state is State.CLOSED
    assert a.receive(b"\xff" * 10, 2.0) == []
    with pytest.raises(LocalProtocolError):
        a.have(P(0), 1.0)


KINDS: dict[type[m.Message], bytes] = {
    m.Hello: m.encode(m.Hello(1, ITEM, (), m.MIN_BLOCK_BYTES, 1, ())),
    m.InfoRequest: m.encode(m.InfoRequest(0)),
    m.Info: m.encode(m.Info(0, 1, b"x")),
    m.LayerRequest: m.encode(m.LayerRequest(FileIndex(0), 0)),
    m.Layer: m.encode(m.Layer(FileIndex(0), 0, 1, b"x")),
    m.Bitfield: m.encode(m.Bitfield(b"")),
    m.Have: m.encode(m.Have(P(0))),
    m.Interested: m.encode(m.Interested()),
    m.NotInterested: m.encode(m.NotInterested()),
    m.Choke: m.encode(m.Choke()),
    m.Unchoke: m.encode(m.Unchoke()),
    m.Request: m.encode(m.Request(*SPAN)),
    m.Cancel: m.encode(m.Cancel(*SPAN)),
    m.Reject: m.encode(m.Reject(*SPAN)),
    m.Peers: m.encode(m.Peers((), ())),
    m.KeepAlive: m.encode(m.KeepAlive()),
    m.Bye: m.encode(m.Bye(0, "")),
    m.Block: block(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_greeting_only_a_greeting_or_goodbye_is_legal(kind: type[m.Message]) -> None:
    a = Session(0.0)
    if (State.GREETING, kind) in TRANSITIONS:
        a.receive(KINDS[kind], 0.0)
        assert a.state is TRANSITIONS[State.GREETING, kind]
    else:
        with pytest.raises(RemoteProtocolError):
            a.receive(KINDS[kind], 0.0)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.sampled_from(sorted(KINDS, key=lambda kind: kind.__name__)), max_size=20))
def test_any_order_of_messages_is_handled_or_refused(kinds: list[type[m.Message]]) -> None:
    a, _ = greeted()
    events: list[Event] = []
    try:
        events = a.receive(b"".join(KINDS[kind] for kind in kinds), 1.0)
    except RemoteProtocolError:
        assert a.state is State.CLOSED
    assert len(events) <= len(kinds)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from("rcasRt"), st.integers(0, 5)), max_size=60))
def test_the_books_of_both_sides_agree(script: list[tuple[str, int]]) -> None:
    """Whatever is asked, cancelled, answered, rejected or timed out, no side sees a violation, and once
    everything is answered there is room for everything again."""
    a, b = greeted(Limits(max_requests=4))
    now, owed = 1.0, list[m.Request]()
    for action, number in script:
        key = (P(0), 16 * number, 16)
        if action == "r" and a.request_room() > 0 and a.can_request(*key) and key not in a.asked(P(0)):
            owed += [e for e in b.receive(a.request(*key, now=now), now) if isinstance(e, m.Request)]
        elif action == "c":
            b.receive(a.cancel(P(0), now), now)
        elif action == "t":
            now += 10.0
            b.receive(a.keep_alive(now), now)
            a.receive(b.keep_alive(now), now)
            a.tick(now)
        elif action in "as" and owed:
            r = owed.pop(0)
            a.receive(b.answer(r.piece, r.offset, r.length, now) + bytes(r.length), now)
        elif action == "R" and owed:
            r = owed.pop()
            a.receive(b.reject(r.piece, r.offset, r.length, now), now)
    for r in owed:
        a.receive(b.reject(r.piece, r.offset, r.length, now), now)
    assert a.request_room() == 4
