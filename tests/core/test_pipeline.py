"""Blocks of the pieces one peer delivers."""

from paris_p2p.core.pipeline import MAX_WINDOW_BYTES, MIN_WINDOW_BYTES, Pipeline
from paris_p2p.ids import PieceIndex

P = PieceIndex


def blocks(pipeline: Pipeline) -> list[tuple[int, int, int]]:
    out: list[tuple[int, int, int]] = []
    while (block := pipeline.next_block()) is not None:
        out.append(block)
    return out


def test_a_piece_is_asked_for_block_by_block_and_comes_out_whole() -> None:
    pipeline = Pipeline(4, 0.0)
    pipeline.start(P(7), 10)
    assert blocks(pipeline) == [(7, 0, 4), (7, 4, 4), (7, 8, 2)]
    assert pipeline.block(P(7), 8, b"ij", 1.0) is None
    assert pipeline.block(P(7), 0, b"abcd", 1.0) is None
    assert pipeline.block(P(7), 4, b"efgh", 1.0) == b"abcdefghij"
    assert pipeline.active == []


def test_a_block_that_comes_twice_counts_once() -> None:
    pipeline = Pipeline(4, 0.0)
    pipeline.start(P(0), 8)
    assert pipeline.block(P(0), 0, b"abcd", 1.0) is None
    assert pipeline.block(P(0), 0, b"abcd", 1.0) is None
    assert pipeline.block(P(0), 4, b"efgh", 1.0) == b"abcdefgh"


def test_a_kept_piece_continues_where_it_stopped() -> None:
    pipeline = Pipeline(4, 0.0)
    pipeline.start(P(0), 12)
    blocks(pipeline)
    pipeline.block(P(0), 0, b"abcd", 1.0)
    pipeline.keep(P(0))
    pipeline.put_back(P(0), 4, 4)
    pipeline.put_back(P(0), 8, 4)
    assert pipeline.kept == [0]
    pipeline.start(P(0), 12)
    assert blocks(pipeline) == [(0, 4, 4), (0, 8, 4)]


def test_nothing_is_kept_of_a_piece_without_blocks() -> None:
    pipeline = Pipeline(4, 0.0)
    pipeline.start(P(0), 12)
    pipeline.keep(P(0))
    assert pipeline.kept == [] and pipeline.drop(P(0)) == 0


def test_the_window_follows_the_rate_within_bounds() -> None:
    pipeline = Pipeline(4, 0.0)
    assert pipeline.window(0.0) == MIN_WINDOW_BYTES
    pipeline.meter.add(20_000_000, 10.0)
    assert MIN_WINDOW_BYTES < pipeline.window(10.0) < MAX_WINDOW_BYTES
    pipeline.meter.add(10**9, 10.0)
    assert pipeline.window(10.0) == MAX_WINDOW_BYTES
