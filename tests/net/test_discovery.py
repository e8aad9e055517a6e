"""Finding the one who has an item among many who do not exist."""

import random
from collections import Counter

import pytest
import trio
from trio.testing import MockClock

from paris_p2p.errors import TransportError
from paris_p2p.ids import NodeId
from paris_p2p.net.addresses import parse_endpoint
from paris_p2p.net.discovery import KNOCK_S, MAX_DIALS, SEARCHING_DIALS
from paris_p2p.net.multi import open_network
from paris_p2p.net.transport import ByteStream, Peer
from paris_p2p.wire.identity import Identity, peer_id_text
from tests.net.memory_network import Hub, MemoryNetwork, World

ROWS = 1500  # the DHT keeps about as many of one item
CONNECT_S = 5.0  # for an address that answers nothing


def invented(rng: random.Random, count: int, place: str = "") -> list[Peer]:
    """Keys at one `place`, or each at another: whoever invents addresses has as many as there are."""
    return [
        Peer(
            NodeId(rng.randbytes(32)),
            (f"/ip4/{place or f'{rng.randrange(11, 90)}.{rng.randrange(250)}.{n % 250}'}.9/tcp/{n + 1}/tls",),
        )
        for n in range(count)
    ]


class Watched(MemoryNetwork):
    """Notes how many dials to one place are under way at most."""

    def __init__(self, hub: Hub, number: int) -> None:
        super().__init__(hub, number)
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()

    async def dial(self, peer: Peer, *, knock_s: float | None = None) -> ByteStream:
        endpoint = parse_endpoint(peer.addresses[0])
        place = "" if endpoint is None else endpoint.host
        self.now[place] += 1
        self.most[place] = max(self.most[place], self.now[place])
        try:
            return await super().dial(peer, knock_s=knock_s)
        finally:
            self.now[place] -= 1


@pytest.mark.parametrize(("place", "within_s"), [("203.0.113", 8.0), ("", 55.0)])
async def test_one_seeder_is_found_among_as_many_dead_addresses_as_the_dht_holds(
    world: World, autojump_clock: MockClock, place: str, within_s: float
) -> None:
    store, mine = world.store("seed"), world.store("mine")
    ref = world.content(store, pieces=3)
    seeds = world.network()
    seeds.addresses = ("/ip4/198.51.100.1/tcp/4001/tls",)
    network = Watched(world.hub, 200)
    world.hub.dead_s = CONNECT_S
    async with world.node(store, seeds, holder=True), world.node(mine, network) as leecher:
        world.hub.holders += invented(random.Random(5), ROWS, place)
        began = trio.current_time()
        await leecher.fetch(ref, stall_timeout_s=60.0)
        assert trio.current_time() - began < within_s
    assert ROWS / SEARCHING_DIALS * KNOCK_S < 55.0
    assert not place or network.most["203.0.113.9"] <= MAX_DIALS


async def test_who_is_preferred_is_dialled_before_all_strangers(
    world: World, autojump_clock: MockClock
) -> None:
    store, mine = world.store("seed"), world.store("mine")
    ref = world.content(store, pieces=3)
    seeds = world.network()
    world.hub.dead_s = CONNECT_S
    async with world.node(store, seeds), world.node(mine) as leecher:
        world.hub.holders += [*invented(random.Random(6), ROWS), seeds.peer]
        leecher.prefer(lambda: [seeds.node_id])
        began = trio.current_time()
        await leecher.fetch(ref)
        assert trio.current_time() - began < 2.0


async def test_only_the_addresses_that_answer_a_knock_are_dialled() -> None:
    alice, bob = Identity(b"a" * 32), Identity(b"b" * 32)
    listen = ["/ip4/127.0.0.1/tcp/0/tls"]
    name = peer_id_text(alice.node_id)
    dead = tuple(f"/ip4/127.0.0.1/tcp/{port}/tls/p2p/{name}" for port in (9, 19))

    async def hang_up(node_id: NodeId, stream: ByteStream) -> None:
        await stream.aclose()

    async with open_network(alice, listen) as there, open_network(bob, []) as here:
        there.serve(hang_up)
        stream = await here.dial(Peer(alice.node_id, (*dead, there.addresses[0])), knock_s=5.0)
        await stream.aclose()
        circuit = f"/ip4/127.0.0.1/tcp/9/tls/p2p-circuit/p2p/{name}"
        with pytest.raises(TransportError, match="no address answers"):
            await here.dial(Peer(alice.node_id, (dead[0], circuit)), knock_s=5.0)
