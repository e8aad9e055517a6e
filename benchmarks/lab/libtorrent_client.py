"""A minimal libtorrent client that speaks the benchmarks' events.

`python -m benchmarks.lab.libtorrent_client seed|get TORRENT FOLDER IP:PORT [PEER IP:PORT …]`

Defaults of the library but for what a closed network needs: no DHT, no local discovery, no port mapping,
TCP only (uTP yields to other traffic, which is not what is compared). Goes on seeding until SIGTERM.

Owns: that. Does not own: measuring.
"""

import json
import signal
import sys
from types import FrameType
from typing import Any

import libtorrent as lt

from paris_p2p import clock

RECONNECT_S = 1.0


def settings(listen: str) -> dict[str, Any]:
    """What differs from libtorrent's defaults."""
    return {
        "listen_interfaces": listen,
        "outgoing_interfaces": listen.rsplit(":", 1)[0],
        "enable_dht": False,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        "enable_incoming_utp": False,
        "enable_outgoing_utp": False,
        "alert_mask": lt.alert.category_t.status_notification,
    }


def say(event: str, **fields: Any) -> None:
    """One event line."""
    print(json.dumps({"event": event, **fields}), flush=True)


def leave(number: int, frame: FrameType | None) -> None:
    """End by unwinding: the session writes out what it still holds when it is dropped."""
    del number, frame
    raise SystemExit(0)


def main(role: str, torrent: str, folder: str, listen: str, peers: list[str]) -> None:
    """Run until SIGTERM."""
    make_session: Any = lt.session  # its stub knows no plain dict, the library does
    session = make_session(settings(listen))
    params = lt.add_torrent_params()
    params.ti = lt.torrent_info(torrent)
    params.save_path = folder
    params.flags &= ~(lt.torrent_flags.paused | lt.torrent_flags.auto_managed)
    if role == "seed":
        params.flags |= lt.torrent_flags.seed_mode  # the file is known to be right
    began = clock.monotonic()
    handle = session.add_torrent(params)

    signal.signal(signal.SIGTERM, leave)
    if role == "seed":
        say("seeding")
        while True:
            signal.pause()
    fetch(session, handle, peers, began)
    while True:
        signal.pause()


def fetch(session: Any, handle: Any, peers: list[str], began: float) -> None:
    """Until complete."""
    addresses = [(peer.rsplit(":", 1)[0], int(peer.rsplit(":", 1)[1])) for peer in peers]
    again = 0.0
    say("listening")
    while not (status := handle.status()).is_seeding:
        if clock.monotonic() > again and status.num_peers < len(addresses):
            for address in addresses:
                handle.connect_peer(address)
            again = clock.monotonic() + RECONNECT_S
        session.wait_for_alert(100)
        session.pop_alerts()
    say(
        "fetched",
        seconds=clock.monotonic() - began,
        bytes=status.total_done,
        wasted_bytes=status.total_redundant_bytes + status.total_failed_bytes,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])
