"""Tests of `paris_node.sizes`."""

import pytest

from paris_node.sizes import (
    check_piece_length,
    parse_bytes,
    parse_ratio,
    parse_seconds,
    read_bytes,
    read_limits,
)
from paris_p2p.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("7B", 7),
        ("500k", 500_000),
        ("500K", 500_000),
        ("500KB", 500_000),
        ("1 kB", 1000),
        ("0.5M", 500_000),
        ("2.5M", 2_500_000),
        ("1MiB", 1 << 20),
        ("20G", 20 * 10**9),
        ("2gb", 2 * 10**9),
        ("4Gi", 4 << 30),
        ("1.5 GiB", 3 << 29),
        ("1T", 10**12),
    ],
)
def test_bytes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_bytes(text, "--x") == count


@pytest.mark.parametrize(
    "text", ["", "fast", "-1", "1e9", "nan", "2 G B", "2XB", "1.2.3", "0", "0.0001", "9" * 40]
)
def test_anything_else_names_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match="--limit-up"):
        parse_bytes(text, "--limit-up")


def test_an_option_that_was_not_given_is_no_limit() -> None:
    assert read_bytes(None, "--max-disk") is None
    limits = read_limits(None, "1M")
    assert (limits.up_bytes_per_s, limits.down_bytes_per_s) == (None, 1_000_000)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("12h", 43_200), ("7d", 604_800)]
)
def test_times_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_seconds(text, "--x") == seconds


@pytest.mark.parametrize("text", ["", "0", "soon", "-1s", "5w", "1e3", "inf"])
def test_anything_else_is_no_time_and_no_ratio(text: str) -> None:
    with pytest.raises(ConfigError, match="--seed-time"):
        parse_seconds(text, "--seed-time")
    with pytest.raises(ConfigError, match="--seed-ratio"):
        parse_ratio(text, "--seed-ratio")


def test_how_long_to_seed_becomes_a_limit() -> None:
    limits = read_limits(None, None, seed_ratio="2.5", seed_time="30m")
    assert (limits.seed_ratio, limits.seed_time_s) == (2.5, 1800.0)


@pytest.mark.parametrize("length", [0, -1, 100, 8192, 65_537, 1 << 27])
def test_a_piece_length_is_a_power_of_two_within_bounds(length: int) -> None:
    check_piece_length(None)
    check_piece_length(65_536)
    with pytest.raises(ConfigError, match=rf"--piece-length {length}: a power of two from 16384 .*65536"):
        check_piece_length(length)
