"""One node's life on a small run: joins, is interrupted, comes back, finishes; what scripts rely on."""

import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
STEPS = 40


@pytest.fixture(scope="module")
def prepared(stage: Any) -> Path:
    """A run of two clusters over 64 little pictures, with captions in metadata.jsonl."""
    source, out = Path(stage.folder / "pictures"), Path(stage.folder / "run")
    source.mkdir()
    lines = []
    for number in range(64):
        shade = 220 if number % 2 else 30
        image = Image.new("L", (8, 8), shade)
        image.putpixel((number % 8, number // 8), 255 - shade)
        image.save(source / f"{number}.png")
        lines.append(
            f'{{"file_name": "{number}.png", "text": "a {"bright" if number % 2 else "dark"} picture"}}'
        )
    (source / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    options = ("--clusters", 2, "--steps", STEPS, "--name", "small", "--short-lease")
    program = stage.here("prepare", source, "--out", out, *options, home="organiser")
    assert program.wait() == 0, program.tail()
    event = program.events[-1]
    assert event["event"] == "prepared" and event["skipped"] == 0
    assert [cluster["id"] for cluster in event["clusters"]] == [0, 1]
    return out


@pytest.fixture(scope="module")
def network(stage: Any, prepared: Path) -> str:
    """The address of a bootstrap node where the run is published."""
    address = str(stage.bootstrap()[1])
    publisher = stage.node(
        "publish", prepared, "--bootstrap", address, "--listen", LOOPBACK, home="organiser"
    )
    assert len(publisher.wait_event("published")["run_id"]) == 64
    return address


def test_a_model_without_checkpoints_is_incomplete(stage: Any, network: str) -> None:
    program = stage.node("fetch-model", "--bootstrap", network, "--listen", LOOPBACK, home="early")
    assert program.wait() == 4, program.tail()
    assert program.events[-1] == {"event": "incomplete", "missing": ["expert-0", "expert-1", "router"]}
    assert "--allow-partial" in program.err.read_text()


def test_an_interrupted_node_checkpoints_releases_and_goes_on_where_it_was(stage: Any, network: str) -> None:
    arguments = ("join", "--listen", LOOPBACK, "--threads", 1, "--role", "expert-0")
    first = stage.node(*arguments, "--bootstrap", network, home="alice")
    assert first.wait_event("joined")["name"] == "small"
    assert first.wait_event("claimed")["term"] == 1
    first.wait_for(lambda event: event.get("event") == "step" and event["step"] >= 5)
    first.process.send_signal(signal.SIGINT)
    assert first.wait() == 130, first.tail()
    last = [event for event in first.events if event["event"] == "checkpoint"][-1]
    assert 5 <= last["step"] < STEPS
    assert first.events[-1]["event"] == "left"

    second = stage.node(*arguments, home="alice")  # the home remembers network and run
    resumed = second.wait_event("resumed")
    assert (resumed["role"], resumed["term"], resumed["step"]) == ("expert-0", 2, last["step"])
    second.wait_event("finished")
    second.process.send_signal(signal.SIGINT)
    assert second.wait() == 130, second.tail()


def _wait_until_checked(stage: Any, network: str, name: str) -> None:
    """Until the organiser has checked the last step of role `name`: till then an older checked one counts."""
    status = stage.node("status", "--bootstrap", network, "--listen", LOOPBACK, home="onlooker")
    done = (name, "finished", True)
    status.wait_for(lambda e: done in [(role["role"], role["state"], role["checked"]) for role in e["roles"]])
    status.process.send_signal(signal.SIGINT)
    assert status.wait() == 130, status.tail()


def test_what_there_is_of_a_model_can_be_fetched_and_used(stage: Any, network: str) -> None:
    _wait_until_checked(stage, network, "expert-0")
    program = stage.node(
        "fetch-model", "--bootstrap", network, "--listen", LOOPBACK, "--allow-partial", home="early"
    )
    assert program.wait() == 0, program.tail()
    model = program.events[-1]
    assert model["event"] == "model" and model["missing"] == ["expert-1", "router"]
    assert model["roles"]["expert-0"]["step"] == STEPS
    drawn = stage.here("generate", "a bright picture", "--out", stage.folder / "partial", home="early")
    assert drawn.wait() == 0, drawn.tail()
    assert list(drawn.events[-1]["experts"]) == ["expert_0"]


def test_with_until_complete_a_node_ends_when_every_role_is_finished(stage: Any, network: str) -> None:
    program = stage.node(
        "join", "--bootstrap", network, "--listen", LOOPBACK, "--threads", 1, "--until-complete", home="bob"
    )
    assert program.wait() == 0, program.tail()
    finished = {event["role"] for event in program.events if event["event"] == "finished"}
    assert finished == {"expert-1", "router"}
    steps = [event for event in program.events if event["event"] == "step"]
    assert steps and {"role", "step", "loss", "images_per_s"} <= steps[0].keys()


def test_status_knows_the_run_without_flags(stage: Any, network: str) -> None:
    program = stage.node("status", "--once", "--listen", LOOPBACK, home="bob")
    assert program.wait() == 0, program.tail()
    (state,) = program.events
    assert len(state["run_id"]) == 64 and state["peers"] >= 1
    wanted = {"role", "state", "holder", "term", "step", "total_steps", "age_s", "content_id", "providers"}
    for role in state["roles"]:
        assert wanted <= role.keys()
        assert (role["state"], role["step"]) == ("finished", STEPS)
        assert role["providers"] >= 1 and len(role["content_id"]) == 64


def test_the_whole_model_is_fetched_and_draws_the_same_image_for_the_same_seed(
    stage: Any, network: str
) -> None:
    program = stage.node("fetch-model", "--listen", LOOPBACK, "--out", stage.folder / "model", home="bob")
    assert program.wait() == 0, program.tail()
    model = program.events[-1]
    assert model["missing"] == [] and Path(model["path"]) == stage.folder / "model"
    images = []
    for out in ("one", "two"):
        options = ("--seed", 7, "--steps", 4, "--top-k", 1, "--out", stage.folder / out)
        drawn = stage.here("generate", "a dark picture", *options, home="bob")
        assert drawn.wait() == 0, drawn.tail()
        with Image.open(drawn.events[-1]["paths"][0]) as image:
            assert (image.info["prompt"], image.info["seed"], image.info["top_k"]) == (
                "a dark picture",
                "7",
                "1",
            )
            images.append(image.tobytes())
    assert images[0] == images[1]


def test_content_ids_are_printed_as_json(stage: Any) -> None:
    file = stage.folder / "content.bin"
    file.write_bytes(bytes(range(256)) * 200)
    program = stage.node("content-id", file, "--piece-length", 16384, home="a")
    assert program.wait() == 0, program.tail()
    (content,) = program.events
    assert len(content["info_hash"]) == 64 and content["piece_length"] == 16384
    assert content["files"] == [
        {"path": "content.bin", "length": 51200, "pieces_root": content["files"][0]["pieces_root"]}
    ]
