"""Properties of the swarm protocol's frames: round trips, any bytes in any chunking, limits."""

import itertools
import struct
from collections.abc import Sequence

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.errors import LocalProtocolError, RemoteProtocolError
from paris_p2p.ids import FileIndex, InfoHash, PieceIndex
from paris_p2p.wire import canonical
from paris_p2p.wire import messages as m
from paris_p2p.wire.frames import FrameDecoder

check = settings(deadline=None, derandomize=True, max_examples=150)

hashes = st.binary(min_size=32, max_size=32)
addresses = st.lists(st.text(max_size=20), max_size=m.MAX_ADDRESSES).map(tuple)
pieces = st.integers(0, m.MAX_PIECES - 1).map(PieceIndex)
spans = (pieces, st.integers(0, 2**32 - 1), st.integers(1, m.MAX_BLOCK_BYTES))
chunks = st.tuples(st.integers(0, 1000), st.binary(min_size=1, max_size=100), st.integers(0, 1000))

controls: st.SearchStrategy[m.Control] = st.one_of(
    st.builds(
        m.Hello,
        st.integers(1, 65535),
        hashes.map(InfoHash),
        st.lists(st.text(min_size=1, max_size=m.MAX_FEATURE_CHARS), max_size=m.MAX_FEATURES).map(tuple),
        st.integers(m.MIN_BLOCK_BYTES, m.MAX_BLOCK_BYTES),
        st.integers(1, m.MAX_OUTSTANDING_REQUESTS),
        addresses,
    ),
    st.builds(m.InfoRequest, st.integers(0, 1 << 20)),
    chunks.map(lambda c: m.Info(c[0], c[0] + len(c[1]) + c[2], c[1])),
    st.builds(m.LayerRequest, st.integers(0, 99).map(FileIndex), st.integers(0, 1 << 20)),
    chunks.map(lambda c: m.Layer(FileIndex(3), c[0], c[0] + len(c[1]) + c[2], c[1])),
    st.just(m.Info(0, 0, b"")),
    st.builds(m.Bitfield, st.binary(max_size=300)),
    st.builds(m.Have, pieces),
    st.sampled_from([m.Interested(), m.NotInterested(), m.Choke(), m.Unchoke(), m.KeepAlive()]),
    st.builds(m.Request, *spans),
    st.builds(m.Cancel, *spans),
    st.builds(m.Reject, *spans),
    st.builds(
        m.Peers,
        st.lists(st.builds(m.PeerAddress, hashes, addresses), max_size=5).map(tuple),
        st.lists(hashes, max_size=5).map(tuple),
    ),
    st.builds(m.Bye, st.integers(0, 255), st.text(max_size=m.MAX_BYE_CHARS)),
)
blocks = st.builds(m.Block, pieces, st.integers(0, 2**32 - 1), st.binary(min_size=1, max_size=2000))
messages: st.SearchStrategy[m.Message] = st.one_of(controls, blocks)


def encode(message: m.Message) -> bytes:
    if isinstance(message, m.Block):
        return m.encode_block(message)
    assert not isinstance(message, m.Unknown)
    return m.encode(message)


def cut(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def decode(parts: Sequence[bytes]) -> tuple[list[m.Message], str]:
    """Everything that comes out, and the error that ended it."""
    decoder, out = FrameDecoder(), []
    try:
        for part in parts:
            decoder.feed(part)
            while (message := decoder.next_message()) is not None:
                out.append(message)
    except RemoteProtocolError as error:
        return out, str(error)
    return out, ""


@check
@given(st.lists(messages, max_size=6), st.lists(st.integers(0, 1 << 16), max_size=10))
def test_messages_survive_the_wire_in_any_chunking(sent: list[m.Message], cuts: list[int]) -> None:
    assert decode(cut(b"".join(map(encode, sent)), cuts)) == (sent, "")


@check
@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=8))
def test_any_bytes_give_messages_or_a_protocol_error(data: bytes, cuts: list[int]) -> None:
    assert decode(cut(data, cuts)) == decode([data])


