"""How the DHT's cost grows with nodes and roles: real nodes on this machine, and many over memory.

`--real 16,64`: that many DHT workers with their p2pd, each pair 45 + 70 MB, on loopback: latency of storing a
claim and of observing a run (the reads of one poll), memory, as this machine gives them.

`--memory 200,1000`: that many `RecordNode`s (the node of the real worker, with validator and storage) in one
process over an in-memory stand-in for hivemind's `P2P` object, in virtual time: every call takes a round trip
drawn from `--rtt` and is lost with probability `--loss`. Latency is virtual, so it tells the number of
sequential rounds; calls and bytes per operation and CPU are counted.

For each network the operations are repeated for runs of several sizes (`--roles`): one store of a claim; one
observation, which reads the claims, announcements and attestations of every role and the members. Last
line: one JSON object.
"""

import argparse
import asyncio
import json
import random
import resource
import selectors
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import trio

from paris_p2p import clock
from paris_p2p.dht.client import Dht, DhtConfig, open_dht
from paris_p2p.ids import Role, RunId, Term
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import (
    AnnounceRecord,
    AttestRecord,
    Check,
    ClaimRecord,
    MemberRecord,
    SignedRecord,
    record_key,
    role_scope,
    sign_record,
)

RUN = RunId(b"r" * 32)
TTL_S = 600.0
OPERATIONS = 12
"""Of each kind, spread over nodes."""
JOIN_AT_ONCE = 8
STATEMENT_BYTES = 420
"""What a signed checkpoint statement has; the DHT does not look inside."""

Keys = Sequence[tuple[str, bytes]]


# --- the run ---------------------------------------------------------------------------------------


def role_names(count: int) -> list[Role]:
    return [Role(f"expert-{number}") for number in range(count - 1)] + [Role("router")]


def keys_of(roles: Sequence[Role]) -> list[tuple[str, bytes]]:
    """What one observation reads."""
    kinds = ("claim", "announce", "attest")
    return [*((kind, role_scope(RUN, role)) for kind in kinds for role in roles), ("member", RUN)]


def claim(owner: Identity, role: Role, now: float) -> SignedRecord:
    return sign_record(owner, ClaimRecord("hold", Term(1), now), role_scope(RUN, role), now + TTL_S)


