"""Requests under way at one peer: window, lateness."""

from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.core.pipeline import (
    FIRST_WINDOW_BYTES,
    MAX_PATIENCE_S,
    MAX_WINDOW_BYTES,
    MIN_PATIENCE_S,
    MIN_WINDOW_BYTES,
    Key,
    Pipeline,
)
from paris_p2p.ids import PieceIndex

P = PieceIndex
BLOCK = 65_536


def deliver(pipeline: Pipeline, count: int, each_s: float, answer_s: float) -> float:
    """`count` blocks, one every `each_s`, each asked for `answer_s` before; the time after the last."""
    now = answer_s
    for piece in range(count):
        key = (P(piece), 0, BLOCK)
        pipeline.ask(key, now - answer_s)
        pipeline.block(key, now)
        now += each_s
    return now


def test_an_unmeasured_peer_gets_a_first_window_and_has_no_rate() -> None:
    pipeline = Pipeline(BLOCK, 0.0)
    assert pipeline.window(0.0) == FIRST_WINDOW_BYTES
    assert not pipeline.measured and pipeline.eta(1, 0.0) == float("inf")


def test_the_window_is_what_the_peer_delivers_in_its_delay_and_a_bit() -> None:
    near, far = Pipeline(BLOCK, 0.0), Pipeline(BLOCK, 0.0)
    end = max(deliver(near, 400, 0.02, 0.01), deliver(far, 400, 0.02, 0.5))
    assert MIN_WINDOW_BYTES < near.window(end) < far.window(end) < MAX_WINDOW_BYTES


def test_a_slow_peer_keeps_a_small_window() -> None:
    pipeline = Pipeline(BLOCK, 0.0)
    assert pipeline.window(deliver(pipeline, 20, 5.0, 0.1)) == MIN_WINDOW_BYTES


def test_a_peer_that_delivers_nothing_is_late_after_a_while() -> None:
    pipeline = Pipeline(BLOCK, 0.0)
    assert not pipeline.late(100.0)
    pipeline.ask((P(0), 0, BLOCK), 100.0)
    assert not pipeline.late(100.0 + MIN_PATIENCE_S)
    assert pipeline.late(100.1 + MIN_PATIENCE_S)


def test_a_peer_known_to_be_slow_is_given_more_time() -> None:
    pipeline = Pipeline(BLOCK, 0.0)
    end = deliver(pipeline, 20, 3.0, 3.0) - 3.0
    pipeline.ask((P(99), 0, BLOCK), end)
    assert not pipeline.late(end + MIN_PATIENCE_S + 1.0)
    assert pipeline.late(end + MAX_PATIENCE_S + 1.0)


def test_a_snubbed_peer_is_asked_for_one_block_until_it_delivers_one_in_time() -> None:
    pipeline = Pipeline(BLOCK, 0.0)
    pipeline.snubbed = True
    assert pipeline.window(0.0) == BLOCK
    pipeline.block((P(0), 0, BLOCK), 1.0)  # an answer to what was given up
    assert pipeline.snubbed
    pipeline.ask((P(1), 0, BLOCK), 1.0)
    pipeline.block((P(1), 0, BLOCK), 2.0)
    assert not pipeline.snubbed


keys = st.tuples(st.integers(0, 3), st.sampled_from([0, 16]), st.just(16))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from("agb"), keys), max_size=60))
def test_the_books_add_up(script: list[tuple[str, tuple[int, int, int]]]) -> None:
    pipeline, asked, now = Pipeline(16, 0.0), set[Key](), 0.0
    for action, (piece, offset, length) in script:
        key, now = (P(piece), offset, length), now + 0.1
        if action == "a" and key not in asked:
            pipeline.ask(key, now)
            asked.add(key)
        elif action == "g":
            assert pipeline.give_up(key) == (key in asked)
            asked.discard(key)
        elif action == "b":
            pipeline.block(key, now)
            asked.discard(key)
        assert set(pipeline.asked) == asked and pipeline.asked_bytes == 16 * len(asked)
        assert MIN_WINDOW_BYTES <= pipeline.window(now) <= MAX_WINDOW_BYTES
