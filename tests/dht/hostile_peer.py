"""A peer running stock hivemind without our validator; a program of its own, started by `test_worker.py`.

`listen`: a plain hivemind node. `attack`: against the DHT at the given address, every trick that works on
stock nodes; reads one JSON line on stdin (a signed record, an older one of the same owner, and the
attacker's own), prints one line of JSON: what each victim answered. Both stay until stdin ends.
"""

import asyncio
import json
import math
import sys
from typing import Any

from paris_p2p import clock
from paris_p2p.dht.hivemind_import import load_hivemind_dht

load_hivemind_dht()
from hivemind.dht.node import DHTNode  # noqa: E402
from hivemind.dht.routing import DHTID  # noqa: E402
from hivemind.dht.storage import DictionaryDHTValue  # noqa: E402
from hivemind.utils.serializer import MSGPackSerializer  # noqa: E402
from hivemind.utils.timed_storage import ValueWithExpiration  # noqa: E402

CENTURY_S = 100 * 365 * 86_400.0


async def attack(node: Any, plan: dict[str, Any]) -> dict[str, Any]:
    """What the victims answered to each attack on the record's key: a list a victim."""
    key_id = DHTID.generate(bytes.fromhex(plan["key"]))
    owner, own = bytes.fromhex(plan["subkey"]), bytes.fromhex(plan["own_subkey"])
    value = MSGPackSerializer.dumps(bytes.fromhex(plan["value"]))
    older = MSGPackSerializer.dumps(bytes.fromhex(plan["older_value"]))
    own_value = MSGPackSerializer.dumps(bytes.fromhex(plan["own_value"]))
    later = plan["expiration"] + 100
    poisoned = DictionaryDHTValue()
    poisoned.store(owner, b"poison", later)
    forged = bytearray(bytes.fromhex(plan["value"]))
    forged[-1] ^= 1  # of the signature
    distant = MSGPackSerializer.dumps(bytes.fromhex(plan["distant_value"]))
    attempts: dict[str, tuple[Any, float, Any, bool]] = {
        "plain": (MSGPackSerializer.dumps("gone"), later, None, False),
        "plain_century": (MSGPackSerializer.dumps("gone"), clock.unix() + CENTURY_S, None, False),
        "plain_in_cache": (MSGPackSerializer.dumps("gone"), later, None, True),
        "empty_dictionary_in_cache": (DictionaryDHTValue(), later, None, True),
        "foreign": (MSGPackSerializer.dumps(b"not his"), later, owner, False),
        "forged": (MSGPackSerializer.dumps(bytes(forged)), later, owner, False),
        "far_future": (distant, plan["distant_expiration"], own, False),
        "never": (value, math.inf, owner, False),
        "nan": (value, math.nan, owner, False),
        "no_subkey": (value, later, b"", False),
        "nested_subkey": (value, later, [owner], False),
        "moved_expiration": (value, later, owner, False),
        "oversized": (MSGPackSerializer.dumps(bytes(100_000)), later, own, False),
        "dictionary": (poisoned, later, None, False),
        "replayed_older": (older, plan["older_expiration"], owner, False),
        "own_in_cache": (own_value, plan["own_expiration"], own, True),
    }
    victims = list(node.protocol.routing_table.peer_id_to_uid)
    answers = {}
    for name, (data, until, subkey, in_cache) in attempts.items():
        stores = [node.protocol.call_store(v, [key_id], [data], [until], [subkey], in_cache) for v in victims]
        answers[name] = [list(answer or [False]) for answer in await asyncio.gather(*stores)]
    answers |= await move_and_flood(node, victims, key_id, own, own_value, plan["own_expiration"])
    # whoever asks us is told, for ever, that there is nothing
    node.protocol.storage.data[key_id] = ValueWithExpiration(DictionaryDHTValue(), math.inf)
    return {"victims": len(victims), **answers}


async def move_and_flood(
    node: Any, victims: list[Any], key_id: Any, own: bytes, value: bytes, until: float
) -> dict[str, Any]:
    """A rightful record under another key, and a request with more records than a node checks at once."""
    elsewhere = DHTID.generate(b"another key")
    store = node.protocol.call_store
    moved = await asyncio.gather(*(store(v, [elsewhere], [value], [until], [own]) for v in victims))
    many = 2000
    flood = [store(v, [key_id] * many, [b"junk"] * many, [until] * many, [own] * many) for v in victims]
    flooded = [answer is None or not any(answer) for answer in await asyncio.gather(*flood)]
    return {"moved": [list(answer or [False]) for answer in moved], "flood": [[not ok] for ok in flooded]}


async def main() -> None:
    """Run as told by the command line."""
    mode, *bootstrap = sys.argv[1:]
    node = await DHTNode.create(
        initial_peers=bootstrap, host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False, auto_nat=False
    )
    try:
        if mode == "attack":
            plan = json.loads(await asyncio.to_thread(sys.stdin.readline))
            print(json.dumps(await attack(node, plan)), flush=True)
        else:
            print(json.dumps([str(address) for address in await node.get_visible_maddrs()]), flush=True)
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await node.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
