"""What is said about a prepared run: the report of `prepare`, its file, the example prompts.

Owns: `PrepareReport`, `prepare.json`. Does not own: doing it (`prepare`).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from paris_p2p.data.duplicates import COSINE
from paris_p2p.data.sources import Skipped
from paris_p2p.ids import RunId

MAX_EXAMPLES = 10
MAX_EXAMPLE_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """One cluster: `images` in all, `heldout_images` of them held out; the `words` that set it apart; the
    `variants` its expert may be, where those are not all of the run's."""

    index: int
    images: int
    heldout_images: int
    words: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Near-duplicates: `images` that repeat an earlier one, in `groups` (kept, repeats); `dropped`?"""

    images: int
    dropped: bool
    groups: tuple[dict[str, object], ...]


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What was made. `reused`: the stages found finished; `seconds`: how long each stage took; `initial`: a
    sentence on what each variant of expert starts from, where that is not chance."""

    run_id: RunId
    manifest: Path
    clusters: tuple[ClusterReport, ...]
    skipped: tuple[Skipped, ...]
    reused: tuple[str, ...]
    seconds: dict[str, float]
    duplicates: Duplicates
    initial: tuple[str, ...] = ()


def report_json(report: PrepareReport) -> bytes:
    """`prepare.json`."""
    found = report.duplicates
    plain = {
        "run_id": report.run_id.hex(),
        "clusters": [
            {
                "id": one.index,
                "images": one.images,
                "heldout_images": one.heldout_images,
                "words": list(one.words),
                **({"variants": list(one.variants)} if one.variants else {}),
            }
            for one in report.clusters
        ],
        "skipped": [asdict(one) for one in report.skipped],
        "duplicates": {
            "cosine": COSINE,
            "images": found.images,
            "dropped": found.dropped,
            "groups": list(found.groups),
        },
        "reused": list(report.reused),
        "seconds": report.seconds,
        "initial": list(report.initial),
    }
    return (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()


def example_prompts(captions: Sequence[str], seed: int) -> tuple[str, ...]:
    """At most ten captions to show newcomers: all of them, in order of appearance, when there are no more;
    else the most frequent, equally frequent ones drawn by a hash."""
    counts = Counter(caption for caption in captions if len(caption) <= MAX_EXAMPLE_CHARACTERS)
    if len(counts) <= MAX_EXAMPLES:
        return tuple(counts)

    def rank(caption: str) -> tuple[int, bytes]:
        return -counts[caption], hashlib.sha256(f"{seed}\0{caption}".encode()).digest()

    return tuple(sorted(counts, key=rank)[:MAX_EXAMPLES])
