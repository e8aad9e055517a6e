"""The programs that are compared: ours, libtorrent, aria2c, each as command lines and how to read them.

Owns: command lines, when a seeder is ready, when a leecher is done. Does not own: running them.
"""

import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.lab.children import Child, Children, wait_for
from benchmarks.lab.content import Content, make_torrent
from benchmarks.lab.namespaces import Star

PORT = 4001
TRACKER_PORT = 6969
PYTHON = sys.executable


@dataclass(frozen=True, slots=True)
class Node:
    """One place in the star. `folder` outlives a kill and a restart."""

    index: int
    address: str
    enter: tuple[str, ...]
    folder: Path


@dataclass(slots=True)
class Running:
    """A client that was started on a node, at `began` (monotonic seconds)."""

    node: Node
    child: Child
    began: float
    listening_at: float | None = None
    finished_at: float | None = None


class Client(ABC):
    """How to run one program."""

    name: str

    def __init__(self, content: Content, folder: Path) -> None:
        self.content = content
        self.folder = folder

    @abstractmethod
    def prepare(self, star: Star, kids: Children) -> None:
        """Before the seeder starts."""

    @abstractmethod
    def seed(self, node: Node) -> list[str]:
        """The command that seeds the content."""

    @abstractmethod
    def get(self, node: Node, sources: Sequence[Running], others: Sequence[Node]) -> list[str]:
        """The command that fetches it. `sources`: those to know from the start; `others`: all leechers."""

    def ready(self, running: Running) -> bool:
        """Whether a seeder can be reached."""
        return running.child.last_event("seeding") is not None

    def listening(self, running: Running) -> bool:
        """Whether a leecher is up; only ours says so."""
        return running.child.last_event("listening") is not None

    def finished(self, running: Running) -> bool:
        """Whether a leecher has everything, verified."""
        return running.child.last_event("fetched") is not None

    def wasted_bytes(self, running: Running) -> int | None:
        """Payload that a leecher received and had no use for; None when it does not say."""
        event = running.child.last_event("fetched")
        return None if event is None else int(event["wasted_bytes"])

    def output(self, running: Running) -> Path:
        """The fetched file."""
        return running.node.folder / "out" / self.content.path.name

    @staticmethod
    def unavailable() -> str | None:
        """Why it cannot run here; None if it can."""
        return None


class Ours(Client):
    """`paris-node seed` and `paris-node get`; peers of peers by peer exchange, as users have it."""

    name = "ours"
    transports: tuple[str, ...] = ("/ip4/{ip}/tcp/4001/tls",)

    def listen(self, node: Node) -> list[str]:
        """The multiaddrs that a node listens on."""
        return [pattern.format(ip=node.address) for pattern in self.transports]

    def _paris_node(self, node: Node, *argv: str) -> list[str]:
        listen = [word for address in self.listen(node) for word in ("--listen", address)]
        home = ["--home", str(node.folder / "home")]
        return [*node.enter, PYTHON, "-m", "paris_node", *argv, *listen, *home, "--json"]

    def seed(self, node: Node) -> list[str]:
        piece_length = str(self.content.piece_length)
        return self._paris_node(node, "seed", str(self.content.path), "--piece-length", piece_length)

    def prepare(self, star: Star, kids: Children) -> None:
        make_torrent(self.content, self.folder / "ours.torrent", version=2)
        packages = [_package_folder(name) for name in ("paris_p2p", "paris_node")]
        kids.start([PYTHON, "-m", "compileall", "-qq", *packages], self.folder / "compile").wait(120)

    def get(self, node: Node, sources: Sequence[Running], others: Sequence[Node]) -> list[str]:
        peers = [x for source in sources for address in _addresses(source) for x in ("--peer", address)]
        out = str(node.folder / "out")
        torrent = str(self.folder / "ours.torrent")
        return self._paris_node(node, "get", torrent, *peers, "--out", out, "--keep-seeding")

    def output(self, running: Running) -> Path:
        event = running.child.last_event("fetched")
        path = Path(event["path"]) if event is not None else running.node.folder / "out"
        return path if path.is_file() else path / self.content.path.name


class OursUniversal(Ours):
    """Ours without the fast path: libp2p streams only."""

    name = "ours-libp2p"
    transports = ("/ip4/{ip}/tcp/4001",)


def _package_folder(name: str) -> str:
    spec = find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return spec.submodule_search_locations[0]


def _addresses(source: Running) -> list[str]:
    event = source.child.last_event("seeding")
    return [] if event is None else [str(address) for address in event["addresses"]]


