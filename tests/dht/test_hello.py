"""The greeting: each thing that can be wrong with a bootstrap node is named, with what to do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.dht.hello import (
    MAX_HELLO_BYTES,
    Hello,
    Judgement,
    encode_hello,
    explain_failure,
    foreign_clock_problem,
    judge_hello,
)
from paris_p2p.wire import canonical
from paris_p2p.wire.addresses import MAX_ADDRESS_CHARS

NOW = 1_800_000_000.0


def test_our_own_greeting_is_sound() -> None:
    judged = judge_hello(encode_hello(NOW, ["/ip4/1.2.3.4/tcp/5/p2p/x"]), NOW - 0.1, NOW + 0.1)
    assert judged == Judgement(None, 0.0, ("/ip4/1.2.3.4/tcp/5/p2p/x",))


def test_only_addresses_that_fit_are_told() -> None:
    longest = [f"/dns4/{n}{'h' * 116}/tcp" for n in range(5)]
    assert all(len(address) == MAX_ADDRESS_CHARS for address in longest)
    data = encode_hello(NOW, ["/" * (MAX_ADDRESS_CHARS + 1), *longest])
    assert len(data) <= MAX_HELLO_BYTES
    assert judge_hello(data, NOW, NOW).addresses == tuple(longest[:3])


@pytest.mark.parametrize(
    ("our_clock", "said"), [(NOW + 10, "10.0 s ahead of the bootstrap's"), (NOW - 10, "10.0 s behind the")]
)
def test_a_wrong_clock_is_named_with_amount_and_direction(our_clock: float, said: str) -> None:
    judged = judge_hello(encode_hello(NOW), our_clock - 0.05, our_clock + 0.05)
    assert judged.problem is not None and said in judged.problem and "NTP" in judged.problem
    assert judged.skew_s == pytest.approx(our_clock - NOW)


def test_a_bootstrap_whose_clock_is_wrong_is_told_from_ours() -> None:
    assert "its clock is 10.0 s behind ours" in foreign_clock_problem(10.0)


def test_a_slow_answer_is_no_wrong_clock() -> None:
    assert judge_hello(encode_hello(NOW), NOW - 9, NOW) == Judgement(None)


@pytest.mark.parametrize(("version", "who"), [(2, "upgrade paris-p2p here"), (0, "upgrade the bootstrap")])
def test_another_version_is_named_with_who_must_upgrade(version: int, who: str) -> None:
    problem = judge_hello(canonical.encode(Hello("paris-p2p", version, NOW, ())), NOW, NOW).problem
    assert problem is not None and f"version {version}" in problem and who in problem


def test_another_product_is_not_a_paris_node() -> None:
    problem = judge_hello(canonical.encode(Hello("other", 1, NOW, ())), NOW, NOW).problem
    assert problem == "it is not a paris-p2p node"


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=300))
def test_any_answer_is_judged(data: bytes) -> None:
    problem = judge_hello(data, NOW, NOW).problem
    assert problem is not None and "not a paris-p2p node" in problem


def test_what_the_daemon_says_is_put_in_the_operators_words() -> None:
    text = "failed to dial: dial tcp4 127.0.0.1:9: connect: connection refused"
    assert "nothing listens there" in explain_failure(text)
    assert "cannot be reached (gremlins)" in explain_failure("gremlins")
