"""The bootstrap node's second service: it dials nodes back and relays for those behind routers.

Owns: where it listens (the DHT's interfaces, one port on), its identity, telling the DHT of it. Does not own:
the relay itself (`net.relay`), its budgets (`core.relay`).
"""

import hashlib
import logging

import trio

from paris_p2p import clock
from paris_p2p.core.relay import RelayBudget
from paris_p2p.dht.addresses import host_port
from paris_p2p.dht.client import Dht, DhtConfig
from paris_p2p.errors import NetworkError, TransportError
from paris_p2p.net.multi import ReachOptions, open_network
from paris_p2p.programs import Output
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.records import MAX_ADDRESS_CHARS, MAX_ADDRESSES, RelayRecord, sign_record

log = logging.getLogger(__name__)

RELAY_TTL_S = 600.0
RENEW_S = 120.0


def relay_address(address: str) -> str | None:
    """Where the relay listens, or is announced, when the DHT does at `address`; None where it cannot."""
    place = host_port(address)
    if place is None or place.transport != "tcp" or place.host_kind not in ("ip4", "ip6"):
        return None
    if place.port == 65_535:
        return None
    port = place.port + 1 if place.port else 0
    return f"/{place.host_kind}/{place.host}/tcp/{port}/tls"


async def help_to_be_reached(dht: Dht, config: DhtConfig, relay: bool, output: Output) -> None:
    """Dial back, and with `relay` relay, for ever. A port that is taken costs only this service."""
    assert config.key_path is not None
    listen = [text for text in map(relay_address, config.listen) if text is not None]
    announce = [text for text in map(relay_address, config.announce) if text is not None]
    key = await trio.to_thread.run_sync(config.key_path.read_bytes)
    # of its own: the key of a node in the same home would seem to be in use twice
    identity = Identity(hashlib.sha256(b"paris-p2p/relay:" + key).digest())
    options = ReachOptions(None, RelayBudget() if relay else None)
    try:
        async with open_network(identity, listen, announce, options) as network:
            addresses = [text for text in network.addresses if len(text) <= MAX_ADDRESS_CHARS]
            output.event("helping", None, addresses=addresses, relay=relay)
            await _announce(dht, identity, tuple(addresses[:MAX_ADDRESSES]))
    except NetworkError as error:
        log.warning("this bootstrap node does not help others to be reached: %s", error)


async def _announce(dht: Dht, identity: Identity, addresses: tuple[str, ...]) -> None:
    while True:
        record = sign_record(identity, RelayRecord(addresses), b"", clock.unix() + RELAY_TTL_S)
        try:
            await dht.publish([record])
        except TransportError as error:
            log.info("announcing the relay: %s", error)
        await trio.sleep(RENEW_S)
