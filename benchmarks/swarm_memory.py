"""Resident memory of a leecher that fetches a big file over loopback (bar: 250 MB for 2 GiB).

    python benchmarks/swarm_memory.py --mib 2048

The last line is JSON. The peak is the kernel's own (`ru_maxrss`); `private_mb` leaves out mapped files.

Owns: that measurement. Does not own: speed (`swarm_loopback.py`).
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lab.children import Child, Children, children, end_on_signals
from benchmarks.lab.content import MIB, make_content, sha256_of, work_folder
from benchmarks.lab.local import start_leecher, start_seeder
from benchmarks.lab.noise import Load

SAMPLE_S = 0.1


def private_bytes(child: Child) -> int:
    """Anonymous resident memory of a running child; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")]
    return found[0] if found else 0


def peak_private(child: Child, timeout_s: float) -> int:
    """Watches a child to its end. Raises `TimeoutError`."""
    peak, left = 0, timeout_s
    while child.poll() is None:
        peak = max(peak, private_bytes(child))
        time.sleep(SAMPLE_S)
        left -= SAMPLE_S
        if left < 0:
            raise TimeoutError(f"not fetched within {timeout_s:.0f} s")
    return peak


def measure(kids: Children, folder: Path, mib: int, piece_length: int, timeout_s: float) -> dict[str, object]:
    """Seed, fetch, look."""
    content = make_content(folder / "source" / "content.bin", mib * MIB, piece_length)
    seeder, info_hash, addresses = start_seeder(kids, content, folder)
    leech_folder = folder / "leecher"
    leech_folder.mkdir()
    with Load() as load:
        leecher = start_leecher(kids, info_hash, addresses, leech_folder)
        private = peak_private(leecher, timeout_s)
    fetched = leecher.last_event("fetched")
    if leecher.rc != 0 or fetched is None:
        raise RuntimeError(f"the leecher ended with {leecher.rc}: {leecher.errors()}")
    seeder.stop()
    path = Path(fetched["path"])
    path = path if path.is_file() else path / content.path.name
    return {
        "leecher_rss_mb": round(leecher.max_rss_bytes / 1e6, 1),
        "leecher_private_mb": round(private / 1e6, 1),
        "seeder_rss_mb": round(seeder.max_rss_bytes / 1e6, 1),
        "seconds": round(float(fetched["seconds"]), 1),
        "wrong": sha256_of(path) != content.sha256,
        "others": round(load.others(leecher.cpu_s + seeder.cpu_s), 2),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; the last line on stdout is JSON."""
    parser = argparse.ArgumentParser(description="resident memory of a leecher")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--piece-kib", type=int, default=1024)
    parser.add_argument("--timeout-s", type=float, default=900)
    given = parser.parse_args(argv)
    end_on_signals()
    with work_folder() as folder, children() as kids:
        found = measure(kids, folder, given.mib, given.piece_kib << 10, given.timeout_s)
    print(json.dumps({"benchmark": "swarm_memory", "mib": given.mib, "piece_kib": given.piece_kib, **found}))


if __name__ == "__main__":
    main()
