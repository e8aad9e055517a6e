"""An internet of network namespaces: public nodes on one bridge, and nodes each behind a router of its own.

Owns: making and removing them (needs root, iproute2, nftables). Does not own: what runs inside.

A router masquerades (one public address, as home routers do) and drops what nobody inside asked for.
`symmetric`: it gives every connection another public port, so that nobody can foretell it.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.lab.namespaces import cannot_run as cannot_make_namespaces
from benchmarks.lab.namespaces import remove_namespaces

SUBNET = "198.18.78"
RULES = """
add table ip home
add chain ip home post {{ type nat hook postrouting priority 100; }}
add chain ip home in {{ type filter hook input priority 0; policy drop; }}
add chain ip home through {{ type filter hook forward priority 0; policy drop; }}
add rule ip home post oifname "wan" masquerade {ports}
add rule ip home in iifname {{ "lo", "lan" }} accept
add rule ip home in ct state established,related accept
add rule ip home through iifname "lan" accept
add rule ip home through ct state established,related accept
"""


@dataclass(frozen=True, slots=True)
class Place:
    """A node: `address` as it knows it itself, `public` as others see it."""

    namespace: str
    address: str
    public: str

    @property
    def enter(self) -> list[str]:
        """What to put before a command so that it runs there."""
        return ["ip", "netns", "exec", self.namespace]


class Internet:
    """Use `internet()`. `kinds`: of each node, `public`, `nat` or `symmetric`."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self._tag = f"pn{os.getpid()}"
        self._kinds = kinds
        self._names = [f"{self._tag}_sw"]
        self.nodes: list[Place] = []

    def make(self) -> None:
        """Make all of it."""
        switch = self._names[0]
        self._add(switch)
        _run("ip", "-n", switch, "link", "add", "name", "br0", "type", "bridge", "stp_state", "0")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for index, kind in enumerate(self._kinds):
            self._place(index, kind)

    def _add(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "set", "lo", "up")

    def _place(self, index: int, kind: str) -> None:
        public, name = f"{SUBNET}.{index + 1}", f"{self._tag}_{index}"
        self._names.append(name)
        self._add(name)
        if kind == "public":
            self._plug(name, "eth0", f"p{index}", public)
            self.nodes.append(Place(name, public, public))
            return
        router, inner = f"{self._tag}_r{index}", f"192.168.{index + 1}"
        self._names.append(router)
        self._add(router)
        self._plug(router, "wan", f"p{index}", public)
        veth = ("link", "add", "name", "lan", "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "-n", router, *veth)
        for namespace, device, address in ((router, "lan", f"{inner}.1"), (name, "eth0", f"{inner}.2")):
            _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", device)
            _run("ip", "-n", namespace, "link", "set", device, "up")
        _run("ip", "-n", name, "route", "add", "default", "via", f"{inner}.1")
        _run("ip", "netns", "exec", router, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        ports = "random,fully-random" if kind == "symmetric" else ""
        rules = RULES.format(ports=ports)
        _run("ip", "netns", "exec", router, "nft", "-f", "-", given=rules)
        self.nodes.append(Place(name, f"{inner}.2", public))

    def _plug(self, name: str, device: str, port: str, address: str) -> None:
        switch = self._names[0]
        veth = ("link", "add", "name", port, "type", "veth", "peer", "name", device, "netns", name)
        _run("ip", "-n", switch, *veth)
        _run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
        _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
        _run("ip", "-n", name, "link", "set", device, "up")
        if device == "eth0":
            # elsewhere is not there, rather than "no route": as on the real internet
            _run("ip", "-n", name, "route", "add", "default", "via", f"{SUBNET}.254")

    def remove(self) -> None:
        """Remove what there is of it."""
        remove_namespaces(reversed(self._names))


def _run(*argv: str, given: str | None = None) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, timeout=10, input=given, text=True)


def cannot_run() -> str | None:
    """Why this cannot be made here; None if it can."""
    if shutil.which("nft") is None:
        return "nft not found: install nftables"
    return cannot_make_namespaces()


@contextmanager
def internet(kinds: Sequence[str]) -> Iterator[Internet]:
    """The namespaces, gone when the block ends, whatever ends it."""
    made = Internet(kinds)
    try:
        made.make()
        yield made
    finally:
        made.remove()
