"""Tests of `paris_node.sizes`."""

import pytest

from paris_node.sizes import parse_bytes, read_bytes, read_limits
from paris_p2p.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("500k", 500_000), ("2.5M", 2_500_000), ("20G", 20 * 10**9), ("4Gi", 4 << 30), ("1 kB", 1000)],
)
def test_bytes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_bytes(text, "--x") == count


@pytest.mark.parametrize("text", ["", "fast", "-1", "1e9", "5m", "1.2.3", "0", "0.0001", "9" * 40])
def test_anything_else_names_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match="--limit-up"):
        parse_bytes(text, "--limit-up")


def test_an_option_that_was_not_given_is_no_limit() -> None:
    assert read_bytes(None, "--max-disk") is None
    limits = read_limits(None, "1M")
    assert (limits.up_bytes_per_s, limits.down_bytes_per_s) == (None, 1_000_000)
