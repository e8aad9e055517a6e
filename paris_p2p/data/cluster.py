"""Dividing the data among the experts: two-stage k-means over image features.

As in the decentralised diffusion papers (arXiv 2501.05450, section 4): k-means into many fine clusters, then
k-means of the fine centroids, weighted by their sizes, into one cluster an expert. The fine stage makes the
coarse one cheap and steady at any data size: it is fitted to a sample, and all rows are then assigned in
chunks, so features may be a memory map larger than memory.
Owns: the assignment, fine and coarse. Does not own: features, duplicates (`duplicates`), what an expert is.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paris_p2p.errors import ConfigError

MAX_FINE_CLUSTERS = 1024
IMAGES_PER_FINE_CLUSTER = 16
SAMPLE = 256 * MAX_FINE_CLUSTERS  # rows the clusters are fitted to; 1 GiB at DINOv2's 1024 features
CHUNK = 8192  # rows assigned at once
MINI_BATCH_ABOVE = 20_000  # images; below it plain k-means takes seconds
COARSE_TRIES = 32
INERTIA_SLACK = 0.10  # how much worse than the best try one may be to win by its balance
MIN_SHARE = 0.25  # of an even share: fewer images would not train an expert
MIN_IMAGES = 2  # one to train on, one held out
BALANCE_SLACK = 0.05  # a balanced cluster's capacity above an even share

Labels = NDArray[np.int64]
Features = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rows:
    """Features (N, W) as they are compared: standardised, then scaled to length 1, a chunk at a time."""

    features: Features
    mean: Features
    deviation: Features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, which: slice | Labels) -> Features:
        """Some rows: (M, W) float32."""
        rows = (np.asarray(self.features[which], np.float32) - self.mean) / self.deviation
        scaled: Features = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + np.float32(1e-12))
        return scaled

    def gathered(self, which: Labels) -> Features:
        """Many rows (M, W): no more memory than they take, and a chunk."""
        found = np.empty((len(which), self.features.shape[1]), np.float32)
        for part in _parts(len(which)):
            found[part] = self[which[part]]
        return found

    def chunks(self) -> Iterator[tuple[slice, Features]]:
        """All rows, with where they are."""
        for part in _parts(len(self)):
            yield part, self[part]


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))


def _standardised(features: Features, chosen: Labels) -> Rows:
    """All rows, by mean and deviation of the `chosen` ones, which are read a chunk at a time."""
    total = np.zeros(features.shape[1])
    for part in _parts(len(chosen)):
        total += np.asarray(features[chosen[part]], np.float32).sum(axis=0, dtype=np.float64)
    mean = total / len(chosen)
    squares = np.zeros(features.shape[1])
    for part in _parts(len(chosen)):
        squares += ((features[chosen[part]] - mean) ** 2).sum(axis=0)
    deviation = np.sqrt(squares / len(chosen)).astype(np.float32) + np.float32(1e-8)
    return Rows(features, mean.astype(np.float32), deviation)


@dataclass(frozen=True, slots=True)
class Fine:
    """The fine stage: `labels` (N,) of all `rows`, `centroids` (F, W)."""

    rows: Rows
    labels: Labels
    centroids: Features


def fine_clusters(features: Features, clusters: int, seed: int, sample: int = SAMPLE) -> Fine:
    """The fine clusters of `features` (N, W), fitted to `sample` of its rows; enough of them for `clusters`
    coarse ones. The same input gives the same labels."""
    with steady():
        chosen = _sample(len(features), sample, seed)
        rows = _standardised(features, chosen)
        count = min(MAX_FINE_CLUSTERS, max(clusters * 8, len(chosen) // IMAGES_PER_FINE_CLUSTER), len(chosen))
        centroids = _fitted(rows.gathered(chosen), count, seed)
        labels = np.empty(len(features), np.int64)
        for part, chunk in rows.chunks():
            labels[part] = _distances(chunk, centroids).argmin(axis=1)
        return Fine(rows, labels, centroids)


def coarse_clusters(
    fine: Fine, clusters: int, seed: int, *, keep: NDArray[np.bool_] | None = None, balanced: bool = False
) -> Labels:
    """The cluster of each row: (N,) in 0..clusters-1, every one of them used; -1 for rows not in `keep` (N,).

    Every cluster has at least `MIN_IMAGES` rows and `MIN_SHARE` of an even share; if `balanced` at most
    `BALANCE_SLACK` above an even share, the rows that mind least going elsewhere. Clusters are numbered by
    size, largest first. Raises `ConfigError` when there are too few images.
    """
    used = np.arange(len(fine.labels)) if keep is None else np.flatnonzero(keep)
    require_enough(len(used), clusters)
    with steady():
        sizes = np.bincount(fine.labels[used], minlength=len(fine.centroids)).astype(np.float64)
        of_fine, centres = _coarse(fine.centroids, sizes, clusters, seed)
        labels = of_fine[fine.labels[used]]
        costs = np.empty((len(used), clusters), np.float32)
        for start in range(0, len(used), CHUNK):
            part = slice(start, start + CHUNK)
            costs[part] = _distances(fine.rows[used[part]], centres)
        if balanced:
            capacity = int(np.ceil(len(used) / clusters * (1 + BALANCE_SLACK)))
            labels = with_capacity(costs, labels, capacity)
        labels = _with_minimum(costs, labels)
    whole = np.full(len(fine.labels), -1, np.int64)
    whole[used] = _largest_first(labels, clusters)
    return whole


def require_enough(images: int, clusters: int) -> None:
    """Raises `ConfigError` unless `images` can be divided into `clusters`."""
    if clusters < 1:
        raise ConfigError(f"{clusters} clusters are too few: at least 1")
    if images < clusters * MIN_IMAGES:
        raise ConfigError(
            f"more clusters than images allow: {clusters} for {images}. A cluster needs {MIN_IMAGES} images "
            "(one to train on, one held out): ask for fewer clusters, or bring more images"
        )


def with_capacity(costs: Features, labels: Labels, capacity: int) -> Labels:
    """`labels` (N,) changed so that no cluster has more than `capacity` rows. costs: (N, K), what each row
    pays in each cluster; K * capacity >= N. Of a cluster that is too full, those rows go whose next best open
    cluster costs them least more. Each round moves a row for good, so it ends; K rounds or so are usual.
    """
    labels = labels.copy()
    clusters = costs.shape[1]
    while True:
        sizes = np.bincount(labels, minlength=clusters)
        over, room = sizes - capacity, capacity - sizes
        if (over <= 0).all():
            return labels
        full = int(over.argmax())
        open_ones = np.flatnonzero(room > 0)
        members = np.flatnonzero(labels == full)
        elsewhere = costs[np.ix_(members, open_ones)]  # (M, O)
        best = elsewhere.argmin(axis=1)
        regret = elsewhere[np.arange(len(members)), best] - costs[members, full]
        leaving = np.argsort(regret, kind="stable")[: over[full]]
        for place, target in enumerate(open_ones):
            accepted = leaving[best[leaving] == place][: room[target]]
            labels[members[accepted]] = target


def _sample(count: int, sample: int, seed: int) -> Labels:
    """Indices of the rows that the clusters are fitted to, in order."""
    if count <= sample:
        return np.arange(count)
    drawn: Labels = np.sort(np.random.default_rng(seed).choice(count, sample, replace=False))
    return drawn


def _fitted(rows: Features, count: int, seed: int) -> Features:
    """Centroids (count, W) of the fine clusters."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if len(rows) > MINI_BATCH_ABOVE:
        means = MiniBatchKMeans(count, batch_size=4 * count, n_init=3, random_state=seed).fit(rows)
    else:
        means = KMeans(count, n_init=1, random_state=seed).fit(rows)
    centroids: Features = means.cluster_centers_.astype(np.float32)
    return centroids


