"""Tests of `paris_node.commands.prepare`."""

import pytest

from paris_node.commands.prepare import _assignment
from paris_p2p.errors import ConfigError


def test_an_expert_s_kind_is_written_role_equals_kind() -> None:
    assert _assignment("expert-3=small:ddpm") == (3, "small:ddpm")


@pytest.mark.parametrize("text", ["", "expert-3", "expert-3=", "3=small", "expert-x=small", "router=small"])
def test_another_way_of_writing_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="expert-3=small:ddpm"):
        _assignment(text)
