"""One machine, loopback: seeders and one leecher as processes of their own; this package, libtorrent.

    python benchmarks/swarm_loopback.py --mib 512 --runs 3 --seeds 1,3

The last line is JSON. Seconds run from starting the leecher's process until it says that the file is complete
and verified; CPU time is user + system of all processes of a run, start-up included, from `wait4`. What is
done once for a file is done before and not counted: hashing it (the `.torrent`, and `paris-node seed`'s note
of it). The clients take turns, so that what else runs on the machine hits all alike; every output is compared
with the source. libtorrent is measured when it is installed.

Owns: the measurement. Does not own: the programs measured.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from paris_p2p.clock import monotonic

PIECE_BYTES = 1 << 20
READY_S = 60.0
LEECH_S = 300.0
STOP_S = 15.0
PORT = 26881  # of the first seeder of the clients that cannot say which port they got
GB = 1e9

LIBTORRENT = """
import libtorrent as lt, signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
role, torrent, folder, listen, *peers = sys.argv[1:]
session = lt.session({"listen_interfaces": listen, "enable_dht": False, "enable_lsd": False,
    "enable_upnp": False, "enable_natpmp": False, "enable_incoming_utp": False, "enable_outgoing_utp": False,
    "outgoing_interfaces": listen.rsplit(":", 1)[0], "alert_mask": lt.alert.category_t.status_notification})
params = lt.add_torrent_params()
params.ti = lt.torrent_info(torrent)
params.save_path = folder
params.flags &= ~(lt.torrent_flags.paused | lt.torrent_flags.auto_managed)
if role == "seed":
    params.flags |= lt.torrent_flags.seed_mode
handle = session.add_torrent(params)
if role == "seed":
    print("ready", flush=True)
again = 0.0
while role == "leech" and not handle.status().is_seeding:
    if time.monotonic() > again and handle.status().num_peers < len(peers):
        for peer in peers:
            handle.connect_peer((peer.rsplit(":", 1)[0], int(peer.rsplit(":", 1)[1])))
        again = time.monotonic() + 1
    session.wait_for_alert(100)
    session.pop_alerts()
print("done", flush=True)
signal.sigwait({signal.SIGTERM})
session.pause()
del handle, session  # waits for what is still to be written
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One transfer. `rss_mb`: the leecher's largest resident set."""

    client: str
    seeds: int
    mb_per_s: float
    cpu_s_per_gb: float
    leech_cpu_s_per_gb: float
    rss_mb: float
    good: bool


class Process:
    """A child whose standard output is read by lines, and whose use of the CPU is known at its end."""

    def __init__(self, argv: Sequence[str | Path], env: dict[str, str], log: Path) -> None:
        self.started = monotonic()
        self.cpu_s = 0.0
        self.rss_mb = 0.0
        self._log = log
        with log.open("ab") as errors:
            self._child = subprocess.Popen(
                list(map(str, argv)), stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, env=env
            )

    def line(self, wanted: Callable[[str], bool], timeout_s: float) -> str:
        """The next line that is `wanted`. Raises `RuntimeError` when it does not come."""
        assert self._child.stdout is not None
        killer = threading.Timer(timeout_s, self._child.kill)
        killer.start()
        try:
            for raw in self._child.stdout:
                text = raw.decode(errors="replace").strip()
                if wanted(text):
                    return text
        finally:
            killer.cancel()
        raise RuntimeError(f"a program ended early: {self._log.read_text()[-2000:]}")

    def stop(self) -> "Process":
        """Ends it, and reads what it used; a second call does nothing."""
        if self._child.returncode is not None:
            return self
        killer = threading.Timer(STOP_S, self._child.kill)
        killer.start()
        self._child.send_signal(signal.SIGTERM)
        _, status, usage = os.wait4(self._child.pid, 0)
        killer.cancel()
        self._child.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_s = usage.ru_utime + usage.ru_stime
        self.rss_mb = usage.ru_maxrss / 1024
        if self._child.stdout is not None:
            self._child.stdout.close()
        return self


