"""What a crash costs the next start: `begin` of a half-fetched item, with and without its journal.

    python benchmarks/store_resume.py --mib 1024 --rounds 3

A child writes all pieces but the last at 200 MB/s, flushing as a fetch does, and is killed in the middle
(SIGKILL). Then the item is begun again, in a fresh process: as the crash left it; without the journal (then
everything is hashed); and after a clean close. Another child writes the same without flushing: what the
journal costs. The files are in memory by then: from a disk hashing is slower, the journal is not.
The last line is JSON: seconds, and how many pieces were hashed.

Owns: that measurement. Does not own: when a fetch flushes (`core.flushing`).
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lab.content import MIB, make_content, work_folder
from benchmarks.lab.noise import Load, spread
from paris_p2p import clock
from paris_p2p.core.flushing import FlushPace
from paris_p2p.store import partial as partial_module
from paris_p2p.store.content_store import ContentStore
from paris_p2p.store.partial import PartialItem
from paris_p2p.wire.bep52 import Buffer, Layout, check_piece

LOOK_S = 1.0
BYTES_PER_S = 200e6
MODES = ("journal", "none", "closed")


def write(source: Path, target: Path, flush: bool) -> None:
    """Fetch all pieces but one into `target`, print how late the latest piece was, and die."""
    held, store = ContentStore(source), ContentStore(target)
    (ref,) = held.complete()
    stored, item = held.open(ref.info_hash), store.begin(ref)
    item.set_info(stored.info)
    for index in item.missing_layers():
        item.set_layer(index, stored.layer(index))
    flushes: list[float] = []
    if flush:
        threading.Thread(target=flush_now_and_then, args=(item, flushes), daemon=True).start()
    began, late = clock.monotonic(), 0.0
    for piece in range(stored.layout.pieces - 1):
        time.sleep(max(0.0, began + piece * ref.piece_length / BYTES_PER_S - clock.monotonic()))
        length = stored.layout.piece_span(piece)[2]
        assert item.write_piece(piece, stored.read_block(piece, 0, length))
        late = max(late, clock.monotonic() - began - (piece + 1) * ref.piece_length / BYTES_PER_S)
    print(json.dumps({"late": late, "flushes": len(flushes), "doubt_mib": item.unflushed_bytes / MIB}))
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def flush_now_and_then(item: PartialItem, took: list[float]) -> None:
    """As a fetch does."""
    pace = FlushPace()
    while True:
        time.sleep(LOOK_S)
        began = clock.monotonic()
        if pace.due(item.unflushed_bytes, began):
            item.flush()
            pace.flushed(began, clock.monotonic())
            took.append(clock.monotonic() - began)


def begin(target: Path, close: bool) -> None:
    """Begin the item again, print the seconds and the pieces hashed."""
    hashed = 0

    def counted(layout: Layout, piece: int, data: Buffer, layer: bytes | None) -> bool:
        nonlocal hashed
        hashed += 1
        return check_piece(layout, piece, data, layer)

    vars(partial_module)["check_piece"] = counted
    store = ContentStore(target)
    (ref,) = store.partial()
    began = clock.monotonic()
    item = store.begin(ref)
    seconds = clock.monotonic() - began
    here = int.from_bytes(item.bitfield(), "big").bit_count()
    if close:
        item.close()
    print(json.dumps({"seconds": seconds, "hashed": hashed, "here": here}))


def child(*words: str) -> dict[str, float]:
    """What this program prints when it is run with `words`."""
    argv = [sys.executable, __file__, *words]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(folder: Path, source: Path, rounds: int) -> dict[str, object]:
    """All modes, taking turns."""
    writes: dict[str, list[dict[str, float]]] = {"flushing": [], "not_flushing": []}
    begins: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for name, found in writes.items():
            shutil.rmtree(folder / "target", ignore_errors=True)
            os.sync()
            found.append(child("--write", str(source), "--into", str(folder / "target"), "--" + name))
            if name == "not_flushing":
                begins["none"].append(child("--begin", str(folder / "target")))
            else:
                begins["journal"].append(child("--begin", str(folder / "target"), "--close"))
                begins["closed"].append(child("--begin", str(folder / "target")))
    return {
        **{f"{n}_latest_s": spread([one["late"] for one in found]) for n, found in writes.items()},
        "flushes": spread([one["flushes"] for one in writes["flushing"]]),
        "in_doubt_mib": spread([one["doubt_mib"] for one in writes["flushing"]]),
        **{f"begin_{mode}_s": spread([one["seconds"] for one in begins[mode]]) for mode in MODES},
        **{f"hashed_{mode}": spread([one["hashed"] for one in begins[mode]]) for mode in MODES},
        "lost_pieces": max(one["here"] for found in begins.values() for one in found)
        - min(one["here"] for found in begins.values() for one in found),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; the last line on stdout is JSON."""
    parser = argparse.ArgumentParser(description="what a crash costs the next start")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--flushing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--not_flushing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--close", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.write is not None:
        write(given.write, given.into, given.flushing)
    elif given.begin is not None:
        begin(given.begin, given.close)
    else:
        with work_folder() as folder, Load() as load:
            content = make_content(folder / "content.bin", given.mib * MIB, MIB)
            ContentStore(folder / "source").add(content.path, piece_length=MIB)
            found = measure(folder, folder / "source", given.rounds)
        busy = {"busy_cores": round(load.others(0), 2)}
        print(json.dumps({"benchmark": "store_resume", "mib": given.mib, **busy, **found}))


if __name__ == "__main__":
    main()
