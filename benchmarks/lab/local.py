"""`paris-node seed` and `paris-node get` on this machine, for benchmarks that need one pair.

Owns: their command lines. Does not own: a crowd in namespaces (`lab.clients`).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lab.children import Child, Children, wait_for
from benchmarks.lab.content import Content

READY_S = 120.0


def paris_node(
    command: str, *argv: str, home: Path, ip: str = "127.0.0.1", enter: Sequence[str] = ()
) -> list[str]:
    """A `paris-node` command line that listens on `ip` and speaks JSON."""
    listen = ("--listen", f"/ip4/{ip}/tcp/0/tls")
    return [
        *enter,
        sys.executable,
        "-m",
        "paris_node",
        command,
        *argv,
        *listen,
        "--home",
        str(home),
        "--json",
    ]


def start_seeder(
    kids: Children, content: Content, folder: Path, ip: str = "127.0.0.1", enter: Sequence[str] = ()
) -> tuple[Child, str, list[str]]:
    """A seeder that can be reached; its info-hash (hex) and addresses. Raises `RuntimeError`."""
    words = (str(content.path), "--piece-length", str(content.piece_length))
    child = kids.start(
        paris_node("seed", *words, home=folder / "seed-home", ip=ip, enter=enter), folder / "seed"
    )
    event = await_event(child, "seeding", READY_S)
    return child, str(event["info_hash"]), [str(address) for address in event["addresses"]]


def start_leecher(
    kids: Children,
    info_hash: str,
    peers: Sequence[str],
    folder: Path,
    ip: str = "127.0.0.1",
    enter: Sequence[str] = (),
) -> Child:
    """A leecher that writes to `folder`/out."""
    words = [word for peer in peers for word in ("--peer", peer)]
    out = ("--out", str(folder / "out"))
    argv = paris_node("get", info_hash, *words, *out, home=folder / "home", ip=ip, enter=enter)
    return kids.start(argv, folder / "get")


def await_event(child: Child, name: str, timeout_s: float) -> dict[str, Any]:
    """The event, once it is there. Raises `TimeoutError`, `RuntimeError` when the child ends without it."""

    def there() -> bool:
        ended = child.poll() is not None
        if child.last_event(name) is not None:
            return True
        if ended:
            raise RuntimeError(f"a child ended with {child.rc} before {name!r}: {child.errors()}")
        return False

    wait_for(there, timeout_s, f"the event {name!r}")
    event = child.last_event(name)
    assert event is not None
    return event
