"""Near-duplicates: images whose features point almost the same way.

As in SemDeDup (arXiv 2303.09540): looked for within fine clusters only, so the cost grows with the images
times a fine cluster's size. Of images alike the first in the source's order is the one kept.
Owns: finding them. Does not own: the fine clusters (`cluster`), whether they are dropped (`prepare`).
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paris_p2p.data.cluster import Features, Fine, Labels, steady

COSINE = 0.98
_CHUNK = 1024


def near_duplicates(fine: Fine, cosine: float = COSINE) -> Labels:
    """For each row the one it nearly repeats, an earlier one that repeats none itself; -1 where there is
    none: (N,). Alike are two rows of one fine cluster whose cosine is at least `cosine`."""
    repeats = np.full(len(fine.labels), -1, np.int64)
    order = np.argsort(fine.labels, kind="stable")
    starts = np.flatnonzero(np.diff(fine.labels[order], prepend=-1))
    with steady():
        for members in np.split(order, starts[1:]):
            found = _within(fine.rows[members], cosine)
            repeats[members] = np.where(found < 0, -1, members[found])
    return repeats


def _within(rows: Features, cosine: float) -> Labels:
    """The same for the rows (M, W) of one fine cluster, as places in it."""
    found = np.full(len(rows), -1, np.int64)
    for start in range(0, len(rows), _CHUNK):
        alike: NDArray[np.bool_] = rows[start : start + _CHUNK] @ rows[start:].T >= cosine  # (C, M - start)
        for place in np.flatnonzero(alike.sum(axis=1) > 1):
            if found[start + place] < 0:
                later = start + place + 1 + np.flatnonzero(alike[place, place + 1 :])
                found[later[found[later] < 0]] = start + place
    return found


def listed(repeats: Labels, names: Sequence[str]) -> list[dict[str, object]]:
    """For the report: each image kept, with those that repeat it."""
    groups = defaultdict[int, list[str]](list)
    for row in np.flatnonzero(repeats >= 0):
        groups[int(repeats[row])].append(names[int(row)])
    return [{"kept": names[kept], "repeats": repeated} for kept, repeated in sorted(groups.items())]