class Libtorrent(Client):
    """libtorrent with its defaults, TCP, a v2 torrent; every leecher knows every other from the start."""

    name = "libtorrent"

    def prepare(self, star: Star, kids: Children) -> None:
        make_torrent(self.content, self.folder / "libtorrent.torrent", version=2)

    def _run(self, node: Node, role: str, folder: Path, peers: Sequence[str]) -> list[str]:
        torrent, listen = str(self.folder / "libtorrent.torrent"), f"{node.address}:{PORT}"
        module = "benchmarks.lab.libtorrent_client"
        return [*node.enter, PYTHON, "-m", module, role, torrent, str(folder), listen, *peers]

    def seed(self, node: Node) -> list[str]:
        return self._run(node, "seed", self.content.path.parent, ())

    def get(self, node: Node, sources: Sequence[Running], others: Sequence[Node]) -> list[str]:
        nodes = [*(source.node for source in sources), *(o for o in others if o is not node)]
        return self._run(node, "get", node.folder / "out", [f"{n.address}:{PORT}" for n in nodes])

    @staticmethod
    def unavailable() -> str | None:
        return None if find_spec("libtorrent") else "the libtorrent binding is not installed"


class Aria2(Client):
    """aria2c, a v1 torrent (it knows no other), peers from a local tracker."""

    name = "aria2"
    _OPTIONS = (
        "--no-conf=true --disable-ipv6=true --enable-dht=false --bt-enable-lpd=false --seed-ratio=0.0 "
        "--file-allocation=none --summary-interval=0 --console-log-level=warn --auto-save-interval=1 "
        "--follow-torrent=mem --bt-tracker-interval=3"
    )

    def prepare(self, star: Star, kids: Children) -> None:
        tracker = f"http://{star.switch_ip}:{TRACKER_PORT}/announce"
        make_torrent(self.content, self.folder / "aria2.torrent", version=1, tracker=tracker)
        argv = [PYTHON, "-m", "benchmarks.lab.tracker", star.switch_ip, str(TRACKER_PORT)]
        self._tracker = kids.start([*star.enter(None), *argv], self.folder / "tracker")
        wait_for(lambda: _listens(self._tracker, TRACKER_PORT), 30, "the tracker")

    def _run(self, node: Node, folder: Path, *more: str) -> list[str]:
        options = [*self._OPTIONS.split(), f"--interface={node.address}", f"--listen-port={PORT}", *more]
        return [*node.enter, "aria2c", *options, f"--dir={folder}", str(self.folder / "aria2.torrent")]

    def seed(self, node: Node) -> list[str]:
        return self._run(node, self.content.path.parent, "--bt-seed-unverified=true")

    def get(self, node: Node, sources: Sequence[Running], others: Sequence[Node]) -> list[str]:
        hook = node.folder / "complete.sh"  # aria2c's own way to say that a torrent is complete
        hook.write_text(f"#!/bin/sh\ntouch '{node.folder / 'complete'}'\n")
        hook.chmod(0o755)
        more = ("--continue=true", "--allow-overwrite=true", "--bt-max-peers=0")
        fast = "--bt-request-peer-speed-limit=900M"  # it would else ask the tracker for more and more
        return self._run(node, node.folder / "out", *more, fast, f"--on-bt-download-complete={hook}")

    def ready(self, running: Running) -> bool:
        peers = self._tracker.last_event("peers")
        return _listens(running.child, PORT) and peers is not None and peers["peers"] > 0

    def listening(self, running: Running) -> bool:
        return _listens(running.child, PORT)

    def finished(self, running: Running) -> bool:
        return (running.node.folder / "complete").exists()

    def wasted_bytes(self, running: Running) -> int | None:
        return None

    @staticmethod
    def unavailable() -> str | None:
        return None if shutil.which("aria2c") else "aria2c is not installed"


def _listens(child: Child, port: int) -> bool:
    """Whether a TCP socket in the child's namespace listens on `port` (state 0A in /proc/net/tcp)."""
    try:
        lines = Path(f"/proc/{child.pid}/net/tcp").read_text().splitlines()[1:]
    except OSError:
        return False
    fields = [line.split() for line in lines]
    return any(f[3] == "0A" and int(f[1].rsplit(":", 1)[1], 16) == port for f in fields)


CLIENTS: dict[str, type[Client]] = {c.name: c for c in (Ours, OursUniversal, Libtorrent, Aria2)}
