"""Getting into the network, staying in, noticing that it has come apart, and mending it.

Owns: racing the bootstrap nodes and the peers known from earlier, rejoin rounds, the search for parts of the
network that do not know each other, saying what is wrong. Does not own: requests (`worker`), which peers are
remembered (`known_peers`), p2pd. Imports hivemind: only the DHT worker uses this module.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paris_p2p import clock
from paris_p2p.dht.addresses import peer_id
from paris_p2p.dht.hardened import RecordNode
from paris_p2p.dht.hello import (
    HELLO_PROTOCOL,
    MAX_HELLO_BYTES,
    Judgement,
    clock_problem,
    explain_failure,
    foreign_clock_problem,
    judge_hello,
)
from paris_p2p.dht.parts import Comparison, Pair, Part, missing
from paris_p2p.dht.protocol import Notice, Trouble
from paris_p2p.errors import NetworkError

# isort: split
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, DispatchFailure
from hivemind.utils.multiaddr import Multiaddr

HELLO_DEADLINE_S = 10.0
HELLO_PAUSES_S = (0.2, 0.5, 1.0, 2.0)
HEAL_PERIOD_S = 15.0
"""A healed partition merges within one period; without pinging the bootstrap nodes it does not at all."""
_FIRST_HEAL_S = 1.0  # doubling from there: the others may be starting again just as we are
_HEAL_DEADLINE_S = 20.0
_KNOWN_AFTER_S = 1.5  # what bootstrap nodes get before peers known from earlier are tried too
_GRACE_S = (0.25, 1.0)  # least and most time that the others in the race get after the first sound one
_JOIN_SEARCH_S = 2.0
KNOWN_AT_ONCE = 8
_KNOWN_A_ROUND = 3
_GREETED_A_ROUND = 2
MAX_VANTAGES = 4
MAX_WATCHED_KEYS = 8
MAX_COMPLETED = 64
"""Records of one key that a part is given in one round: a flood is not to be carried on in our name."""
_CONNECTION_ERRORS = (ControlFailure, DispatchFailure, P2PDaemonError, OSError, asyncio.IncompleteReadError)

Send = Callable[[dict[str, Any]], None]


class Membership:
    """One node's place in the network. `known`: addresses of peers that answered in earlier times."""

    def __init__(
        self,
        p2p: P2P,
        node: RecordNode,
        *,
        bootstrap: Sequence[str],
        known: Sequence[str],
        send: Send,
        rng: random.Random,
    ) -> None:
        self._p2p, self._node, self._send, self._rng = p2p, node, send, rng
        own = p2p.peer_id.to_base58()
        self.bootstrap = [address for address in bootstrap if peer_id(address) != own]
        ours = {own, *map(peer_id, self.bootstrap)}
        self._known = [address for address in known if peer_id(address) not in ours]
        self._told: dict[tuple[Trouble, str], str] = {}
        self._skews: dict[str, float] = {}  # bootstrap address -> how far our clock is ahead, 0 if it is not
        self._greeted: set[str] = set()  # peer ids in the routing table whose addresses are remembered
        self._watched: dict[bytes, None] = {}  # keys whose records are compared, oldest first
        self._comparison = Comparison()
        self._behind: set[asyncio.Task[Any]] = set()

    # --- joining ---------------------------------------------------------------------------------

    async def join(self, *, must_join: bool) -> None:
        """Return as soon as one way in has proved sound (and others as fast had their chance).

        Raises `NetworkError` saying what is wrong with each when none is and we must join.
        """
        if not self.bootstrap and not self._known:
            return
        race = {asyncio.create_task(self._enter(address)): address for address in self.bootstrap}
        problems = await self._first_sound(race, 0.0 if not self.bootstrap else _KNOWN_AFTER_S)
        if self.bootstrap and all(problems.values()) and must_join:
            raise NetworkError("cannot join by bootstrap " + "; ".join(self._described(problems)))
        for address, problem in problems.items():
            self._complain(address, problem)
        if not all(problems.values()):
            search = asyncio.create_task(self._search())
            self._keep(search)
            await asyncio.wait([search], timeout=_JOIN_SEARCH_S)

    async def _first_sound(
        self, race: "dict[asyncio.Task[str | None], str]", known_after_s: float
    ) -> dict[str, str | None]:
        """Race the ways in; what is wrong with each decided one (None: sound). The rest goes on behind."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        problems: dict[str, str | None] = {}
        late = list(self._known)
        self._rng.shuffle(late)
        while race or late:
            if late and (not race or loop.time() >= started + known_after_s):
                more, late = late[:KNOWN_AT_ONCE], late[KNOWN_AT_ONCE:]
                race |= {asyncio.create_task(self._enter(address)): address for address in more}
            wait_s = max(0.0, started + known_after_s - loop.time()) if late else None
            done, _ = await asyncio.wait(race, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            problems |= {race.pop(task): task.result() for task in done}
            if not all(problems.values()):
                break
        if race:
            grace_s = min(max(loop.time() - started, _GRACE_S[0]), _GRACE_S[1])
            done, _ = await asyncio.wait(race, timeout=grace_s)
            problems |= {race.pop(task): task.result() for task in done}
        for task, address in race.items():
            self._keep(asyncio.create_task(self._report_late(task, address)))
        return problems

    async def _report_late(self, task: "asyncio.Task[str | None]", address: str) -> None:
        self._complain(address, await task)

    def _complain(self, address: str, problem: str | None) -> None:
        """Say what is wrong with one bootstrap node while others are sound."""
        if problem is None or address not in self.bootstrap:
            return
        skew_s = self._skews.get(address)
        text = foreign_clock_problem(skew_s) if skew_s else problem
        self._say("bootstrap", address, f"bootstrap {address}: {text}")

    def _described(self, problems: Mapping[str, str | None]) -> list[str]:
        """Each way in and what is wrong with it; a wrong clock first, because it explains everything else."""
        named = [address for address in self.bootstrap if address in problems]
        named.sort(key=lambda address: not self._skews.get(address, 0.0))
        return [f"{address}: {problems[address]}" for address in named]

    async def _enter(self, address: str) -> str | None:
        """Greet the node at `address` and ask it for our neighbours; what is wrong with it, or None.

        The question comes before it may enter our routing table: one that never answers would hold up
        every search.
        """
        problem = await self._greet(address)
        if problem is not None:
            self._remember(address, answered=False)
            return problem
        peer = PeerID.from_base58(peer_id(address))
        if await self._node.protocol.call_find(peer, [self._node.node_id]) is None:
            return "it greets, but answers no question; its operator should start it again"
        await self._node.protocol.call_ping(peer)
        return None

    async def _greet(self, address: str) -> str | None:
        """Connect and exchange hellos; what is wrong with the node at `address`, or None."""
        try:
            return await asyncio.wait_for(self._greet_for_ever(address), HELLO_DEADLINE_S)
        except TimeoutError:
            return (
                f"no answer within {HELLO_DEADLINE_S:.0f} s; is the address right, is a firewall in the way?"
            )
        except _CONNECTION_ERRORS as error:
            return explain_failure(str(error))

    async def _greet_for_ever(self, address: str) -> str | None:
        await self._connect(address)
        judgement = await self._hello(PeerID.from_base58(peer_id(address)))
        if judgement.problem is None or judgement.skew_s:
            self._skews[address] = judgement.skew_s
        if judgement.problem is None:
            self._remember(address, *judgement.addresses, answered=True)
        return judgement.problem

    async def _connect(self, address: str) -> None:
        # hivemind's P2P connects only while starting its own daemon; its client has the call we need
        target = Multiaddr(address.rsplit("/p2p/", 1)[0]) if not address.startswith("/dnsaddr/") else None
        await self._p2p._client.connect(PeerID.from_base58(peer_id(address)), [target or Multiaddr(address)])

    async def _hello(self, peer: PeerID) -> Judgement:
        for pause_s in (*HELLO_PAUSES_S, 0.0):
            sent_unix = clock.unix()
            data = await self._read_hello(peer)
            received_unix = clock.unix()
            if data:
                break
            # p2pd shows a stream that was reset (its peer is busy or just starting) as one that ended
            await asyncio.sleep(pause_s)
        return judge_hello(data, sent_unix, received_unix)

    async def _read_hello(self, peer: PeerID) -> bytes:
        _, reader, writer = await self._p2p.call_binary_stream_handler(peer, HELLO_PROTOCOL)
        with contextlib.closing(writer):
            data = b""
            while len(data) <= MAX_HELLO_BYTES and (part := await reader.read(MAX_HELLO_BYTES + 1)):
                data += part
        return data

    async def _search(self) -> None:
        """Look for our own neighbours; fills the routing table."""
        await self._node.find_nearest_nodes([self._node.node_id])

    # --- staying ---------------------------------------------------------------------------------

    async def stay_joined(self) -> None:
        """For ever: find back to the others after a partition, a sleep, a bootstrap node's restart."""
        period_s, rounds = _FIRST_HEAL_S, 0
        await self._mend()
        while True:
            await asyncio.sleep(period_s)
            period_s, rounds = min(2 * period_s, HEAL_PERIOD_S), rounds + 1
            self._node.blacklist.clear()
            checks = [self._check_bootstrap(address, anew=rounds % 4 == 0) for address in self.bootstrap]
            await asyncio.gather(*checks, *map(self._enter, self._some_known()))
            await self._learn_addresses()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._search(), _HEAL_DEADLINE_S)
            self._judge_company()
            self._judge_clock()
            await self._mend()

    async def _check_bootstrap(self, address: str, *, anew: bool) -> None:
        """Ping one; greet it when it does not answer, and now and then to compare clocks."""
        peer = PeerID.from_base58(peer_id(address))
        problem = None
        if anew or await self._node.protocol.call_ping(peer) is None:
            problem = await self._enter(address)
        if self._skews.get(address):
            return  # see `_judge_clock`
        if problem is None:
            self._unsay("bootstrap", address, f"bootstrap {address} answers again")
        else:
            again = f"trying again every {HEAL_PERIOD_S:.0f} s"
            problem = problem.partition("; is the address right")[0]  # it was: it has answered before
            self._say("bootstrap", address, f"lost bootstrap {address}: {problem}; {again}")

    def _some_known(self) -> list[str]:
        """Peers known from earlier that are not among our neighbours: a few a round."""
        table = self._node.protocol.routing_table
        away = [a for a in self._known if PeerID.from_base58(peer_id(a)) not in table.peer_id_to_uid]
        return self._rng.sample(away, min(_KNOWN_A_ROUND, len(away)))

    async def _learn_addresses(self) -> None:
        """Ask a few neighbours where they listen, for the next time that no bootstrap node answers."""
        table = self._node.protocol.routing_table.peer_id_to_uid
        new = [peer for peer in table if peer.to_base58() not in self._greeted]
        await asyncio.gather(*map(self._learn, self._rng.sample(new, min(_GREETED_A_ROUND, len(new)))))
        if len(self._greeted) > 4 * len(table) + 16:
            self._greeted = {peer.to_base58() for peer in table}

    async def _learn(self, peer: PeerID) -> None:
        name = peer.to_base58()
        self._greeted.add(name)
        with contextlib.suppress(TimeoutError, *_CONNECTION_ERRORS):
            judgement = await asyncio.wait_for(self._hello(peer), HELLO_DEADLINE_S)
            own = [address for address in judgement.addresses if address.endswith(f"/p2p/{name}")]
            if judgement.problem is None and own:
                self._remember(*own, answered=True)

    def _remember(self, *addresses: str, answered: bool) -> None:
        name = peer_id(addresses[0])
        mine = [address for address in addresses if address.endswith(f"/p2p/{name}")]
        self._send({"type": "peers", "peer": name, "addresses": mine, "answered": answered})

    def _judge_company(self) -> None:
        if not self.bootstrap:
            return
        if self._node.protocol.routing_table.uid_to_peer_id:
            self._unsay("alone", "", "other nodes answer again")
        else:
            self._say(
                "alone",
                "",
                "no other node of the network answers: nothing is published until one does. Is this machine "
                f"online? Trying again every {HEAL_PERIOD_S:.0f} s",
            )

    def _judge_clock(self) -> None:
        """Whose clock is wrong: ours when most of the bootstrap nodes say so."""
        off = {address: skew_s for address, skew_s in self._skews.items() if skew_s}
        ours = 2 * len(off) > len(self._skews)
        if ours:
            worst = max(off.values(), key=abs)
            self._say("clock", "", f"{clock_problem(worst)}; until then claims and records are refused")
        else:
            self._unsay("clock", "", "the clock is right again")
            for address in off:
                self._complain(address, "clock")

    # --- parts that do not know each other ---------------------------------------------------------

    def watch(self, keys: Sequence[bytes]) -> None:
        """Compare the records under `keys` too when bootstrap nodes are compared."""
        for key in keys:
            self._watched.pop(key, None)
            self._watched[key] = None
        while len(self._watched) > MAX_WATCHED_KEYS:
            del self._watched[next(iter(self._watched))]

    @property
    def split(self) -> bool:
        """Whether parts of the network were seen that do not know each other."""
        return ("split", "") in self._told

    async def _mend(self) -> None:
        """Look at the network through each bootstrap node; where two show different ones, introduce them."""
        parts = await self._look_around()
        verdict = self._comparison.judge(parts)
        if verdict.proven and not self.split:
            self._say("split", "", _split_text(*verdict.proven[0]))
        elif verdict.whole:
            self._unsay("split", "", "the parts of the network know each other again")
        elif self._comparison.unseen:
            text = "whether the network is still in parts cannot be seen: too few bootstrap nodes answer"
            self._unsay("split", "", text)
        if verdict.suspects:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._introduce(parts, verdict.proven), _HEAL_DEADLINE_S)

    async def _look_around(self) -> list[Part]:
        """The network through each of some bootstrap nodes; nothing when they take too long."""
        table = self._node.protocol.routing_table
        peers = {address: PeerID.from_base58(peer_id(address)) for address in self.bootstrap}
        known = table.peer_id_to_uid
        sound = {address: (peer, known[peer]) for address, peer in peers.items() if peer in known}
        if len(sound) < 2:
            return []
        vantages = self._rng.sample(sorted(sound), min(MAX_VANTAGES, len(sound)))
        targets = [self._node.node_id, *map(DHTID.generate, self._watched)]
        looks = [self._look(address, *sound[address], targets) for address in vantages]
        try:
            return await asyncio.wait_for(asyncio.gather(*looks), _HEAL_DEADLINE_S)
        except TimeoutError:
            return []

    async def _look(self, address: str, peer: PeerID, uid: DHTID, targets: Sequence[DHTID]) -> Part:
        nearest, found = await self._node.look_through(peer, uid, targets)
        return Part(address, frozenset({uid, *nearest[targets[0]]}), nearest, found)

    async def _introduce(self, parts: Sequence[Part], apart: Sequence[Pair]) -> None:
        """Get to know the nodes of every part (and they us, over whom they find each other), and store what
        each part that is certainly apart lacks where it looks for it: records carry their owners' signatures,
        so anyone may."""
        everyone = {uid: peer for part in parts for uid, peer in part.nearest[self._node.node_id].items()}
        await asyncio.gather(*map(self._node.protocol.call_ping, everyone.values()))
        await asyncio.gather(*(self._complete(*lacking) for lacking in missing(parts, apart)))
        await self._search()

    async def _complete(self, part: Part, key: DHTID, records: Mapping[Any, Any]) -> None:
        lacking = self._rng.sample(list(records.items()), min(MAX_COMPLETED, len(records)))
        keepers = list(part.nearest[key].values())[: self._node.num_replicas]
        subkeys = [subkey for subkey, _ in lacking]
        values = [item.value for _, item in lacking]
        until = [item.expiration_time for _, item in lacking]
        calls = [
            self._node.protocol.call_store(peer, [key] * len(lacking), values, until, subkeys=subkeys)
            for peer in keepers
        ]
        await asyncio.gather(*calls)

    # --- saying ----------------------------------------------------------------------------------

    def _say(self, kind: Trouble, subject: str, text: str) -> None:
        """Once, not every round; again when the reason changes."""
        if self._told.get((kind, subject)) != text:
            self._told[kind, subject] = text
            self._send(Notice(kind, subject, text).message())

    def _unsay(self, kind: Trouble, subject: str, text: str) -> None:
        if self._told.pop((kind, subject), None) is not None:
            self._send(Notice(kind, subject, text, active=False).message())

    def _keep(self, task: "asyncio.Task[Any]") -> None:
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)


def _split_text(one: Part, other: Part) -> str:
    counts = [f"{part.address} leads to {len(part.nodes)} nodes" for part in (one, other)]
    differing = len(one.lacks(other))
    records = f" ({differing} claims and other records are seen in one part only)" if differing else ""
    return (
        f"the network has come apart: {' and '.join(counts)} that do not know each other{records}. This node "
        "joins them again; if that stays, start each bootstrap node with --bootstrap and the other's address"
    )
