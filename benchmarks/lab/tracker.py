"""A tiny HTTP tracker (BEP 3 with compact peers, BEP 23), because aria2c takes peers from nowhere else.

`python -m benchmarks.lab.tracker ADDRESS PORT`: prints {"event":"peers","peers":N} at each change.

Owns: peers in memory. Does not own: anything the project itself uses.
"""

import http.server
import ipaddress
import json
import struct
import sys
import urllib.parse
from typing import Any

INTERVAL_S = 3


def query_bytes(query: str) -> dict[str, bytes]:
    """A query string's fields as raw bytes: an info-hash is no text."""
    pairs = (field.split("=", 1) for field in query.split("&") if "=" in field)
    return {name: urllib.parse.unquote_to_bytes(value) for name, value in pairs}


def answer(peers: set[tuple[str, int]]) -> bytes:
    """The bencoded list of peers."""
    compact = b"".join(
        ipaddress.IPv4Address(ip).packed + struct.pack(">H", port) for ip, port in sorted(peers)
    )
    return b"d8:intervali%de12:min intervali%de5:peers%d:%be" % (
        INTERVAL_S,
        INTERVAL_S,
        len(compact),
        compact,
    )


class Handler(http.server.BaseHTTPRequestHandler):
    """One announce."""

    swarms: dict[bytes, set[tuple[str, int]]] = {}  # noqa: RUF012 - shared by all requests, on purpose

    def do_GET(self) -> None:
        """Remember the peer, answer with the others."""
        fields = query_bytes(urllib.parse.urlsplit(self.path).query)
        me = (self.client_address[0], int(fields.get("port", b"0")))
        peers = self.swarms.setdefault(fields.get("info_hash", b""), set())
        if fields.get("event") == b"stopped":
            peers.discard(me)
        else:
            peers.add(me)
        body = answer(peers - {me})
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        print(json.dumps({"event": "peers", "peers": len(peers)}), flush=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""
        del format, args


if __name__ == "__main__":
    http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
