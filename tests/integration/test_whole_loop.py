"""The main path with real processes on loopback, as the demo plays it: prepare, publish, join, one
volunteer killed, fetch with an empty home, generate. Played once; the tests look at what came of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROLES = ("expert-0", "expert-1", "expert-2", "expert-3", "router")
DEMO_DEADLINE_S = 900.0


@dataclass(frozen=True)
class Played:
    """What the demo said and left."""

    events: list[dict[str, Any]]
    folder: Path
    left_behind: list[str]

    def said(self, actor: str, name: str) -> list[dict[str, Any]]:
        """The events called `name` of one actor."""
        heard = [e["said"] for e in self.events if e["event"] == "actor" and e["actor"] == actor]
        return [event for event in heard if event.get("event") == name]

    @property
    def end(self) -> dict[str, Any]:
        """The demo's last event."""
        return self.events[-1]


@pytest.fixture(scope="module")
def played(stage: Any) -> Played:
    """One whole demo."""
    program = stage.start("paris_node", "demo", "--json", "--out", stage.folder / "demo")
    assert program.wait(DEMO_DEADLINE_S) == 0, program.tail()
    return Played(program.events, stage.folder / "demo", stage.left_behind())


def test_every_role_finishes(played: Played) -> None:
    roles = played.end["roles"]
    assert sorted(roles) == sorted(ROLES)
    assert all(role["step"] == role["total_steps"] for role in roles.values())


def test_the_killed_role_is_taken_over_from_its_announced_step_with_the_next_term(played: Played) -> None:
    killed = played.end["killed"]
    others = {"alice", "bob", "carol"} - {killed["name"]}
    resumed = [e for name in others for e in played.said(name, "resumed") if e["role"] == killed["role"]]
    assert len(resumed) == 1
    assert resumed[0]["term"] == killed["term"] + 1
    announced = [e["step"] for e in played.said(killed["name"], "checkpoint") if e["role"] == killed["role"]]
    assert resumed[0]["step"] == announced[-1] >= killed["announced_step"] > 0


def test_no_role_is_finished_twice(played: Played) -> None:
    finished = [e["role"] for name in ("alice", "bob", "carol") for e in played.said(name, "finished")]
    assert sorted(finished) == sorted(ROLES)


def test_nothing_is_left_behind(played: Played) -> None:
    assert played.left_behind == []


def test_the_model_folder_is_whole_and_without_symbolic_links(played: Played) -> None:
    model = Path(played.end["model"])
    folders = {path.name for path in model.iterdir() if path.is_dir()}
    assert {"expert_0", "expert_1", "expert_2", "expert_3", "router", "text_encoder", "tokenizer"} <= folders
    assert not [path for path in model.rglob("*") if path.is_symlink()]


def test_the_grid_is_drawn(played: Played) -> None:
    with Image.open(played.end["grid"]) as grid:
        assert grid.width > 100 and grid.height > 100


def test_nine_of_ten_samples_show_the_digit_asked_for(played: Played) -> None:
    digits = load_digits()
    judge = SVC(gamma=0.001).fit(digits.data, digits.target)
    images, asked = [], []
    for path in sorted((played.folder / "images").glob("*.png")):
        with Image.open(path) as image:
            asked.append(DIGITS.index(str(image.info["prompt"]).split()[-1]))
            images.append(np.asarray(image.convert("L"), dtype=np.float64).reshape(-1) / 255 * 16)
    assert len(images) == 80
    right = judge.predict(np.stack(images)) == np.array(asked)
    assert right.mean() >= 0.9
