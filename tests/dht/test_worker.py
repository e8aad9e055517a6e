"""Real DHT workers on loopback: they find each other, survive what is killed, leave nothing behind, resist a
hostile peer, and say what is wrong when joining fails."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from paris_p2p import clock
from paris_p2p.dht import client
from paris_p2p.dht.addresses import EXAMPLE
from paris_p2p.dht.client import DhtConfig, open_dht
from paris_p2p.dht.runtime import runtime_place
from paris_p2p.errors import ConfigError, NetworkError, TransportError
from paris_p2p.ids import ROUTER, RunId, Term
from paris_p2p.wire.identity import Identity, peer_id_text
from paris_p2p.wire.records import ClaimRecord, SignedRecord, role_scope, sign_record

Configure = Callable[..., DhtConfig]
Provide = Callable[..., SignedRecord]
Until = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]
Runs = Callable[[int], bool]

ITEM = b"i" * 32
CLAIM_SCOPE = role_scope(RunId(b"r" * 32), ROUTER)
HOSTILE = Path(__file__).with_name("hostile_peer.py")

OTHER_VERSION = """
from paris_p2p.dht import hello
hello.PROTOCOL_VERSION += 1
from paris_p2p.dht.worker import main
main()
"""

NODE = """
import sys, trio
from pathlib import Path
from paris_p2p.dht.client import DhtConfig, open_dht

