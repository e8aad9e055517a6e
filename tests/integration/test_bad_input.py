"""What people get wrong, and what strangers send: each with a clear message and the right exit code."""

import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWQnByPadJ5abWho32XSazmCaVAGxmcANRuX78E6dJERNq"


def draw_images(folder: Path, count: int, captions: bool = True) -> Path:
    """`count` little pictures, half of them dark and half bright, with sidecar captions."""
    folder.mkdir(parents=True)
    for number in range(count):
        bright = number % 2
        shade = 200 + number % 50 if bright else 10 + number % 50
        image = Image.new("L", (8, 8), shade)
        image.putpixel((number % 8, number // 8 % 8), 255 - shade)
        image.save(folder / f"{number:03d}.png")
        if captions:
            (folder / f"{number:03d}.txt").write_text("a bright picture" if bright else "a dark picture")
    return folder


@pytest.fixture(scope="module")
def prepared(stage: Any) -> Path:
    """A small run of two clusters."""
    source, out = draw_images(stage.folder / "pictures", 40), Path(stage.folder / "run")
    program = stage.here("prepare", source, "--out", out, "--clusters", 2, "--steps", 8, home="organiser")
    assert program.wait() == 0, program.tail()
    return out


@pytest.fixture(scope="module")
def network(stage: Any) -> str:
    """A bootstrap node's address."""
    return str(stage.bootstrap()[1])


@pytest.fixture(scope="module", autouse=True)
def seeker(stage: Any, network: str) -> Any:
    """A node that looks for a run where there is none: it takes its time, so the other tests go on."""
    return stage.node(
        "join", "--bootstrap", network, "--listen", LOOPBACK, "--run", "no-such-run", home="seeker"
    )


def refused(program: Any, code: int, *words: str) -> None:
    """The program ended with `code` and one message that has all `words`, without a traceback."""
    assert program.wait() == code, program.tail()
    said = program.err.read_text()
    assert "Traceback" not in said
    assert not [word for word in words if word not in said], said


def test_a_malformed_bootstrap_address_is_named_with_an_example(stage: Any) -> None:
    program = stage.node("join", "--bootstrap", "my-server:31337", home="a")
    refused(program, 2, "my-server:31337", "/ip4/", "/p2p/")


def test_no_bootstrap_address_at_all_says_how_to_give_one(stage: Any) -> None:
    refused(stage.node("status", "--once", home="nobody"), 2, "--bootstrap")


def test_an_unreachable_bootstrap_node_is_a_network_error(stage: Any) -> None:
    program = stage.node("join", "--bootstrap", NOBODY, "--listen", LOOPBACK, home="a")
    refused(program, 3, "127.0.0.1/tcp/1")


def test_a_bootstrap_node_of_another_version_is_named(stage: Any) -> None:
    script = stage.folder / "sitecustomize" / "sitecustomize.py"
    script.parent.mkdir()
    script.write_text(
        textwrap.dedent("""\
            from paris_p2p.wire import records
            records.PROTOCOL_VERSION = 999
            """)
    )
    _, address = stage.bootstrap(home="other-version", env={"PYTHONPATH": str(script.parent)})
    program = stage.node("join", "--bootstrap", address, "--listen", LOOPBACK, home="a")
    refused(program, 3, "version", "999")


def test_a_clock_ten_seconds_off_is_said_with_its_direction(stage: Any, network: str) -> None:
    program = stage.node(
        "join", "--bootstrap", network, "--listen", LOOPBACK, home="a", env={"PARIS_CLOCK_OFFSET_S": "-10"}
    )
    refused(program, 3, "clock", "behind")


def test_a_folder_without_images_is_refused(stage: Any) -> None:
    empty = stage.folder / "empty"
    empty.mkdir()
    program = stage.node("prepare", empty, "--out", stage.folder / "out-empty", home="a")
    refused(program, 2, str(empty))


def test_missing_captions_are_refused_with_the_convention(stage: Any) -> None:
    source = draw_images(stage.folder / "no-captions", 12, captions=False)
    program = stage.here("prepare", source, "--out", stage.folder / "out-captions", home="a")
    refused(program, 2, "metadata.jsonl", ".txt")


def test_more_clusters_than_images_are_refused(stage: Any) -> None:
    source = draw_images(stage.folder / "three", 3)
    program = stage.here("prepare", source, "--clusters", 8, "--out", stage.folder / "out-clusters", home="a")
    refused(program, 2, "3", "8")


def test_a_manifest_with_one_bit_changed_is_refused(stage: Any, prepared: Path, network: str) -> None:
    changed = stage.folder / "changed"
    shutil.copytree(prepared, changed)
    path = changed / "manifest.paris"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    program = stage.node("publish", changed, "--bootstrap", network, "--listen", LOOPBACK, home="b")
    refused(program, 2, "manifest")


def test_a_damaged_item_is_found_before_it_is_published(stage: Any, prepared: Path, network: str) -> None:
    damaged = stage.folder / "damaged"
    shutil.copytree(prepared, damaged)
    shard = max((damaged / "store").rglob("shard.safetensors"), key=lambda path: path.stat().st_size)
    flip_last_byte(shard)
    program = stage.node("publish", damaged, "--bootstrap", network, "--listen", LOOPBACK, home="c")
    refused(program, 2, "damaged")


def test_a_network_without_a_run_is_said(seeker: Any) -> None:
    refused(seeker, 3, "no-such-run")


def test_a_shard_changed_at_a_seeder_is_refused_and_had_from_another(
    stage: Any, prepared: Path, network: str
) -> None:
    copy = stage.folder / "copy"
    shutil.copytree(prepared, copy)
    liar = stage.node("publish", copy, "--bootstrap", network, "--listen", LOOPBACK, home="liar")
    liar.wait_event("published")
    for shard in (stage.home("liar") / "store").rglob("shard.safetensors"):
        flip_last_byte(shard)
    node = stage.node(
        "join", "--bootstrap", network, "--listen", LOOPBACK, "--role", "expert-0", home="victim"
    )
    wait_for_text(node, "is banned")
    good = stage.node("publish", prepared, "--bootstrap", network, "--listen", LOOPBACK, home="honest")
    good.wait_event("published")
    good_shards = {path.read_bytes() for path in (prepared / "store").rglob("shard.safetensors")}

    def has_good_shards() -> bool:
        had = [path.read_bytes() for path in (stage.home("victim") / "store").rglob("shard.safetensors")]
        return len(had) >= 2 and all(data in good_shards for data in had)

    wait_until(node, has_good_shards)  # the one to train on, and the one held out
    node.process.kill()  # what it would train of them is no matter here


def wait_for_text(program: Any, text: str) -> None:
    """Until the program's log says `text`."""
    wait_until(program, lambda: text in program.err.read_text())


def wait_until(program: Any, condition: Callable[[], bool]) -> None:
    """Until `condition` holds; the program must not end before."""
    until = time.monotonic() + 600  # noqa: TID251 - a test's own deadline
    while not condition():
        assert program.process.poll() is None, program.tail()
        assert time.monotonic() < until, program.tail()  # noqa: TID251 - a test's own deadline
        time.sleep(0.05)


def flip_last_byte(path: Path) -> None:
    """Change one byte in place, as a bad disk or a liar would."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def test_an_identity_others_can_read_is_refused(stage: Any, network: str) -> None:
    home = stage.home("loose")
    home.mkdir(parents=True)
    (home / "identity.key").write_bytes(bytes(range(32)))
    (home / "identity.key").chmod(0o644)
    program = stage.node("join", "--bootstrap", network, "--listen", LOOPBACK, home="loose")
    refused(program, 2, "chmod 600", "identity.key")


def test_an_identity_in_use_is_refused(stage: Any, prepared: Path, network: str) -> None:
    first = stage.node("publish", prepared, "--bootstrap", network, "--listen", LOOPBACK, home="twice")
    first.wait_event("published")
    program = stage.node("join", "--bootstrap", network, "--listen", LOOPBACK, home="twice")
    refused(program, 2, "in use", str(first.process.pid))


@pytest.fixture
def small_disk(stage: Any) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = stage.folder / "small-disk"
    folder.mkdir(exist_ok=True)
    mounted = sys.platform == "linux" and os.geteuid() == 0
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if not mounted or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_before_anything_is_fetched(
    stage: Any, prepared: Path, network: str, small_disk: Path
) -> None:
    publisher = stage.node("publish", prepared, "--bootstrap", network, "--listen", LOOPBACK, home="full")
    publisher.wait_event("published")
    program = stage.start(
        "paris_node",
        "join",
        "--json",
        "--home",
        small_disk / "home",
        "--bootstrap",
        network,
        "--listen",
        LOOPBACK,
    )
    refused(program, 2, "free", str(small_disk))


def test_preparing_on_a_full_disk_says_how_much_is_missing(stage: Any, small_disk: Path) -> None:
    program = stage.here("prepare", "digits", "--out", small_disk / "run", home="a")
    refused(program, 2, "disk full", str(small_disk))
