"""Nodes that make the real swarm decisions, and links to make them on, in virtual time.

Modelled: every node has one uplink and one downlink. The uplink sends one block after the other, taking its
peers in turn, and never more than `BACKLOG_S` ahead of a receiver's downlink, as flow control does; control
messages overtake queued blocks and arrive after the latency. Each byte costs `OVERHEAD` on the link (TCP,
IP, Ethernet, TLS), so that efficiencies are against nominal link rates. Sessions, chokes, interest, haves,
rejects and cancels travel as in `core.session`; hashing takes `VERIFY_S`. Not modelled: loss, CPU time,
start-up, dialling.

Owns: nodes, links, the clock. Does not own: any decision (`paris_p2p.core`), scenarios (`swarm_sim`).
"""

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from paris_p2p.core.ban import BanList
from paris_p2p.core.choker import Candidate, Choker
from paris_p2p.core.pipeline import Key
from paris_p2p.core.scheduler import Scheduler
from paris_p2p.core.superseed import SuperSeed
from paris_p2p.ids import PieceIndex

MBIT = 125_000.0  # bytes per second
OVERHEAD = 1.045
BACKLOG_S = 0.08
VERIFY_S = 0.005
TICK_S = 0.5
MAX_REQUESTS = 128
LATE_S = 15.0  # how long a late peer takes to answer
LIMIT_S = 3600.0

Behaviour = Literal["honest", "corrupt", "late", "mute"]
_RIGHT: dict[int, bytes] = {}
_WRONG: dict[int, bytes] = {}


def block_data(length: int, right: bool) -> bytes:
    """The bytes of any block: zeros, or ones where a liar sent them; shared, so that they cost nothing."""
    known = _RIGHT if right else _WRONG
    if length not in known:
        known[length] = bytes(length) if right else b"\x01" * length
    return known[length]


@dataclass(frozen=True)
class Peer:
    """One simulated node. `up`, `down`: Mbit/s; `has`: share of the pieces it starts with."""

    up: float = 50.0
    down: float = 50.0
    joins: float = 0.0
    has: float = 0.0
    behaviour: Behaviour = "honest"


@dataclass(frozen=True)
class Scenario:
    """`degree`: how many others a node dials; `seeder_leaves`: the seeders vanish when the leechers together
    hold every piece; `kill`: (leecher, share of the item it then has, seconds until it is back)."""

    peers: tuple[Peer, ...]
    pieces: int
    piece_bytes: int = 256 * 1024
    block_bytes: int = 64 * 1024
    latency: float = 0.01
    degree: int = 40
    seeder_leaves: bool = False
    kill: tuple[int, float, float] | None = None

    @property
    def length(self) -> int:
        return self.pieces * self.piece_bytes


@dataclass
class Link:
    """One node's view of its session with another."""

    am_choking: bool = True
    peer_choking: bool = True
    peer_interested: bool = False
    am_interested: bool = False
    since: float = 0.0
    joined: float = 0.0
    uploads: deque[Key] = field(default_factory=deque)
    asked: set[Key] = field(default_factory=set)  # unanswered, given up or not
    rejections: int = 0


