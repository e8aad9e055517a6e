"""What a relay gives to whom: everybody something, nobody all of it."""

import pytest

from paris_p2p.core.relay import MAX_HOSTS, Pace, Quota, RelayBudget, RelayLedger, host_key, punchable


def test_a_host_may_ask_so_often_a_minute_and_then_evenly() -> None:
    pace = Pace(6)
    assert [pace.allow("a", 0.0) for _ in range(8)] == [True] * 6 + [False] * 2
    assert pace.allow("b", 0.0)
    assert not pace.allow("a", 9.0) and pace.allow("a", 10.5) and not pace.allow("a", 11.0)


def test_hosts_beyond_counting_push_out_the_quietest() -> None:
    pace = Pace(1)
    for number in range(MAX_HOSTS + 1):
        assert pace.allow(str(number), 0.0)
    assert pace.allow("0", 0.0) and not pace.allow(str(MAX_HOSTS), 0.0)


def test_a_quota_has_room_for_many_and_few_of_one_host() -> None:
    quota = Quota(3, 2)
    assert [quota.take(host) for host in ("a", "a", "a", "b", "c")] == [True, True, False, True, False]
    quota.give("a")
    assert len(quota) == 2 and quota.take("c")


def test_an_ipv6_neighbourhood_counts_as_one_host() -> None:
    assert host_key("2001:db8::1") == host_key("2001:db8::ffff") != host_key("2001:db8:0:1::1")
    assert host_key("192.0.2.1") != host_key("192.0.2.2")


@pytest.mark.parametrize(
    ("host", "port", "good"),
    [
        ("192.0.2.1", 40_000, True),
        ("127.0.0.1", 40_000, False),
        ("0.0.0.0", 40_000, False),
        ("224.0.0.1", 40_000, False),
        ("192.0.2.1", 22, False),
        ("::1", 40_000, False),
    ],
)
def test_nobody_is_sent_to_a_service_or_to_ourselves(host: str, port: int, good: bool) -> None:
    assert punchable(host, port) == good


def test_relayed_bytes_wait_for_the_rate() -> None:
    ledger = RelayLedger(RelayBudget(bytes_per_s=1e6), 0.0)
    ledger.passed(1_250_000, 0.0)
    assert ledger.bucket.wait(0.0) == pytest.approx(1.0, abs=0.01) and ledger.relayed_bytes == 1_250_000
