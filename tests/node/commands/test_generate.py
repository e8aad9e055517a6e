"""Tests of `paris_node.commands.generate`."""

import pytest

from paris_node.commands.generate import parse_bytes
from paris_p2p.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2000000000", 2_000_000_000),
        ("2GB", 2_000_000_000),
        ("2gb", 2_000_000_000),
        ("1.5 GiB", 3 << 29),
        ("800M", 800_000_000),
        ("3KiB", 3072),
        ("7B", 7),
    ],
)
def test_an_amount_of_memory_is_read(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "1e9", "2XB", "2 G B"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no amount of memory"):
        parse_bytes(text)