async def main():
    config = DhtConfig(("/ip4/127.0.0.1/tcp/0",), (), (), None, False, Path(sys.argv[1]))
    async with open_dht(config) as dht:
        info = await dht.info()
        print(info.worker_pid, info.p2pd_pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


def folders(config: DhtConfig) -> Path:
    """Where the configuration's runtime folders are (pytest's own folders are too long for sockets)."""
    return runtime_place(config.runtime_dir)


async def test_what_one_publishes_the_others_read(configure: Configure, provide: Provide) -> None:
    async with open_dht(configure("a")) as first, open_dht(configure("b", first.addresses)) as second:
        config = configure("c", first.addresses, client_mode=True, key_path=None)
        async with open_dht(config) as short:
            assert short.addresses == ()
            assert all("/ip4/127.0.0.1/tcp/" in address for address in second.addresses)
            assert await short.publish([provide(1, ITEM), provide(2, ITEM)]) == [True, True]
            assert await second.publish([provide(3, ITEM), provide(3, b"j" * 32)]) == [True, True]
            for dht in (first, second, short):
                here, none, there = await dht.read_many(
                    [("provide", ITEM), ("provide", b"n" * 32), ("provide", b"j" * 32)]
                )
                assert len(here) == 3 and not none and len(there) == 1
            old = provide(1, ITEM, ttl_s=100.0)
            assert await second.publish([old]) == [False]  # the owner's newer one stands
            assert (await first.info()).peers == 1 and (await short.info()).peers == 2
        place = folders(config)
    assert not place.exists()


async def test_a_killed_worker_or_daemon_is_replaced_and_its_records_with_it(
    configure: Configure, provide: Provide, until: Until, runs: Runs
) -> None:
    async with open_dht(configure("a")) as first, open_dht(configure("b", first.addresses)) as second:
        addresses = first.addresses
        await first.publish([provide(1, ITEM)])
        for victim in ("worker", "p2pd"):
            before, both = await first.info(), await second.info()
            os.kill(before.worker_pid if victim == "worker" else before.p2pd_pid, signal.SIGKILL)
            os.kill(both.worker_pid, signal.SIGKILL)  # so that nobody holds the records any more

            async def all_is_well(restarts: int = before.restarts + 1) -> bool:
                info = await first.info()
                return info.restarts == restarts and len(await second.read("provide", ITEM)) == 1

            await until(all_is_well)
            assert first.addresses == addresses
            assert not runs(before.worker_pid) and not runs(before.p2pd_pid) and not runs(both.p2pd_pid)
            assert len(list(folders(configure("a")).glob("*/*.sock"))) == 4  # none is left of the dead


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends p2pd with its parent on Linux only")
async def test_killing_the_node_leaves_no_process_and_no_file(
    tmp_path: Path, configure: Configure, until: Until, runs: Runs
) -> None:
    node = _start([sys.executable, "-c", NODE, str(tmp_path / "run")])
    async with _ended(node):
        pids = [int(text) for text in (await _line(node)).split()]
        assert all(runs(pid) for pid in pids)
        node.kill()

        async def all_is_gone() -> bool:
            return not any(map(runs, pids)) and not folders(configure("a")).exists()

        await until(all_is_gone)


async def test_a_hostile_peer_neither_wipes_nor_hides_nor_replaces_a_claim(configure: Configure) -> None:
    async with open_dht(configure("a")) as first, open_dht(configure("b", first.addresses)) as second:
        older, record, own, distant = _claim(1, 3.0), _claim(1, 300.0), _claim(66, 3000.0), _claim(66, 1e9)
        assert await first.publish([record]) == [True]
        plan = {
            "key": record.key.hex(),
            "subkey": record.subkey.hex(),
            "value": record.value.hex(),
            "expiration": record.expiration_unix,
            "older_value": older.value.hex(),
            "older_expiration": older.expiration_unix,
            "distant_value": distant.value.hex(),
            "distant_expiration": distant.expiration_unix,
            "own_subkey": own.subkey.hex(),
            "own_value": own.value.hex(),
            "own_expiration": own.expiration_unix,
        }
        peer = _start([sys.executable, str(HOSTILE), "attack", *first.addresses])
        async with _ended(peer):
            assert peer.stdin is not None
            peer.stdin.write(json.dumps(plan).encode() + b"\n")
            peer.stdin.flush()
            answers = json.loads(await _line(peer))
            victims = answers.pop("victims")
            assert victims == 2
            accepted_own = answers.pop("own_in_cache")
            assert accepted_own == [[True]] * victims  # a rightful record of his own, beside the other
            for name in ("dictionary", "empty_dictionary_in_cache"):
                answers.pop(name)  # its good part, which is nothing, was stored
            assert answers == {name: [[False]] * victims for name in answers}
            await _past(older.expiration_unix)
            for dht in (first, second):
                found = {bytes(found.owner): found for found in await dht.read("claim", CLAIM_SCOPE)}
                assert found[record.subkey].expiration_unix == record.expiration_unix
                assert found.keys() <= {record.subkey, own.subkey}


@pytest.mark.parametrize(("offset", "way"), [("10", "ahead of"), ("-10", "behind")])
async def test_a_wrong_clock_is_named_with_amount_and_direction(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, offset: str, way: str
) -> None:
    async with open_dht(configure("a")) as first:
        monkeypatch.setenv("PARIS_CLOCK_OFFSET_S", offset)
        with pytest.raises(NetworkError, match=rf"clock is 10\.\d s {way} the bootstrap's"):
            async with open_dht(configure("b", first.addresses)):
                pass


async def test_a_bootstrap_of_another_version_is_named(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other_version.py").write_text(OTHER_VERSION)
    with monkeypatch.context() as patched:
        patched.setenv("PYTHONPATH", str(tmp_path))
        patched.setattr(client, "_WORKER_MODULE", "other_version")
        opened = open_dht(configure("a"))
        first = await opened.__aenter__()
    try:
        with pytest.raises(NetworkError, match=r"version 2, this program version 1: upgrade paris-p2p here"):
            async with open_dht(configure("b", first.addresses)):
                pass
    finally:
        await opened.__aexit__(None, None, None)


async def test_what_is_wrong_with_each_bootstrap_address_is_said(configure: Configure) -> None:
    async with open_dht(configure("a")) as first, _http_server() as port:
        others = [peer_id_text(Identity(bytes([n]) * 32).node_id) for n in range(3)]
        real = first.addresses[0].rsplit("/", 1)[0]
        plain = _start([sys.executable, str(HOSTILE), "listen"])
        async with _ended(plain):
            [stranger] = json.loads(await _line(plain))
            wrong = [
                f"/ip4/127.0.0.1/tcp/{_free_port()}/p2p/{others[0]}",
                f"{real}/{others[1]}",
                f"/ip4/127.0.0.1/tcp/{port}/p2p/{others[2]}",
                stranger,
            ]
            with pytest.raises(NetworkError) as caught:
                async with open_dht(configure("b", wrong)):
                    pass
            problems = str(caught.value).split("; /ip4/")
            expected = ("nothing listens", "another peer id answers", "not a libp2p node", "not a paris-p2p")
            for problem, said in zip(problems, expected, strict=True):
                assert said in problem


async def test_one_sound_bootstrap_is_enough_and_waits_for_no_other(
    configure: Configure, provide: Provide
) -> None:
    dead = f"/ip4/127.0.0.1/tcp/{_free_port()}/p2p/{EXAMPLE.rsplit('/', 1)[1]}"
    async with open_dht(configure("a")) as first, _mute_server() as port:
        mute = f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id_text(Identity(bytes(32)).node_id)}"
        async with open_dht(configure("b", [mute, dead, *first.addresses])) as second:
            # the mute one is given ten seconds before it is complained of: nobody waited for that
            assert [notice.subject for notice in second.notices] == [dead]
            assert await second.publish([provide(1, ITEM)]) == [True]
            assert len(await first.read("provide", ITEM)) == 1
            await _use_the_same_key(first, second, provide)
            [_, identity] = second.notices
            assert identity.kind == "identity" and "/ip4/203.0.113.9" in identity.text


async def _use_the_same_key(first: client.Dht, second: client.Dht, provide: Provide) -> None:
    """Both publish as owner 1, and the second reads what the first wrote, twice."""
    for ttl_s in (310.0, 320.0):
        assert await first.publish([provide(1, ITEM, ttl_s, "/ip4/203.0.113.9/tcp/1")]) == [True]
        await second.read("provide", ITEM)


async def test_a_taken_port_is_named(configure: Configure) -> None:
    async with open_dht(configure("a")) as first:
        listen = first.addresses[0].split("/p2p/")[0]
        with pytest.raises(NetworkError, match=rf"port {listen.split('/')[-1]} is taken.*--listen"):
            async with open_dht(configure("b", listen=(listen,))):
                pass


async def test_an_interface_this_machine_lacks_is_named(configure: Configure) -> None:
    with pytest.raises(NetworkError, match="no network interface here has that address"):
        async with open_dht(configure("a", listen=("/ip4/203.0.113.77/tcp/0",))):
            pass


async def test_wrong_addresses_are_refused_before_anything_starts(configure: Configure) -> None:
    with pytest.raises(ConfigError, match="no bootstrap address"):
        async with open_dht(configure("a", ["/ip4/127.0.0.1/tcp/5"])):
            pass
    assert not folders(configure("a")).exists()


async def test_a_request_has_a_deadline(configure: Configure, provide: Provide) -> None:
    async with open_dht(configure("a")) as first:
        info = await first.info()
        os.kill(info.worker_pid, signal.SIGSTOP)
        with pytest.raises(TransportError, match="did not answer"):
            await first.publish([provide(1, ITEM)], deadline_s=0.2)
        os.kill(info.worker_pid, signal.SIGCONT)


async def test_a_cancelled_block_leaves_nothing(configure: Configure, runs: Runs) -> None:
    with trio.CancelScope() as scope:
        async with open_dht(configure("a")) as first:
            info = await first.info()
            scope.cancel()
            await trio.sleep(600)
    assert not runs(info.worker_pid) and not runs(info.p2pd_pid)
    assert not folders(configure("a")).exists()


def test_the_client_imports_neither_hivemind_nor_torch() -> None:
    program = (
        "import sys, paris_p2p.dht.client; "
        "assert not {'hivemind', 'torch', 'libp2p'} & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def _claim(owner: int, ttl_s: float) -> SignedRecord:
    now = clock.unix()
    claim = ClaimRecord("hold", Term(1), now)
    return sign_record(Identity(owner.to_bytes(32, "big")), claim, CLAIM_SCOPE, now + ttl_s)


def _start(command: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def _line(process: "subprocess.Popen[bytes]") -> bytes:
    assert process.stdout is not None
    with trio.fail_after(60):
        line: bytes = await trio.to_thread.run_sync(process.stdout.readline)
    assert line, "the program ended without a word"
    return line


@asynccontextmanager
async def _ended(process: "subprocess.Popen[bytes]") -> AsyncIterator[None]:
    """At the end of the block: closes its stdin (the hostile peer leaves then) and waits."""
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_end, process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


async def _past(time_unix: float) -> None:
    """Wait until the wall clock, by which records expire, has passed a moment seconds ahead."""
    await trio.sleep(max(0.0, time_unix - clock.unix()) + 0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def _mute_server() -> AsyncIterator[int]:
    """Something that takes connections and says nothing; its port."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, _say_nothing, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def _say_nothing(stream: trio.SocketStream) -> None:
    async with stream:
        await trio.sleep_forever()


@asynccontextmanager
async def _http_server() -> AsyncIterator[int]:
    """Something that listens and is no libp2p node; its port."""

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(b"HTTP/1.0 400 Bad Request\r\n\r\n")

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, answer, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()
