"""Frames from a stranger: a million of them through decoder and session, none may crash, hang or fill memory.

    python benchmarks/fuzz_frames.py --frames 1000000 --seed 1

Of a hundred frames 96 are legal messages in an order that no honest peer would choose (a session dies of the
first broken one, so that more of those would test little else), two have a bit changed, one is noise and one
cut short; all are fed in chunks of any size, by `feed` and by `buffer`/`filled`. Allowed outcomes: events,
`RemoteProtocolError` (the session is then thrown away and a new one begun). Anything else ends the run, as do
64 MiB of memory; a batch that takes longer than a second ends it with 1. The last line is JSON.

Owns: making the frames and watching time and memory. Does not own: what is legal (`core.session`).
"""

import argparse
import json
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from paris_p2p.core.session import Limits, Session, State
from paris_p2p.errors import RemoteProtocolError
from paris_p2p.ids import FileIndex, InfoHash, PieceIndex
from paris_p2p.wire import messages as m

ITEM = InfoHash(bytes(range(32)))
MAX_MEMORY_BYTES = 64 << 20
MAX_FRAME_S = 1.0
BATCH = 5


@dataclass
class Report:
    """What became of the frames. `slowest_s`: the longest that one batch took."""

    frames: int = 0
    events: int = 0
    violations: int = 0
    sessions: int = 0
    slowest_s: float = 0.0
    peak_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


def span(rng: random.Random) -> tuple[PieceIndex, int, int]:
    """A request's piece, offset and length; often the one that `fresh` has asked for."""
    piece = PieceIndex(rng.choice((0, 1, 2, m.MAX_PIECES - 1)))
    return piece, rng.choice((0, 16384)), rng.choice((1, 16384))


def legal(rng: random.Random) -> bytes:
    """A well-formed frame of any kind."""
    piece, offset, length = span(rng)
    common: tuple[Callable[[], bytes], ...] = (
        lambda: m.encode(m.Have(piece)),
        lambda: m.encode(rng.choice((m.Interested, m.NotInterested, m.Choke, m.Unchoke, m.KeepAlive))()),
        lambda: m.encode(rng.choice((m.Request, m.Cancel, m.Reject))(piece, offset, length)),
        lambda: m.encode(m.Peers((m.PeerAddress(rng.randbytes(32), ("/ip4/1.2.3.4/tcp/1",)),), ())),
    )
    rare: tuple[Callable[[], bytes], ...] = (  # most of these break the books before long
        lambda: m.encode_block(m.Block(piece, offset, bytes(length))),
        lambda: m.encode(m.Bitfield(rng.randbytes(rng.choice((0, 1, 5, 4000))))),
        lambda: m.encode(m.InfoRequest(offset)),
        lambda: m.encode(m.LayerRequest(FileIndex(0), offset)),
        lambda: m.encode(m.Info(0, length, bytes(length))),
        lambda: m.encode(m.Layer(FileIndex(0), 0, length, bytes(length))),
        lambda: m.encode(m.Hello(1, ITEM, (), m.MIN_BLOCK_BYTES, 1, ())),
        lambda: m.encode(m.Bye(rng.randrange(256), "bye")),
    )
    return rng.choice(common if rng.random() < 0.9 else rare)()


def frame(rng: random.Random) -> bytes:
    """Legal, slightly wrong, or noise."""
    kind = rng.random()
    data = legal(rng)
    if kind < 0.96:
        return data
    if kind < 0.98:
        spoilt = bytearray(data)
        spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
        return bytes(spoilt)
    return rng.randbytes(rng.choice((1, 5, 9, 100))) if kind < 0.99 else data[: rng.randrange(len(data))]


def fresh(now: float) -> Session:
    """An open session that has asked for a few blocks and chunks, so that answers are legal."""
    session = Session(now, Limits(max_block=1 << 18))
    session.hello(ITEM, (m.IGNORE_UNKNOWN,), ())
    session.receive(m.encode(m.Hello(1, ITEM, (), m.MIN_BLOCK_BYTES, 64, ())), now)
    session.receive(m.encode(m.Bitfield(b"\xff")) + m.encode(m.Unchoke()), now)
    for piece in range(3):
        session.request(PieceIndex(piece), 0, 16384, now)
        session.request(PieceIndex(piece), 16384, 1, now)
    session.info_request(0, now)
    session.layer_request(FileIndex(0), 0, now)
    return session


def deliver(session: Session, data: bytes, now: float, rng: random.Random, report: Report) -> None:
    """Feeds `data` in chunks of any size, either way."""
    at = 0
    in_place = rng.random() < 0.5
    while at < len(data) and session.state is not State.CLOSED:
        if in_place:
            room = session.buffer()
            count = min(len(room), len(data) - at, rng.choice((1, 100, 100_000)))
            room[:count] = data[at : at + count]
            session.filled(count, now)
        else:
            count = min(len(data) - at, rng.choice((1, 7, 1000, 1 << 20)))
            session.feed(data[at : at + count], now)
        at += count
        while session.next_event(now) is not None:
            report.events += 1


def resident() -> int:
    """The most memory this process has used so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(frames: int, seed: int) -> Report:
    """Runs `frames` frames. Raises whatever is no `RemoteProtocolError`, and `MemoryError` above the bar."""
    rng, report, now = random.Random(seed), Report(), 0.0
    before = resident()
    session = fresh(now)
    while report.frames < frames:
        data = b"".join(frame(rng) for _ in range(BATCH))
        now += 0.01
        begun = time.perf_counter()
        try:
            deliver(session, data, now, rng, report)
            session.tick(now)
        except RemoteProtocolError as error:
            report.violations += 1
            report.reasons[str(error).split(":")[0][:40]] += 1
        report.slowest_s = max(report.slowest_s, time.perf_counter() - begun)
        if session.state is State.CLOSED or rng.random() < 0.05:
            session = fresh(now)
            report.sessions += 1
        report.frames += BATCH
    report.peak_bytes = resident() - before
    if report.peak_bytes > MAX_MEMORY_BYTES:
        raise MemoryError(f"{report.peak_bytes} bytes were used, at most {MAX_MEMORY_BYTES} are allowed")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    begun = time.perf_counter()
    report = fuzz(options.frames, options.seed)
    print(report.reasons.most_common(12))
    result = {
        "benchmark": "fuzz_frames",
        "frames": report.frames,
        "events": report.events,
        "violations": report.violations,
        "sessions": report.sessions,
        "slowest_batch_s": round(report.slowest_s, 3),
        "hung": report.slowest_s > MAX_FRAME_S,
        "peak_mb": round(report.peak_bytes / 1e6, 1),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    print(json.dumps(result))
    sys.exit(1 if result["hung"] else 0)


if __name__ == "__main__":
    main()