@check
@given(controls, st.integers(0, 10_000), st.integers(1, 255), st.lists(st.integers(0, 400), max_size=4))
def test_a_damaged_message_never_does_worse_than_an_error(
    message: m.Control, place: int, flip: int, cuts: list[int]
) -> None:
    data = bytearray(m.encode(message))
    data[place % len(data)] ^= flip
    assert decode(cut(bytes(data), cuts)) == decode([bytes(data)])


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">IB", 1 + len(payload), kind) + payload


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">IB", 1 << 31, 1),  # refused at its header, before a byte of it is buffered
        struct.pack(">IB", m.MAX_CONTROL_BYTES + 2, 0),
        struct.pack(">IB", 0, 0),
        frame(2, b""),
        frame(1, bytes(8)),
        frame(0, b""),
        frame(0, canonical.pack("hello")),
        frame(0, canonical.pack(["have", {}])),
        frame(0, canonical.pack(["have", {"piece": -1}])),
        frame(0, canonical.pack(["have", {"piece": 1, "more": 1}])),
        frame(0, canonical.pack(["", {}])),
        frame(0, canonical.pack(["x" * 33, {}])),
        frame(0, canonical.pack(["bitfield", {"bits": bytes(m.MAX_PIECES // 8 + 1)}])),
        frame(0, canonical.pack(["info", {"offset": 5, "total": 6, "data": b"ab"}])),
        frame(0, canonical.pack(["info", {"offset": 0, "total": 6, "data": b""}])),
        frame(0, canonical.pack(["peers", {"added": [], "dropped": [bytes(31)]}])),
        frame(0, canonical.pack(["request", {"piece": 0, "offset": 0, "length": m.MAX_BLOCK_BYTES + 1}])),
    ],
)
def test_what_breaks_a_limit_is_refused(data: bytes) -> None:
    out, error = decode([data])
    assert out == [] and error


def test_an_unknown_message_is_reported_by_name() -> None:
    assert decode([frame(0, canonical.pack(["future", {"x": 1}]))]) == ([m.Unknown("future")], "")


def test_a_longer_block_than_was_offered_is_refused() -> None:
    decoder = FrameDecoder(max_block=m.MIN_BLOCK_BYTES)
    decoder.feed(m.block_header(PieceIndex(0), 0, m.MIN_BLOCK_BYTES + 1))
    with pytest.raises(RemoteProtocolError):
        decoder.next_message()


def test_an_error_is_final() -> None:
    decoder = FrameDecoder()
    decoder.feed(frame(9, b"") + m.encode(m.KeepAlive()))
    for _ in range(2):
        with pytest.raises(RemoteProtocolError):
            decoder.next_message()


def test_the_longest_bitfield_can_be_sent() -> None:
    whole = m.Bitfield(bytes(m.MAX_PIECES // 8))
    assert decode([m.encode(whole)]) == ([whole], "")


def test_we_cannot_send_a_block_that_is_too_long() -> None:
    with pytest.raises(LocalProtocolError):
        m.block_header(PieceIndex(0), 0, m.MAX_BLOCK_BYTES + 1)


@check
@given(controls)
def test_every_message_has_the_canonical_encoding_of_its_name_and_fields(message: m.Control) -> None:
    kind = {value: name for name, value in m._KINDS.items()}[type(message)]
    wanted = canonical.pack([kind, canonical.to_plain(message)])
    assert m.encode(message) == frame(0, wanted)


frequent = st.one_of(
    st.builds(m.Have, pieces), *(st.builds(k, *spans) for k in (m.Request, m.Cancel, m.Reject))
)
odd = st.one_of(st.none(), st.booleans(), st.floats(), st.integers(-2, 2**64 - 1), st.text(max_size=3))


def thoroughly(payload: bytes) -> m.Message | str:
    """What the general decoder makes of a control message."""
    try:
        name, fields = canonical.unpack(payload, m.MAX_CONTROL_BYTES)
        return canonical.from_plain(m._KINDS[name], fields, name)
    except RemoteProtocolError as error:
        return str(error)


def quickly(payload: bytes) -> m.Message | str:
    decoder = FrameDecoder()
    decoder.feed(frame(0, payload))
    try:
        message = decoder.next_message()
    except RemoteProtocolError as error:
        return str(error)
    assert message is not None
    return message


@check
@given(frequent, st.sampled_from(["piece", "offset", "length", "more"]), odd)
def test_frequent_messages_are_decoded_as_strictly_as_all_others(
    message: m.Frequent, field: str, value: object
) -> None:
    name = {kind: name for name, kind in m._KINDS.items()}[type(message)]
    payload = msgpack.packb([name, dict(sorted({**canonical.to_plain(message), field: value}.items()))])
    assert repr(quickly(payload)) == repr(thoroughly(payload))


@check
@given(frequent, st.integers(0, 60), st.integers(0, 255))
def test_a_changed_byte_of_a_frequent_message_is_seen_as_by_the_general_decoder(
    message: m.Frequent, at: int, byte: int
) -> None:
    payload = bytearray(m.encode(message)[5:])
    payload[at % len(payload)] = byte
    fast = m._unpack_frequent(bytes(payload))
    assert fast is None or repr(fast) == repr(thoroughly(bytes(payload)))


def received_in_place(data: bytes, step: int, decoder: FrameDecoder) -> list[m.Message]:
    """All messages of `data`, received into the decoder's own buffers, at most `step` bytes at once."""
    messages = []
    view = memoryview(data)
    while view:
        room = decoder.buffer()
        count = min(len(room), step, len(view))
        room[:count] = view[:count]
        decoder.filled(count)
        view = view[count:]
        while (message := decoder.next_message()) is not None:
            messages.append(message)
    return messages


@pytest.mark.parametrize("step", [1, 7, 4096, 1 << 20])
def test_what_is_received_in_place_is_what_was_sent(step: int) -> None:
    block = m.Block(PieceIndex(3), 16_384, bytes(range(256)) * 40)
    stream = m.encode(m.Have(PieceIndex(1))) + m.encode_block(block) * 2 + m.encode(m.KeepAlive())
    found = received_in_place(stream, step, FrameDecoder())
    assert found == [m.Have(PieceIndex(1)), block, block, m.KeepAlive()]


def test_nothing_is_set_aside_for_a_block_that_was_not_asked_for() -> None:
    decoder = FrameDecoder(expects=lambda piece, offset, length: False)
    decoder.feed(m.block_header(PieceIndex(0), 0, m.MAX_BLOCK_BYTES))
    with pytest.raises(RemoteProtocolError, match="not asked for"):
        decoder.next_message()
    assert decoder._arriving is None
