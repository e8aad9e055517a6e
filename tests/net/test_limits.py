"""The operator's limits: their checks and their arithmetic."""

import pytest

from paris_p2p.errors import ConfigError
from paris_p2p.ids import NodeId
from paris_p2p.net.limits import MAX_TAKERS, Served, SwarmLimits


@pytest.mark.parametrize("name", ["up_bytes_per_s", "per_peer_down_bytes_per_s", "max_peers", "seed_ratio"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_limit_of_nothing_is_refused_with_what_to_do(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be above 0"):
        SwarmLimits(**{name: value})


def test_yielding_uploads_never_raises_a_limit() -> None:
    assert SwarmLimits().up_now(False) is None
    assert SwarmLimits().up_now(True) == SwarmLimits().yielded_up_bytes_per_s
    assert SwarmLimits(up_bytes_per_s=1000.0).up_now(True) == 1000.0


def test_an_item_is_seeded_until_ratio_or_time_is_reached() -> None:
    for_ever, limited = SwarmLimits(), SwarmLimits(seed_ratio=2.0, seed_time_s=60.0)
    assert not for_ever.seeded_enough(10**12, 1, 1e9)
    assert not limited.seeded_enough(199, 100, 59.0)
    assert limited.seeded_enough(200, 100, 0.0) and limited.seeded_enough(0, 100, 60.0)


def test_who_took_an_eighth_of_an_item_is_known_to_copy_it() -> None:
    served = Served(0.0, 800)
    served.sent(NodeId(b"a" * 32), 99)
    served.sent(NodeId(b"b" * 32), 60)
    served.sent(NodeId(b"b" * 32), 40)
    assert served.takers() == {NodeId(b"b" * 32)} and served.bytes == 199
    for number in range(MAX_TAKERS):
        served.sent(NodeId(number.to_bytes(32, "big")), 1)
    assert len(served.by_peer) == MAX_TAKERS and not served.takers()