def _distances(rows: Features, centres: Features) -> Features:
    """Squared distances (N, K), less what is the same for every centre."""
    distances: Features = (centres**2).sum(axis=1) - 2 * rows @ centres.T
    return distances


def _coarse(
    centroids: Features, sizes: NDArray[np.float64], clusters: int, seed: int
) -> tuple[Labels, Features]:
    """The coarse cluster of each fine one, and the coarse centres: of several tries about as good as the best
    (`INERTIA_SLACK`), the one that divides the images most evenly, since each expert trains as long as any
    other."""
    from sklearn.cluster import KMeans

    points = centroids.astype(np.float64)
    weights = np.maximum(sizes, 1e-9)  # a fine cluster whose images were all dropped pulls nowhere
    tries = [
        KMeans(clusters, n_init=1, random_state=seed + attempt).fit(points, sample_weight=weights)
        for attempt in range(COARSE_TRIES)
    ]
    allowed = min(one.inertia_ for one in tries) * (1 + INERTIA_SLACK) + 1e-12
    good = [one for one in tries if one.inertia_ <= allowed]
    best = max(good, key=lambda one: _entropy(np.bincount(one.labels_, sizes, clusters).astype(np.float64)))
    return best.labels_.astype(np.int64), best.cluster_centers_.astype(np.float32)


def _entropy(sizes: NDArray[np.float64]) -> float:
    """How evenly `sizes` divide their sum, in nats."""
    shares = sizes[sizes > 0] / sizes.sum()
    return float(-(shares * np.log(shares)).sum())


def _with_minimum(costs: Features, labels: Labels) -> Labels:
    """Fill clusters below the minimum with those rows of the largest one that are nearest to their centre."""
    clusters = costs.shape[1]
    minimum = max(MIN_IMAGES, int(MIN_SHARE * len(labels) / clusters))
    labels = labels.copy()
    for _ in range(len(labels)):  # a fill takes from one cluster at a time; few rounds are ever needed
        sizes = np.bincount(labels, minlength=clusters)
        poor, rich = int(sizes.argmin()), int(sizes.argmax())
        if sizes[poor] >= minimum:
            break
        donors = np.flatnonzero(labels == rich)
        nearest = np.argsort(costs[donors, poor] - costs[donors, rich], kind="stable")
        spare = max(1, (sizes[rich] - minimum) // 2)
        labels[donors[nearest[: min(minimum - sizes[poor], spare)]]] = poor
    return labels


def _largest_first(labels: Labels, clusters: int) -> Labels:
    order = np.argsort(-np.bincount(labels, minlength=clusters), kind="stable")
    number = np.empty(clusters, dtype=np.int64)
    number[order] = np.arange(clusters)
    renumbered: Labels = number[labels]
    return renumbered


@contextmanager
def steady() -> Iterator[None]:
    """One thread, for sums split over threads round differently each time; and no warning about fewer
    distinct points than clusters, which `_with_minimum` handles."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