class Bench:
    """The folder of one benchmark, with the file, its torrents, and the seeders' homes."""

    def __init__(self, root: Path, mib: int, seeds: int) -> None:
        self.root = root
        self.log = root / "log"
        self.source = root / "source" / "model.safetensors"
        self.source.parent.mkdir()
        self.digest = _random_file(self.source, mib)
        self.size = mib << 20
        # modules are compiled once, as they are for everybody who does not forbid it
        self.env = {**os.environ, "PYTHONPYCACHEPREFIX": str(root / "compiled")}
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)
        self.torrents: dict[str, Path] = {}
        self.homes = [root / f"home{number}" for number in range(seeds)]

    def transfer(self, client: str, seeds: int) -> Run:
        """One file from `seeds` seeders to one leecher."""
        out = self.root / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(self.root / "leech", ignore_errors=True)
        out.mkdir()
        os.sync()
        with ExitStack() as stack:
            seeders: list[Process] = []
            peers: list[str] = []
            for number in range(seeds):
                argv, ready = self._seed(client, number)
                seeder = Process(argv, self.env, self.log)
                stack.callback(seeder.stop)
                seeders.append(seeder)
                peers.append(self._address(client, number, seeder.line(ready, READY_S)))
            argv, done = self._leech(client, out, peers)
            leecher = Process(argv, self.env, self.log)
            stack.callback(leecher.stop)
            leecher.line(done, LEECH_S)
            seconds = monotonic() - leecher.started
            leecher.stop()
            cpu_s = leecher.cpu_s + sum(seeder.stop().cpu_s for seeder in seeders)
        return Run(
            client,
            seeds,
            round(self.size / 1e6 / seconds, 1),
            round(cpu_s / self.size * GB, 2),
            round(leecher.cpu_s / self.size * GB, 2),
            round(leecher.rss_mb, 1),
            _digest(out / self.source.name) == self.digest,
        )

    def _seed(self, client: str, number: int) -> tuple[list[str | Path], Callable[[str], bool]]:
        """Command line, and the line that says that it is ready."""
        if client == "paris":
            return [
                *(sys.executable, "-m", "paris_node", "seed", self.source, "--home", self.homes[number]),
                *("--piece-length", str(PIECE_BYTES), "--listen", f"/ip4/127.0.0.{2 + number}/tcp/0/tls"),
                "--json",
            ], lambda line: '"seeding"' in line
        torrent, folder = self.torrents["v2"], self.source.parent
        seed: list[str | Path] = [sys.executable, "-c", LIBTORRENT, "seed", torrent, folder]
        return [*seed, f"127.0.0.{2 + number}:{PORT}"], lambda line: line == "ready"

    def _address(self, client: str, number: int, line: str) -> str:
        if client == "paris":
            return str(json.loads(line)["addresses"][0])
        return f"127.0.0.{2 + number}:{PORT}"

    def _leech(
        self, client: str, out: Path, peers: Sequence[str]
    ) -> tuple[list[str | Path], Callable[[str], bool]]:
        """Command line, and the line that says that all is there."""
        if client == "paris":
            get: list[str | Path] = [sys.executable, "-m", "paris_node", "get", self.torrents["v2"]]
            get += ["--out", out, "--home", self.root / "leech", "--json"]
            get += ["--listen", "/ip4/127.0.0.1/tcp/0/tls"]
            return get + [
                part for peer in peers for part in ("--peer", peer)
            ], lambda line: '"fetched"' in line
        leech: list[str | Path] = [sys.executable, "-c", LIBTORRENT, "leech", self.torrents["v2"], out]
        return [*leech, "127.0.0.100:26900", *peers], lambda line: line == "done"

    def prepare(self) -> None:
        """What is done once for a file: torrents, our seeders' notes of it, compiled modules."""
        for number in range(len(self.homes)):
            argv, ready = self._seed("paris", number)
            seeder = Process(argv, self.env, self.log)
            try:
                seeder.line(ready, READY_S)
            finally:
                seeder.stop()
        self.torrents["v2"] = self.root / "v2.torrent"
        export = [sys.executable, "-m", "paris_node", "export-torrent", str(self.source), "--out"]
        more = ["--home", str(self.homes[0]), "--piece-length", str(PIECE_BYTES)]
        subprocess.run(
            [*export, str(self.torrents["v2"]), *more], env=self.env, check=True, stdout=sys.stderr
        )


