"""`data.stages`: finished work is kept, interrupted work is not, a foreign folder is left alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from paris_p2p.data.stages import STATE_NAME, Stages, open_stages
from paris_p2p.errors import ConfigError, StoreError


def write(text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "result").write_text(text)

    return make


def two_stages(stages: Stages, number: int, first: str, second: str) -> tuple[str, str]:
    """Stage `a` made from `number`, and stage `b` from `a`: what their folders hold."""
    a = stages.run("a", (), {"number": number}, write(first))
    b = stages.run("b", ("a",), {}, write(second))
    return (a / "result").read_text(), (b / "result").read_text()


def test_a_finished_stage_is_not_done_again(tmp_path: Path) -> None:
    for _ in range(2):
        with open_stages(tmp_path / "out") as stages:
            assert two_stages(stages, 1, "a1", "b1") == ("a1", "b1")
    with open_stages(tmp_path / "out") as stages:
        assert two_stages(stages, 1, "ignored", "ignored") == ("a1", "b1")
        assert stages.reused == ["a", "b"]


def test_changed_inputs_redo_the_stage_and_those_after_it(tmp_path: Path) -> None:
    with open_stages(tmp_path / "out") as stages:
        two_stages(stages, 1, "a1", "b1")
    with open_stages(tmp_path / "out") as stages:
        assert two_stages(stages, 2, "a2", "b2") == ("a2", "b2")
        assert stages.reused == []


def test_an_interrupted_stage_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "result").write_text("half")
        raise KeyboardInterrupt

    with open_stages(tmp_path / "out") as stages:
        two_stages(stages, 1, "a1", "b1")
    with pytest.raises(KeyboardInterrupt), open_stages(tmp_path / "out") as stages:
        stages.run("a", (), {"number": 2}, interrupted)
    with open_stages(tmp_path / "out") as stages:
        assert two_stages(stages, 2, "a2", "b2") == ("a2", "b2")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else"), open_stages(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match="not a folder"), open_stages(tmp_path / "thesis.txt"):
        pass


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / STATE_NAME).write_text("{")
    with pytest.raises(ConfigError, match="damaged"), open_stages(tmp_path):
        pass


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    with (
        open_stages(tmp_path / "out"),
        pytest.raises(StoreError, match="being prepared by process"),
        open_stages(tmp_path / "out"),
    ):
        pass
    with open_stages(tmp_path / "out"):
        pass
