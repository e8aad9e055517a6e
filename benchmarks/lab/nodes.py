"""What the benchmarks with whole nodes share.

Owns: telling a node's processes apart, a folder for everything they write, a manifest with other times. Does
not own: starting programs (`paris_node.actor`).
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from paris_p2p.store.home import Home
from paris_p2p.wire.manifest import Manifest, check_manifest, sign_manifest

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


def change_manifest(path: Path, organiser: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Sign the manifest at `path` again, changed, with the key of the home `organiser`: its times are the
    organiser's to choose, though no option of `prepare` is."""
    changed = change(check_manifest(path.read_bytes()).manifest)
    path.write_bytes(sign_manifest(changed, Home.resolve(organiser).identity()).data)
