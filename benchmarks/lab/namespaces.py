"""A star of network namespaces: one a node, all behind one bridge, every link shaped at both ends.

Owns: making and removing them (needs root, iproute2). Does not own: what runs inside.

The addresses are of 198.18.0.0/15 (RFC 2544, benchmarking): the ranges for home networks would make
libtorrent lift its upload limits.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

SUBNET = "198.18.77"
BURST_KB = 128
QUEUE_MS = 50


@dataclass(frozen=True, slots=True)
class Link:
    """A node's line in Mbit/s, Ethernet bytes counted; 0: as fast as the machine."""

    up: float
    down: float


class Star:
    """Use `star()`."""

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = links
        self._tag = f"pb{os.getpid()}"
        self.switch = f"{self._tag}_sw"
        self.nodes = [f"{self._tag}_{i}" for i in range(len(links))]

    def ip(self, node: int) -> str:
        """The address of a node."""
        return f"{SUBNET}.{node + 1}"

    @property
    def switch_ip(self) -> str:
        """An unshaped address that every node reaches."""
        return f"{SUBNET}.254"

    def enter(self, node: int | None) -> list[str]:
        """What to put before a command so that it runs in a node's namespace; None: at the bridge."""
        return ["ip", "netns", "exec", self.switch if node is None else self.nodes[node]]

    def counters(self) -> list[tuple[int, int]]:
        """(bytes sent, bytes received) of every node so far, as its bridge port saw them."""
        out = subprocess.run(
            ["ip", "-n", self.switch, "-s", "-j", "link"], check=True, capture_output=True, timeout=10
        ).stdout
        ports = {link["ifname"]: link["stats64"] for link in json.loads(out)}
        found = [ports[f"p{i}"] for i in range(len(self.nodes))]
        return [(port["rx"]["bytes"], port["tx"]["bytes"]) for port in found]

    def make(self) -> None:
        """Make all of it."""
        for name in (self.switch, *self.nodes):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", self.switch, "link", "add", "name", "br0", "type", "bridge", "stp_state", "0")
        _run("ip", "-n", self.switch, "addr", "add", f"{self.switch_ip}/24", "dev", "br0")
        _run("ip", "-n", self.switch, "link", "set", "br0", "up")
        for node in range(len(self.nodes)):
            self._connect(node)

    def _connect(self, node: int) -> None:
        name, port, link = self.nodes[node], f"p{node}", self.links[node]
        veth = ("link", "add", "name", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "-n", self.switch, *veth)
        _run("ip", "-n", self.switch, "link", "set", port, "master", "br0", "up")
        _run("ip", "-n", name, "addr", "add", f"{self.ip(node)}/24", "dev", "eth0")
        _run("ip", "-n", name, "link", "set", "eth0", "up")
        _shape(name, "eth0", link.up)  # what leaves the node
        _shape(self.switch, port, link.down)  # what leaves the bridge towards it

    def remove(self) -> None:
        """Remove what there is of it."""
        remove_namespaces((*self.nodes, self.switch))


def remove_namespaces(names: Iterable[str]) -> None:
    """Remove those of the network namespaces that there are, in that order."""
    there = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=10).stdout
    existing = {line.split()[0] for line in there.splitlines() if line}
    for name in names:
        if name in existing:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=10)


def _shape(namespace: str, device: str, mbit: float) -> None:
    if not mbit:
        return
    rate = ("rate", f"{mbit:g}mbit", "burst", f"{BURST_KB}kb", "latency", f"{QUEUE_MS}ms")
    _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *rate)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, timeout=10)


def cannot_run() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2"
    probe = f"pb{os.getpid()}_probe"
    try:
        _run("ip", "netns", "add", probe)
        _run("ip", "netns", "del", probe)
    except (subprocess.SubprocessError, OSError) as error:
        return f"this system refuses network namespaces ({error})"
    return None


@contextmanager
def star(links: Sequence[Link]) -> Iterator[Star]:
    """The namespaces, gone when the block ends, whatever ends it."""
    made = Star(links)
    try:
        made.make()
        yield made
    finally:
        made.remove()
