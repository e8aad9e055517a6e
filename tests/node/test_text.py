"""Tests of `paris_node.text`."""

from paris_node.text import printable


def test_control_characters_are_replaced_and_the_rest_stays() -> None:
    assert printable("día 7 – ok") == "día 7 – ok"
    assert printable("a\x1b[2J\nb\x07\u202e") == "a�[2J�b��"
