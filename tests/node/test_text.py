"""Tests of `paris_node.text`."""

import pytest

from paris_node.text import counted, human_seconds, printable


def test_control_characters_are_replaced_and_the_rest_stays() -> None:
    assert printable("día 7 – ok") == "día 7 – ok"
    assert printable("a\x1b[2J\nb\x07\u202e") == "a�[2J�b��"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (200.0, "3m20s"), (7500.0, "2h05m")],
)
def test_durations_are_short(seconds: float | None, text: str) -> None:
    assert human_seconds(seconds) == text


def test_counts_agree_with_their_noun() -> None:
    assert [counted(n, "peer") for n in (0, 1, 2)] == ["0 peers", "1 peer", "2 peers"]
    assert counted(1200, "copy", "copies") == "1,200 copies"
