"""Token buckets: the mean rate is exact, whatever the transfers look like."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.core.limiter import BURST_S, MIN_BURST_BYTES, Limiter, TokenBucket


def passed(bucket: TokenBucket, until: float, size: int) -> int:
    """Bytes that a greedy sender of blocks of `size` gets through."""
    now, total = 0.0, 0
    while (now := now + bucket.wait(now)) < until:
        bucket.take(size, now)
        total += size
    return total


def test_without_a_limit_everything_passes() -> None:
    bucket = TokenBucket(None, 0.0)
    bucket.take(10**12, 0.0)
    assert bucket.wait(0.0) == 0.0


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.floats(1e4, 1e8), st.sampled_from([1000, 65_536, 1 << 20]))
def test_the_mean_rate_is_the_limit(rate: float, size: int) -> None:
    burst = max(MIN_BURST_BYTES, rate * BURST_S)
    seconds = (burst + 200 * size) / rate
    total = passed(TokenBucket(rate, 0.0), seconds, size)
    assert rate * seconds - size <= total <= rate * seconds + burst + size + seconds


def test_a_block_larger_than_the_burst_passes_and_is_paid_for() -> None:
    bucket = TokenBucket(100_000, 0.0)
    bucket.take(1_000_000, 0.0)
    assert bucket.wait(0.0) == pytest.approx((1_000_000 - MIN_BURST_BYTES) / 100_000, abs=0.01)


def test_a_new_rate_counts_from_now_on() -> None:
    bucket = TokenBucket(1000.0, 0.0)
    bucket.take(MIN_BURST_BYTES + 10_000, 0.0)
    assert bucket.wait(0.0) == pytest.approx(10.0, abs=0.01)
    bucket.set_rate(10_000.0, 0.0)
    assert bucket.wait(0.0) == pytest.approx(1.0, abs=0.01)
    bucket.set_rate(None, 0.0)
    assert bucket.wait(0.0) == 0.0


def test_each_peer_and_all_together_are_limited() -> None:
    limiter: Limiter[str] = Limiter(200_000, 150_000, 0.0)
    limiter.take("a", 200_000, 0.0)
    assert limiter.wait("a", 0.0) > limiter.wait("b", 0.0) > 0.0
    assert limiter.available("a", 0.0) <= limiter.available("b", 0.0) < 0.0
    limiter.set_limits(None, 150_000, 0.0)
    assert limiter.wait("a", 0.0) > 0.0 and limiter.wait("b", 0.0) == 0.0
    limiter.forget("a")
    assert limiter.wait("a", 0.0) == 0.0
    limiter.set_limits(None, None, 0.0)
    assert limiter.unlimited and limiter.available("a", 0.0) == float("inf")