def _random_file(path: Path, mib: int) -> str:
    """Makes an incompressible file; its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(mib):
            data = os.urandom(1 << 20)
            digest.update(data)
            file.write(data)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def summary(runs: Sequence[Run]) -> dict[str, object]:
    """Medians of one client with one number of seeders, and the spread of what is judged."""
    rates, cpu = [run.mb_per_s for run in runs], [run.cpu_s_per_gb for run in runs]
    return {
        "client": runs[0].client,
        "seeds": runs[0].seeds,
        "runs": len(runs),
        "mb_per_s": statistics.median(rates),
        "mb_per_s_spread": [min(rates), max(rates)],
        "cpu_s_per_gb": statistics.median(cpu),
        "cpu_s_per_gb_spread": [min(cpu), max(cpu)],
        "leech_cpu_s_per_gb": statistics.median(run.leech_cpu_s_per_gb for run in runs),
        "leech_rss_mb": max(run.rss_mb for run in runs),
        "good": all(run.good for run in runs),
    }


def ratios(runs: Sequence[Run], seeds: int) -> dict[str, list[float]]:
    """Ours to libtorrent's, turn by turn: [smallest, median, largest]."""
    ours = [run for run in runs if run.client == "paris" and run.seeds == seeds]
    theirs = [run for run in runs if run.client == "libtorrent" and run.seeds == seeds]
    speed = [mine.mb_per_s / other.mb_per_s for mine, other in zip(ours, theirs, strict=False)]
    cpu = [mine.cpu_s_per_gb / other.cpu_s_per_gb for mine, other in zip(ours, theirs, strict=False)]
    return {
        name: [round(value, 2) for value in (min(values), statistics.median(values), max(values))]
        for name, values in (("mb_per_s", speed), ("cpu_s_per_gb", cpu))
        if values
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seeds", default="1,3", help="numbers of seeders, separated by commas")
    parser.add_argument("--clients", default="paris,libtorrent", help="those that are not there are left out")
    parser.add_argument("--folder", type=Path, default=None, help="where to work: on a disk, not in memory")
    options = parser.parse_args()
    counts = [int(text) for text in options.seeds.split(",")]
    clients = [client for client in options.clients.split(",") if _installed(client)]
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="swarm-loopback-", dir=options.folder or "/var/tmp") as folder:
        bench = Bench(Path(folder), options.mib, max(counts))
        bench.prepare()
        for number in range(options.runs):
            for seeds in counts:
                for client in clients:
                    runs.append(bench.transfer(client, seeds))
                    print(f"run {number}", runs[-1], file=sys.stderr, flush=True)
    results = [
        summary([run for run in runs if (run.client, run.seeds) == (client, seeds)])
        for client in clients
        for seeds in counts
    ]
    result = {
        "bench": "swarm_loopback",
        "mib": options.mib,
        "results": results,
        "paris_to_libtorrent": {str(seeds): ratios(runs, seeds) for seeds in counts},
        "every": [asdict(run) for run in runs],
    }
    print(json.dumps(result))


def _installed(client: str) -> bool:
    if client == "libtorrent":
        return importlib.util.find_spec("libtorrent") is not None
    return client == "paris"


if __name__ == "__main__":
    main()
