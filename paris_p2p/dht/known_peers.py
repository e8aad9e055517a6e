"""The DHT nodes that answered here before: the way back in when no bootstrap node does.

Owns: which peers are remembered, for how long, which are tried, and their file. Does not own: greeting
them (`membership`). Time and chance are arguments; only `load` and `save` touch the disk.

Newcomers take free places, or those of peers that failed or have not answered for a day: whoever floods us
with fresh peers cannot push out the ones that are known to be good.
"""

import json
import math
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from paris_p2p.dht.addresses import check_bootstrap, peer_id
from paris_p2p.errors import ConfigError
from paris_p2p.store.durable import disk, write_atomic

MAX_PEERS = 64
MAX_AGE_S = 14 * 86_400.0
MAX_FAILURES = 3
"""In a row: then a peer is forgotten."""
RESTED_S = 86_400.0
MAX_ADDRESSES_PER_PEER = 3
MAX_FILE_BYTES = 256 * 1024
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class KnownPeer:
    """`addresses`: bootstrap addresses, all of one peer; `seen_unix`: when it last answered; `failures`
    since then."""

    addresses: tuple[str, ...]
    seen_unix: float
    failures: int = 0


class KnownPeers:
    """The remembered peers by peer id, learned in the network that `bootstrap` peer ids lead to."""

    def __init__(self, bootstrap: Iterable[str] = ()) -> None:
        self.bootstrap = frozenset(bootstrap)
        self._peers: dict[str, KnownPeer] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def answered(self, addresses: Sequence[str], now_unix: float) -> None:
        """A peer answered and says that it listens at `addresses`, which may be a lie: at worst they are
        tried a few times in vain."""
        good = _addresses_of_one(addresses)
        if not good:
            return
        name = peer_id(good[0])
        if name in self._peers or self._make_place(now_unix):
            self._peers[name] = KnownPeer(good, now_unix)

    def failed(self, name: str) -> None:
        """The peer with id `name` did not answer."""
        peer = self._peers.get(name)
        if peer is not None and peer.failures + 1 >= MAX_FAILURES:
            del self._peers[name]
        elif peer is not None:
            self._peers[name] = replace(peer, failures=peer.failures + 1)

    def candidates(self, now_unix: float, limit: int, rng: random.Random) -> list[str]:
        """At most `limit` addresses to try, of peers that are not too old: those that did not fail first, in
        random order, so that a thousand nodes coming back do not all knock at the same door."""
        self._forget_old(now_unix)
        names = list(self._peers)
        rng.shuffle(names)
        names.sort(key=lambda name: self._peers[name].failures)
        return [address for name in names for address in self._peers[name].addresses[:1]][:limit]

    def _make_place(self, now_unix: float) -> bool:
        self._forget_old(now_unix)
        if len(self._peers) < MAX_PEERS:
            return True
        worst = max(self._peers, key=lambda name: (self._peers[name].failures, -self._peers[name].seen_unix))
        replaceable = self._peers[worst].failures > 0 or self._peers[worst].seen_unix < now_unix - RESTED_S
        if replaceable:
            del self._peers[worst]
        return replaceable

    def _forget_old(self, now_unix: float) -> None:
        """A peer seen in the future (a clock was set back) counts as seen now: it ages from here."""
        self._peers = {
            name: replace(peer, seen_unix=min(peer.seen_unix, now_unix))
            for name, peer in self._peers.items()
            if peer.seen_unix >= now_unix - MAX_AGE_S
        }

    def to_json(self) -> str:
        """As it is kept on disk."""
        peers = [
            {"addresses": list(peer.addresses), "seen_unix": peer.seen_unix, "failures": peer.failures}
            for peer in self._peers.values()
        ]
        return json.dumps({"format": _FORMAT, "bootstrap": sorted(self.bootstrap), "peers": peers}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "KnownPeers":
        """What `to_json` wrote. Raises `ValueError` when it is something else."""
        plain = json.loads(text)
        if not isinstance(plain, dict) or plain.get("format") != _FORMAT:
            raise ValueError("not a list of known peers")
        if not isinstance(plain.get("bootstrap"), list) or not isinstance(plain.get("peers"), list):
            raise ValueError("a list is missing")
        known = cls(str(name) for name in plain["bootstrap"])
        for row in plain["peers"][:MAX_PEERS]:
            peer = _peer(row)
            known._peers[peer_id(peer.addresses[0])] = peer
        return known


def load(path: Path, bootstrap: Collection[str]) -> KnownPeers:
    """The peers kept in `path`, if they belong to the network of the `bootstrap` addresses; else none.

    A home that moves to another network must not join the two, and a damaged file costs nothing but the
    memory of it. Raises `StoreError` when the file cannot be read.
    """
    wanted = frozenset(map(peer_id, bootstrap))
    with disk("reading the known peers", path.parent):
        if not path.exists():
            return KnownPeers(wanted)
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    try:
        known = KnownPeers.from_json(data.decode()) if len(data) <= MAX_FILE_BYTES else KnownPeers()
    except (ValueError, RecursionError):
        return KnownPeers(wanted)
    same = bool(known.bootstrap & wanted) or known.bootstrap == wanted
    if not same:
        return KnownPeers(wanted)
    known.bootstrap = wanted
    return known


def save(path: Path, known: KnownPeers) -> None:
    """Keep `known` in `path`. Raises `StoreError`."""
    data = known.to_json().encode()
    with disk("keeping the known peers", path.parent, len(data)):
        write_atomic(path, data, sync=False)


def _peer(row: object) -> KnownPeer:
    if not isinstance(row, dict):
        raise ValueError("a peer is not an object")
    addresses, seen, failures = row.get("addresses"), row.get("seen_unix"), row.get("failures")
    if not isinstance(addresses, list) or not all(isinstance(address, str) for address in addresses):
        raise ValueError("addresses are not texts")
    good = _addresses_of_one(addresses)
    if not good or not isinstance(seen, float | int) or not math.isfinite(seen):
        raise ValueError("a peer without an address or a time")
    if not isinstance(failures, int) or failures < 0:
        raise ValueError("failures are not a count")
    return KnownPeer(good, float(seen), failures)


def _addresses_of_one(addresses: Sequence[str]) -> tuple[str, ...]:
    """The well-formed ones among the first few of `addresses`, as far as they name the same peer; those
    that only this machine can dial last."""
    good: list[str] = []
    for address in addresses[:MAX_ADDRESSES_PER_PEER]:
        try:
            check_bootstrap(address)
        except ConfigError:
            continue
        if not good or peer_id(address) == peer_id(good[0]):
            good.append(address)
    return tuple(sorted(good, key=is_loopback))


def is_loopback(address: str) -> bool:
    """Whether only this machine can dial `address`."""
    return address.startswith(("/ip4/127.", "/ip6/::1/"))