def records_of(owner: Identity, role: Role, now: float) -> list[SignedRecord]:
    """What one member with a role keeps published."""
    addresses = (f"/ip4/203.0.113.5/tcp/4001/p2p/{'k' * 52}",)
    announced = AnnounceRecord(owner.seed * (STATEMENT_BYTES // 32), addresses)
    member = MemberRecord(addresses, "training", role, Term(1), 1, 9, 0.5, 1.0, 0, 0, now)
    return [
        claim(owner, role, now),
        sign_record(owner, announced, role_scope(RUN, role), now + TTL_S),
        sign_record(owner, AttestRecord((Check(bytes(32), True, 0.5),)), role_scope(RUN, role), now + TTL_S),
        sign_record(owner, member, RUN, now + 300.0),
    ]


def identity(number: int) -> Identity:
    return Identity((1 + number).to_bytes(32, "big"))


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """Median and 95th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


# --- real nodes ------------------------------------------------------------------------------------


async def real(nodes: int, role_counts: Sequence[int]) -> dict[str, Any]:
    """Join `nodes` workers on loopback and measure."""
    with tempfile.TemporaryDirectory(prefix="paris-bench-") as folder:
        async with trio.open_nursery() as nursery:
            dhts, started = await _open_all(nodes, Path(folder), nursery)
            memory = [await _memory(dht) for dht in dhts]
            rows = [await _measure_real(dhts, count) for count in role_counts]
            nursery.cancel_scope.cancel()
    join_p50, join_p95 = quantiles(started)
    return {
        "nodes": nodes,
        "join_p50_s": round(join_p50, 3),
        "join_p95_s": round(join_p95, 3),
        "worker_mb": round(statistics.mean(worker for worker, _ in memory), 1),
        "p2pd_mb": round(statistics.mean(daemon for _, daemon in memory), 1),
        "operations": rows,
    }


async def _open_all(nodes: int, folder: Path, nursery: trio.Nursery) -> tuple[list[Dht], list[float]]:
    dhts: list[Dht] = []
    seconds: list[float] = []
    limit = trio.CapacityLimiter(2)

    async def keep(bootstrap: tuple[str, ...], task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        await limit.acquire()
        began = clock.monotonic()
        listen = ("/ip4/127.0.0.1/tcp/0",)
        config = DhtConfig(listen, (), bootstrap, None, False, folder / "run")
        async with open_dht(config) as dht:
            seconds.append(clock.monotonic() - began)
            limit.release()
            dhts.append(dht)
            task_status.started()
            await trio.sleep_forever()

    # a task may not release what another acquired: each borrows in its own name, see `keep`
    await nursery.start(keep, ())
    first = dhts[0].addresses
    async with trio.open_nursery() as joining:
        for _ in range(nodes - 1):
            joining.start_soon(nursery.start, keep, first)
    return dhts, seconds


async def _memory(dht: Dht) -> tuple[float, float]:
    info = await dht.info()
    sizes = [psutil.Process(pid).memory_info().rss / 1e6 for pid in (info.worker_pid, info.p2pd_pid)]
    return sizes[0], sizes[1]


async def _measure_real(dhts: Sequence[Dht], role_count: int) -> dict[str, Any]:
    roles = role_names(role_count)
    for number, role in enumerate(roles):
        await dhts[number % len(dhts)].publish(records_of(identity(number), role, clock.unix()))
    stores, reads = [], []
    for number in range(OPERATIONS):
        dht = dhts[number * 7 % len(dhts)]
        record = claim(identity(1000 + number), roles[number % len(roles)], clock.unix())
        stores.append(await _timed(lambda dht=dht, record=record: dht.publish([record])))  # type: ignore[misc]
        reads.append(await _timed(lambda dht=dht: dht.read_many(keys_of(roles))))  # type: ignore[misc]
        found = await dht.read("claim", role_scope(RUN, roles[number % len(roles)]))
        assert any(bytes(r.owner) == identity(1000 + number).node_id for r in found), (
            "a stored claim is not read"
        )
    return _row(role_count, stores, reads)


async def _timed(operation: Callable[[], Awaitable[Any]]) -> float:
    began = clock.monotonic()
    await operation()
    return clock.monotonic() - began


def _row(role_count: int, stores: Sequence[float], reads: Sequence[float]) -> dict[str, Any]:
    store, read = quantiles(stores), quantiles(reads)
    return {
        "roles": role_count,
        "store_p50_ms": round(1000 * store[0], 1),
        "store_p95_ms": round(1000 * store[1], 1),
        "observe_p50_ms": round(1000 * read[0], 1),
        "observe_p95_ms": round(1000 * read[1], 1),
    }


# --- many nodes in memory ----------------------------------------------------------------------------


class _Jump(selectors.DefaultSelector):
    """Instead of waiting, time passes."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("nothing will ever happen: every task waits for another")
        self.now_s += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time: sleeping costs nothing."""

    def __init__(self) -> None:
        self.jump = _Jump()
        super().__init__(self.jump)

    def time(self) -> float:
        return self.jump.now_s


@dataclass(slots=True)
class Network:
    """Who is reachable, how fast, and what was sent."""

    rng: random.Random
    rtt_s: tuple[float, float]
    loss: float
    handlers: dict[tuple[Any, str], tuple[Any, Any]]
    calls: int = 0
    sent_bytes: int = 0


class MemoryP2P:
    """What `DHTNode` uses of hivemind's `P2P`, over `Network`. Messages are serialised, as on a wire."""

    def __init__(self, network: Network, peer_id: Any, context: Any) -> None:
        self.peer_id, self._network, self._context = peer_id, network, context

    async def add_protobuf_handler(self, name: str, handler: Any, input_type: Any, **_options: Any) -> None:
        self._network.handlers[self.peer_id, name] = (handler, input_type)

    async def call_protobuf_handler(self, peer: Any, name: str, message: Any, output_type: Any) -> Any:
        network = self._network
        half_s = network.rng.uniform(*network.rtt_s) / 2
        request = message.SerializeToString()
        network.calls, network.sent_bytes = network.calls + 1, network.sent_bytes + len(request)
        await asyncio.sleep(half_s)
        if (peer, name) not in network.handlers or network.rng.random() < network.loss:
            await asyncio.sleep(3600.0)  # the caller gives up before
        handler, input_type = network.handlers[peer, name]
        context = self._context(handle_name=name, local_id=peer, remote_id=self.peer_id)
        answer = (await handler(input_type.FromString(request), context)).SerializeToString()
        network.sent_bytes += len(answer)
        await asyncio.sleep(half_s)
        if network.rng.random() < network.loss:
            await asyncio.sleep(3600.0)
        return output_type.FromString(answer)


def in_memory(nodes: int, role_counts: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """Run a network of `nodes` in virtual time and measure."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(_in_memory(nodes, role_counts, options))
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        asyncio.set_event_loop(None)
        loop.close()


async def _in_memory(nodes: int, role_counts: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    from paris_p2p.dht.hivemind_import import load_hivemind_dht

    load_hivemind_dht()
    from hivemind.p2p import P2PContext, PeerID

    from paris_p2p.dht.hardened import create_node

    rng = random.Random(options.seed)
    network = Network(rng, (options.rtt[0] / 1000, options.rtt[1] / 1000), options.loss, {})
    loop, began_cpu, before_kb = asyncio.get_running_loop(), time.process_time(), _resident_kb()
    members: list[Any] = []
    joined: list[float] = []

    async def join() -> None:
        peer = PeerID(b"\x12\x20" + rng.randbytes(32))
        node = await create_node(MemoryP2P(network, peer, P2PContext), client_mode=False, now=clock.unix)
        began = loop.time()
        for other in rng.sample(members, min(2, len(members))):
            await node.protocol.call_ping(other.peer_id)
        await node.find_nearest_nodes([node.node_id])
        joined.append(loop.time() - began)
        members.append(node)

    await join()
    while len(members) < nodes:
        await asyncio.gather(*(join() for _ in range(min(JOIN_AT_ONCE, nodes - len(members)))))
    join_calls, join_cpu = network.calls, time.process_time() - began_cpu
    rows = [await _measure_memory(members, network, count, rng) for count in role_counts]
    p50, p95 = quantiles(joined)
    tables = [len(node.protocol.routing_table.uid_to_peer_id) for node in members]
    return {
        "nodes": nodes,
        "join_p50_s": round(p50, 3),
        "join_p95_s": round(p95, 3),
        "join_calls": round(join_calls / nodes, 1),
        "join_cpu_ms": round(1000 * join_cpu / nodes, 1),
        "node_kb": round((_resident_kb() - before_kb) / nodes, 1),
        "routing_table": round(statistics.mean(tables), 1),
        "operations": rows,
    }


def _resident_kb() -> float:
    return float(psutil.Process().memory_info().rss) / 1024


async def _measure_memory(
    members: Sequence[Any], network: Network, role_count: int, rng: random.Random
) -> dict[str, Any]:
    roles, loop = role_names(role_count), asyncio.get_running_loop()
    keys = [record_key(kind, scope) for kind, scope in keys_of(roles)]

    async def store(node: Any, records: Sequence[SignedRecord]) -> list[bool]:
        rows = [(r.key, bytes(r.subkey), r.value, r.expiration_unix) for r in records]
        answers = await node.store_counting(rows, exclude_self=False)
        return [votes.taken > 0 for _, votes in answers]

    for number, role in enumerate(roles):
        await store(rng.choice(members), records_of(identity(number), role, clock.unix()))
    costs: dict[str, list[float]] = {"store": [], "observe": []}
    counted: dict[str, list[float]] = {
        f"{name}_{what}": [] for name in costs for what in ("calls", "kb", "cpu_ms")
    }
    stored = seen = 0
    for number in range(OPERATIONS):
        role, owner = roles[number % role_count], identity(1000 + number)
        record = claim(owner, role, clock.unix())
        for name in costs:
            node = rng.choice(members)
            before = (network.calls, network.sent_bytes, loop.time(), time.process_time())
            if name == "store":
                stored += all(await store(node, [record]))
            else:
                searches = (await node.search(keys)).futures
                await asyncio.wait(searches.values())
                entry = searches[record.key].result()
                seen += entry is not None and bytes(record.subkey) in entry.value
            costs[name].append(loop.time() - before[2])
            counted[f"{name}_calls"].append(network.calls - before[0])
            counted[f"{name}_kb"].append((network.sent_bytes - before[1]) / 1000)
            counted[f"{name}_cpu_ms"].append(1000 * (time.process_time() - before[3]))
    means = {name: round(statistics.mean(values), 1) for name, values in counted.items()}
    return {
        **_row(role_count, costs["store"], costs["observe"]),
        **means,
        "stored": round(stored / OPERATIONS, 3),
        "seen": round(seen / OPERATIONS, 3),
    }


# --- the program -------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip() and int(part) > 0]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--real", type=numbers, default=[16], help="Real nodes, for example 16,64; 0 for none."
    )
    parser.add_argument(
        "--memory", type=numbers, default=[200], help="Nodes in memory, for example 200,1000."
    )
    parser.add_argument("--roles", type=numbers, default=[9], help="Roles of the run, for example 5,9,33.")
    parser.add_argument("--rtt", type=lambda t: tuple(map(float, t.split(","))), default=(20.0, 200.0))
    parser.add_argument("--loss", type=float, default=0.01, help="Of each message in memory.")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def show(kind: str, result: dict[str, Any]) -> None:
    """One line for people."""
    print(f"{kind}: {json.dumps(result)}", flush=True)


def main() -> None:
    options = parse(sys.argv[1:])
    report: dict[str, Any] = {"benchmark": "dht_scale", "real": [], "memory": []}
    for nodes in options.real:
        report["real"].append(trio.run(real, nodes, options.roles))
        show("real", report["real"][-1])
    for nodes in options.memory:
        report["memory"].append(in_memory(nodes, options.roles, options))
        show("in memory", report["memory"][-1])
    report |= {"rtt_ms": list(options.rtt), "loss": options.loss, "seed": options.seed}
    report["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, 1)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
