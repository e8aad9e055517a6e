"""Tests of `paris_node.commands.seed`."""

from paris_node.commands.seed import how_to_get

PUBLIC = "/ip4/192.0.2.7/tcp/4001/tls/p2p/12D3KooW"
LOOPBACK = "/ip4/127.0.0.1/tcp/4001/tls/p2p/12D3KooW"
CIRCUIT = "/ip4/192.0.2.7/tcp/4001/tls/p2p-circuit/p2p/12D3KooW"


def test_each_way_to_fetch_an_item_says_where_it_works() -> None:
    assert how_to_get("ab", (PUBLIC, CIRCUIT, LOOPBACK), lan=True) == [
        "  paris-node get ab --out DIR --lan  # on this network",
        f"  paris-node get ab --out DIR --peer {PUBLIC}",
        f"  paris-node get ab --out DIR --peer {CIRCUIT}",
        f"  paris-node get ab --out DIR --peer {LOOPBACK}  # on this machine",
    ]
    assert how_to_get("ab", (PUBLIC,), lan=False) == [f"  paris-node get ab --out DIR --peer {PUBLIC}"]
