"""What the benchmarks with whole nodes share.

Owns: telling a node's processes apart, a folder for everything they write, a published run of the digits with
other times. Does not own: starting programs (`paris_node.actor`).
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from paris_node.actor import Actor, Cast
from paris_p2p.store.home import Home
from paris_p2p.wire.manifest import Manifest, check_manifest, sign_manifest

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
MODULES = {
    "paris_p2p.dht.worker": "dht",
    "paris_p2p.diffusion.train_worker": "trainer",
    "paris_p2p.diffusion.check_worker": "checker",
}
"""A node's children by the module they run."""


def kind_of(process: psutil.Process) -> str:
    """Which of a node's processes it is; empty when it is gone."""
    try:
        words = process.cmdline()
        if process.status() == psutil.STATUS_ZOMBIE or not words:
            return ""
    except psutil.Error:
        return ""
    if Path(words[0]).name == "p2pd":
        return "p2pd"
    return next((MODULES[word] for word in words if word in MODULES), "node")


@contextmanager
def working_folder(prefix: str, keep: Path | None) -> Iterator[Path]:
    """`keep`, a new folder, or a temporary one; the programs' temporary files go into it, too."""
    with tempfile.TemporaryDirectory(prefix=prefix) as made:
        folder = (keep or Path(made)).resolve()
        (folder / "tmp").mkdir(parents=True)
        os.environ["TMPDIR"] = str(folder / "tmp")
        tempfile.tempdir = None
        yield folder


@dataclass(frozen=True, slots=True)
class Published:
    """A run that volunteers can join at `bootstrap`."""

    boot: Actor
    publisher: Actor
    bootstrap: str


async def publish_digits(
    cast: Cast,
    folder: Path,
    name: str,
    *,
    clusters: int,
    steps: int,
    change: Callable[[Manifest], Manifest],
) -> Published:
    """The digits as a run called `name`, its manifest changed, with a bootstrap node and a publisher; homes
    are those of `home_of`."""
    out, organiser = folder / "run", home_of(folder, "organiser")
    prepare = ["prepare", "digits", "--out", str(out), "--name", name, "--json", "--home", str(organiser)]
    prepare += ["--clusters", str(clusters), "--steps", str(steps), "--short-lease"]
    await cast.start("prepare", prepare).last_event("prepared")
    change_manifest(out / "manifest.paris", organiser, change)
    listen = ["--listen", LOOPBACK, "--json", "--home"]
    boot = cast.start("boot", [*listen, str(home_of(folder, "boot"))], program="paris_bootstrap")
    address = str((await boot.event("listening"))["addresses"][0])
    publish = ["publish", str(out), "--bootstrap", address, *listen, str(organiser)]
    publisher = cast.start("publisher", publish)
    await publisher.event("published")
    return Published(boot, publisher, address)


def home_of(folder: Path, node: str) -> Path:
    """The home folder of a node."""
    return folder / "homes" / node


def change_manifest(path: Path, organiser: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Sign the manifest at `path` again, changed, with the key of the home `organiser`: its times are the
    organiser's to choose, though no option of `prepare` is."""
    changed = change(check_manifest(path.read_bytes()).manifest)
    path.write_bytes(sign_manifest(changed, Home.resolve(organiser).identity()).data)
