"""The order of the suite: with two workers the longest file must not start last."""

from pathlib import Path

import pytest

LONGEST = "test_whole_loop.py"
LONG = ("test_node_life.py", "test_bad_input.py")


def _name(item: pytest.Item) -> str:
    return Path(item.path).name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The demo first, the other long files when it is about to end: side by side they would only wait for
    each other's processes, and at the end one worker would wait for the other."""
    short = [item for item in items if _name(item) not in (LONGEST, *LONG)]
    middle = len(short) // 2
    while 0 < middle < len(short) and short[middle].path == short[middle - 1].path:
        middle += 1
    items[:] = [
        *(item for item in items if _name(item) == LONGEST),
        *short[:middle],
        *(item for name in LONG for item in items if _name(item) == name),
        *short[middle:],
    ]
