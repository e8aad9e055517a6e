"""`paris-bootstrap` as a process: its addresses stay, it stops as told, it says what is wrong."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

COMMAND = [sys.executable, "-m", "paris_bootstrap", "--json"]
DEADLINE_S = 240.0


@contextmanager
def bootstrap(home: Path, *options: str) -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    """A running bootstrap node and the addresses of its first line; not running after the block."""
    command = [*COMMAND, "--home", str(home), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        first = json.loads(line or "{}")
        assert first.get("event") == "listening", line or process.stderr.read()
        yield process, first["addresses"]
    finally:
        process.kill()
        process.communicate()


def run(home: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, "--home", str(home), *options],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.fixture
def runs() -> Callable[[list[psutil.Process]], bool]:
    """Whether any of the processes still runs when it has had time to end."""

    def check(processes: list[psutil.Process]) -> bool:
        return bool(psutil.wait_procs(processes, timeout=DEADLINE_S)[1])

    return check


def test_it_keeps_its_address_and_ends_as_the_signal_says(
    tmp_path: Path, runs: Callable[[list[psutil.Process]], bool]
) -> None:
    with bootstrap(tmp_path, "--listen", "/ip4/127.0.0.1/tcp/0") as (process, [address]):
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 2  # the DHT worker and p2pd
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0 and not runs(children)
    listen = address.split("/p2p/")[0]
    with bootstrap(tmp_path, "--listen", listen) as (process, addresses):
        assert addresses == [address]
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["bootstrap.key"]


def test_every_interface_is_named_when_it_listens_on_all(tmp_path: Path) -> None:
    with bootstrap(tmp_path, "--listen", "/ip4/0.0.0.0/tcp/0") as (_, addresses):
        hosts = [address.split("/")[2] for address in addresses]
    assert "127.0.0.1" in hosts and "0.0.0.0" not in hosts


def test_its_daemon_killed_comes_back_on_the_same_port(tmp_path: Path) -> None:
    with bootstrap(tmp_path, "--listen", "/ip4/127.0.0.1/tcp/0") as (process, [address]):
        whole = psutil.Process(process.pid)
        [daemon] = [child for child in whole.children(recursive=True) if child.name() == "p2pd"]
        daemon.kill()
        port = int(address.split("/")[4])
        end = time.monotonic() + DEADLINE_S  # noqa: TID251 - the test's own deadline
        while port not in _ports(whole, but=daemon.pid):
            assert time.monotonic() < end, "it did not come back"  # noqa: TID251
            time.sleep(0.05)


def test_two_of_one_home_are_refused(tmp_path: Path) -> None:
    with bootstrap(tmp_path, "--listen", "/ip4/127.0.0.1/tcp/0"):
        done = run(tmp_path, "--listen", "/ip4/127.0.0.1/tcp/0")
    assert done.returncode == 2 and "another paris-bootstrap uses" in done.stderr


def test_it_starts_without_the_other_bootstrap_nodes(tmp_path: Path) -> None:
    gone = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWMbbPVGsZYh3ChQjue712NHHGNybRRXwnuSpezYjGbCDS"
    options = ["--listen", "/ip4/127.0.0.1/tcp/0", "--bootstrap", gone]
    with bootstrap(tmp_path, *options) as (process, addresses):
        assert len(addresses) == 1 and process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert (said["event"], said["kind"], said["subject"]) == ("network", "bootstrap", gone)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--listen", "0.0.0.0:31337"], 2, "no listen address"),
        (["--announce", "/ip4/1.2.3.4/tcp/0"], 2, "cannot be announced"),
        (["--listen", "/ip4/203.0.113.77/tcp/0"], 3, "no network interface here"),
        (["--bootstrap", "nonsense"], 2, "no bootstrap address"),
    ],
)
def test_what_is_wrong_is_said_with_the_right_exit_code(
    tmp_path: Path, options: list[str], code: int, said: str
) -> None:
    done = run(tmp_path, *options)
    assert done.returncode == code and said in done.stderr and not done.stdout


def test_its_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom paris_bootstrap.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'hivemind', 'libp2p'} & {name.split('.')[0] for name in sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--announce" in done.stdout


def _ports(process: psutil.Process, but: int) -> set[int]:
    """The TCP ports that the process's children listen on, without child `but`."""
    ports: set[int] = set()
    for child in process.children(recursive=True):
        try:
            connections = child.net_connections("tcp") if child.pid != but else []
        except psutil.NoSuchProcess:
            continue
        ports |= {found.laddr.port for found in connections if found.status == psutil.CONN_LISTEN}
    return ports
