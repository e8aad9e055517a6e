"""Frames: whatever the chunking, the messages come back; nonsense is an error, never a hang."""

import contextlib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.errors import LocalProtocolError, WorkerError
from paris_p2p.workers import frames
from paris_p2p.workers.frames import FrameReader, Message, encode

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=50),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
messages = st.dictionaries(st.text(max_size=8), plain, max_size=4)


def drain(reader: FrameReader) -> list[Message]:
    found = []
    while (message := reader.next()) is not None:
        found.append(message)
    return found


@settings(deadline=None, derandomize=True)
@given(st.lists(messages, max_size=4), st.integers(1, 40))
def test_messages_survive_any_chunking(sent: list[Message], chunk: int) -> None:
    data = b"".join(encode(message) for message in sent)
    reader, received = FrameReader(), []
    for start in range(0, len(data), chunk):
        reader.feed(data[start : start + chunk])
        received += drain(reader)
    assert received == sent


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_give_messages_or_a_worker_error(data: bytes) -> None:
    reader = FrameReader()
    reader.feed(data)
    with contextlib.suppress(WorkerError):
        assert all(isinstance(message, dict) for message in drain(reader))


def test_a_nan_travels() -> None:
    reader = FrameReader()
    reader.feed(encode({"loss": math.nan}))
    message = reader.next()
    assert message is not None and math.isnan(message["loss"])


def test_an_announced_length_over_the_cap_is_refused_before_its_bytes_arrive() -> None:
    reader = FrameReader()
    reader.feed((frames.MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(WorkerError, match="at most"):
        reader.next()


def test_what_cannot_be_sent_is_our_own_error() -> None:
    with pytest.raises(LocalProtocolError):
        encode({"x": object()})
    with pytest.raises(LocalProtocolError, match="at most"):
        encode({"x": bytes(frames.MAX_FRAME_BYTES)})