class Node:
    """One node: the decisions are the real ones, the links are `World`'s."""

    def __init__(self, world: "World", number: int, spec: Peer) -> None:
        self.world, self.number, self.spec = world, number, spec
        self.up, self.down = spec.up * MBIT, spec.down * MBIT
        self.links: dict[int, Link] = {}
        self.turn: deque[int] = deque()  # peers with blocks to send, in turn
        self.sending = False
        self.down_free = 0.0
        self.alive = False
        self.rng = random.Random(f"{world.seed} {number}")
        self.have: set[PieceIndex] = set()
        if spec.has:
            every = [PieceIndex(p) for p in range(world.scenario.pieces)]
            self.have = set(self.rng.sample(every, round(spec.has * len(every))))
        self.scheduler: Scheduler[int] | None = None
        self.seeding: SuperSeed[int] | None = None
        self.choker: Choker[int] = Choker()
        self.bans: BanList[int] = BanList()
        self.banned: set[int] = set()
        self.finished: float | None = None
        self.ticks = 0
        self.received = self.sent = self.wasted = 0
        self.bad_from: Counter[int] = Counter()

    @property
    def honest(self) -> bool:
        return self.spec.behaviour == "honest"

    def start(self) -> None:
        scenario = self.world.scenario
        self.alive = True
        if len(self.have) == scenario.pieces or not self.honest:
            self.have = {PieceIndex(p) for p in range(scenario.pieces)}
            active = self.honest and self.finished is None
            self.seeding = SuperSeed(scenario.pieces, scenario.piece_bytes, self.rng, active=active)
        else:
            self.scheduler = Scheduler(scenario.pieces, lambda _: scenario.piece_bytes, self.have, self.rng)

    # -- sessions --------------------------------------------------------------------------------

    def opened(self, peer: int, now: float) -> None:
        self.links[peer] = Link(since=now, joined=now)
        if self.scheduler is not None:
            self.scheduler.add_peer(peer, self.world.scenario.block_bytes, now)
        shown = self.have
        if self.seeding is not None and self.seeding.opened(peer, now):
            shown = set()
        self.say(peer, Node.on_bitfield, set(shown))

    def closed(self, peer: int, *, distrust: bool = False) -> None:
        if self.links.pop(peer, None) is None:
            return
        if self.scheduler is not None:
            self.wasted += self.scheduler.remove_peer(peer, distrust=distrust)
            self.fill_all(self.world.now)
        if self.seeding is not None:
            self.seeding.closed(peer)

    def say(self, peer: int, what: Callable[..., None], *args: Any) -> None:
        """A control message."""
        self.world.after(self.world.scenario.latency, self.world.deliver, self.number, peer, what, args)

    # -- serving ---------------------------------------------------------------------------------

    def on_bitfield(self, peer: int, pieces: set[PieceIndex]) -> None:
        now = self.world.now
        if self.seeding is not None:
            self.seeding.has(peer, pieces, now)
            self.reveal(now)
        if self.scheduler is not None:
            self.scheduler.picker.set_peer(peer, pieces)
            self.fill(peer, now)

    def on_have(self, peer: int, piece: PieceIndex) -> None:
        now = self.world.now
        if self.seeding is not None:
            self.seeding.has(peer, (piece,), now)
            self.reveal(now)
        if self.scheduler is not None and self.scheduler.picker.peer_got(peer, piece):
            self.fill(peer, now)

    def reveal(self, now: float) -> None:
        if self.seeding is None or self.spec.behaviour != "honest":
            return
        serving = [peer for peer, link in self.links.items() if not link.am_choking]
        for peer, piece in self.seeding.reveals(serving, now):
            self.say(peer, Node.on_have, piece)

    def on_interest(self, peer: int, interested: bool) -> None:
        link = self.links[peer]
        link.peer_interested = interested
        if interested and link.am_choking:
            self.rechoke(self.world.now)

    def rechoke(self, now: float) -> None:
        candidates = []
        for peer, link in self.links.items():
            gives = self.scheduler.rate(peer, now) if self.scheduler is not None else None
            candidates.append(
                Candidate(peer, link.peer_interested, not link.am_choking, link.since, link.joined, gives)
            )
        chosen = self.choker.choose(candidates, now, self.rng)
        for peer, link in self.links.items():
            if link.am_choking == (peer in chosen):
                link.am_choking, link.since = peer not in chosen, now
                self.say(peer, Node.on_choke, link.am_choking)
                while link.am_choking and link.uploads:
                    self.say(peer, Node.on_reject, link.uploads.popleft())
        self.reveal(now)

    def on_request(self, peer: int, keys: list[Key]) -> None:
        link, now = self.links[peer], self.world.now
        if self.spec.behaviour == "mute":
            return
        if self.spec.behaviour == "late":
            self.world.after(LATE_S, self.late_answer, peer, keys)
            return
        for key in keys:
            stolen = self.seeding is not None and not self.seeding.requested(peer, key[0], now)
            if link.am_choking or stolen or key[0] not in self.have:
                self.say(peer, Node.on_reject, key)
            else:
                self.queue(peer, link, key)
        self.send_next()

    def late_answer(self, peer: int, keys: list[Key]) -> None:
        if peer in self.links:
            for key in keys:
                self.queue(peer, self.links[peer], key)
            self.send_next()

    def queue(self, peer: int, link: Link, key: Key) -> None:
        link.uploads.append(key)
        if peer not in self.turn:
            self.turn.append(peer)

    def on_cancel(self, peer: int, key: Key) -> None:
        link = self.links[peer]
        if key in link.uploads:
            link.uploads.remove(key)
            self.say(peer, Node.on_reject, key)

    def send_next(self) -> None:
        """Starts the next block: of the peer whose turn it is, and whose downlink has room."""
        if self.sending or not self.turn:
            return
        now, soonest = self.world.now, float("inf")
        for _ in range(len(self.turn)):
            peer = self.turn.popleft()
            link = self.links.get(peer)
            if link is None or not link.uploads:
                continue
            wait = self.world.nodes[peer].down_free - now - BACKLOG_S
            if wait > 0:
                soonest = min(soonest, wait)
                self.turn.append(peer)
                continue
            self._send(peer, link, now)
            return
        if self.turn:
            self.sending = True
            self.world.after(soonest + 1e-4, self.resume)

    def resume(self) -> None:
        self.sending = False
        self.send_next()

    def _send(self, peer: int, link: Link, now: float) -> None:
        key = link.uploads.popleft()
        if link.uploads:
            self.turn.append(peer)
        count = key[2] * OVERHEAD
        self.sending = True
        self.sent += key[2]
        receiver = self.world.nodes[peer]
        starts = max(receiver.down_free, now + self.world.scenario.latency)
        receiver.down_free = max(starts + count / receiver.down, now + count / self.up)
        arrives = receiver.down_free - now
        self.world.after(count / self.up, self.sent_block, peer, key)
        right = self.spec.behaviour != "corrupt"
        self.world.after(arrives, self.world.deliver, self.number, peer, Node.on_block, (key, right))

    def sent_block(self, peer: int, key: Key) -> None:
        if self.seeding is not None:
            self.seeding.sent(peer, key[0], key[2], self.world.now)
        self.resume()

    # -- fetching --------------------------------------------------------------------------------

    def on_choke(self, peer: int, choked: bool) -> None:
        self.links[peer].peer_choking = choked
        if not choked:
            self.fill(peer, self.world.now)

    def fill_all(self, now: float) -> None:
        if self.scheduler is not None:
            for peer in self.scheduler.ranked(now):
                if peer in self.links:
                    self.fill(peer, now)

    def fill(self, peer: int, now: float) -> None:
        if self.scheduler is None:
            return
        link = self.links[peer]
        interested = self.scheduler.picker.interesting(peer)
        if interested != link.am_interested:
            link.am_interested = interested
            self.say(peer, Node.on_interest, interested)
        if link.peer_choking or not interested:
            return
        room = MAX_REQUESTS - len(link.asked)
        keys = self.scheduler.requests(peer, room, now, allowed=lambda *key: key not in link.asked)
        if keys:
            link.asked.update(keys)
            self.say(peer, Node.on_request, keys)

    def on_reject(self, peer: int, key: Key) -> None:
        link = self.links[peer]
        link.asked.discard(key)
        if self.scheduler is not None:
            self.scheduler.rejected(peer, key, lacks=not link.peer_choking)
            self.fill(peer, self.world.now)

    def on_block(self, peer: int, key: Key, right: bool) -> None:
        now, link = self.world.now, self.links[peer]
        self.received += key[2]
        if self.scheduler is None:
            self.wasted += key[2]
            return
        link.asked.discard(key)
        arrived = self.scheduler.block(peer, key[0], key[1], block_data(key[2], right), now)
        self.wasted += arrived.wasted
        self.cancel(arrived.cancels)
        if arrived.piece is not None:
            good = all(block is block_data(len(block), True) for block in arrived.piece)
            self.world.after(VERIFY_S, self.verified, key[0], good)
        self.fill(peer, now)
        for other, _ in arrived.cancels:
            if other in self.links:
                self.fill(other, now)

    def cancel(self, cancels: Any) -> None:
        for other, key in cancels:
            if other in self.links:
                self.say(other, Node.on_cancel, key)

    def verified(self, piece: PieceIndex, good: bool) -> None:
        if self.scheduler is None or not self.alive:
            return
        if good:
            result = self.scheduler.good(piece)
            liars = result.liars
            self.have.add(piece)
            picker = self.scheduler.picker
            told = [peer for peer in self.links if not picker.peer_has(peer, piece)]
            self.world.after(self.world.scenario.latency, self.world.tell, self.number, told, piece)
            for peer in result.useless:
                self.fill(peer, self.world.now)
            if picker.complete:
                self.complete()
        else:
            self.wasted += self.world.scenario.piece_bytes
            liars = self.scheduler.bad(piece)
        for liar in liars:
            self.bad_from[liar] += 1
            self.ban(liar)
        if liars:
            self.fill_all(self.world.now)
        if good:
            self.world.held(piece)

    def ban(self, liar: int) -> None:
        self.bans.strike(liar, "a bad piece", self.world.now)
        self.banned.add(liar)
        if liar in self.links:
            self.closed(liar, distrust=True)
            self.world.nodes[liar].closed(self.number)

    def complete(self) -> None:
        self.finished = self.world.now
        scenario = self.world.scenario
        self.seeding = SuperSeed(scenario.pieces, scenario.piece_bytes, self.rng, active=False)
        assert self.scheduler is not None
        seeds = [peer for peer in self.links if self.scheduler.picker.peer_has_all(peer)]
        self.scheduler = None
        for peer in self.links:
            self.seeding.opened(peer, self.world.now)
        for peer in seeds:
            self.closed(peer)
            self.world.nodes[peer].closed(self.number)

    def tick(self, now: float) -> None:
        if not self.alive:
            return
        if self.scheduler is not None:
            self.cancel(self.scheduler.overdue(now))
            self.fill_all(now)
        if self.ticks % 2:
            self.rechoke(now)
        else:
            self.reveal(now)
        self.ticks += 1
        self.world.after(TICK_S, self.tick_now)

    def tick_now(self) -> None:
        self.tick(self.world.now)


class World:
    """All nodes, the clock, the events."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario, self.seed = scenario, seed
        self.now = 0.0
        self.rng = random.Random(seed)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = itertools.count()
        self.nodes = [Node(self, number, spec) for number, spec in enumerate(scenario.peers)]
        self.copies: set[PieceIndex] = set()
        self.left = False

    def after(self, delay: float, what: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._count), what, args))

    def deliver(self, source: int, peer: int, what: Callable[..., None], args: tuple[Any, ...]) -> None:
        node = self.nodes[peer]
        if source in node.links and peer in self.nodes[source].links:
            what(node, source, *args)

    def tell(self, source: int, peers: list[int], piece: PieceIndex) -> None:
        for peer in peers:
            node = self.nodes[peer]
            if source in node.links:
                node.on_have(source, piece)

    def held(self, piece: PieceIndex) -> None:
        self.copies.add(piece)
        kill = self.scenario.kill
        if kill is not None:
            node = self.nodes[kill[0]]
            if node.alive and node.finished is None and len(node.have) >= kill[1] * self.scenario.pieces:
                self.scenario = replace(self.scenario, kill=None)
                self.kill(node)
                self.after(kill[2], self.join, node)
        if self.scenario.seeder_leaves and not self.left and len(self.copies) == self.scenario.pieces:
            self.left = True
            for node in self.nodes:
                if node.spec.has == 1.0:
                    self.kill(node)

    def kill(self, node: Node) -> None:
        node.alive = False
        for peer in list(node.links):
            node.closed(peer)
            self.nodes[peer].closed(node.number)
        node.turn.clear()
        node.scheduler = None

    def join(self, node: Node) -> None:
        node.start()
        known = [other for other in self.nodes if other.alive and other is not node]
        self.rng.shuffle(known)
        for other in known[: self.scenario.degree]:
            both_complete = node.scheduler is None and other.scheduler is None
            if node.number not in other.links and not both_complete and node.number not in other.banned:
                for here, there in ((node, other), (other, node)):
                    here.opened(there.number, self.now)
        self.after(self.rng.random() * TICK_S, node.tick_now)

    def run(self) -> None:
        for node in self.nodes:
            # nobody starts at exactly the same moment
            self.after(node.spec.joins + 0.01 * self.rng.random(), self.join, node)
        while self._events and self.now < LIMIT_S:
            self.now, _, what, args = heapq.heappop(self._events)
            what(*args)
            if what.__name__ == "verified" and self.done():
                return

    def done(self) -> bool:
        return all(n.finished is not None or not n.honest or n.spec.has == 1.0 for n in self.nodes)
