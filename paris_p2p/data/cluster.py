"""Dividing the data among the experts: two-stage k-means over image features.

As in the decentralised diffusion papers (arXiv 2501.05450, section 4): k-means into many fine clusters, then
k-means of the fine centroids, weighted by their sizes, into one cluster an expert. The fine stage makes the
coarse one cheap and steady at any data size.
Owns: the assignment. Does not own: the features, or what an expert is.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from paris_p2p.errors import ConfigError

MAX_FINE_CLUSTERS = 1024
IMAGES_PER_FINE_CLUSTER = 16
MINI_BATCH_ABOVE = 20_000  # images; below it plain k-means takes seconds
COARSE_TRIES = 32
INERTIA_SLACK = 0.10  # how much worse than the best try one may be to win by its balance
MIN_SHARE = 0.25  # of an even share: fewer images would not train an expert
MIN_IMAGES = 2  # one to train on, one held out

Labels = NDArray[np.int64]
Features = NDArray[np.float32]


def cluster_features(features: Features, clusters: int, seed: int) -> Labels:
    """The cluster of each row of `features` (N, W): (N,) in 0..clusters-1, every one of them used.

    Rows are compared by direction (standardised, then scaled to length 1). Every cluster has at least
    `MIN_IMAGES` rows and `MIN_SHARE` of an even share. Clusters are numbered by size, largest first. The
    same input gives the same labels. Raises `ConfigError` when there are too few images.
    """
    require_enough(len(features), clusters)
    with _steady():
        rows = _normalised(features)
        fine = min(MAX_FINE_CLUSTERS, max(clusters * 8, len(rows) // IMAGES_PER_FINE_CLUSTER), len(rows))
        fine_labels, centroids = _fine(rows, fine, seed)
        sizes = np.bincount(fine_labels, minlength=fine).astype(np.float64)
        labels = _coarse(centroids, sizes, clusters, seed)[fine_labels]
    labels = _with_minimum(rows, labels, clusters)
    return _largest_first(labels, clusters)


def require_enough(images: int, clusters: int) -> None:
    """Raises `ConfigError` unless `images` can be divided into `clusters`."""
    if clusters < 1:
        raise ConfigError(f"{clusters} clusters are too few: at least 1")
    if images < clusters * MIN_IMAGES:
        raise ConfigError(
            f"more clusters than images allow: {clusters} for {images}. A cluster needs {MIN_IMAGES} images "
            "(one to train on, one held out): ask for fewer clusters, or bring more images"
        )


def _normalised(features: Features) -> NDArray[np.float64]:
    rows = features.astype(np.float64)
    rows = (rows - rows.mean(axis=0)) / (rows.std(axis=0) + 1e-8)
    scaled: NDArray[np.float64] = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-12)
    return scaled


def _fine(rows: NDArray[np.float64], count: int, seed: int) -> tuple[Labels, NDArray[np.float64]]:
    """Labels (N,) and centroids (count, W) of the fine clusters."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if len(rows) > MINI_BATCH_ABOVE:
        means = MiniBatchKMeans(count, batch_size=4 * count, n_init=3, random_state=seed).fit(rows)
    else:
        means = KMeans(count, n_init=1, random_state=seed).fit(rows)
    return means.labels_.astype(np.int64), means.cluster_centers_


def _coarse(centroids: NDArray[np.float64], sizes: NDArray[np.float64], clusters: int, seed: int) -> Labels:
    """The coarse cluster of each fine one: of several tries about as good as the best (`INERTIA_SLACK`),
    the one that divides the images most evenly, since each expert trains as long as any other."""
    from sklearn.cluster import KMeans

    tries = [
        KMeans(clusters, n_init=1, random_state=seed + attempt).fit(centroids, sample_weight=sizes)
        for attempt in range(COARSE_TRIES)
    ]
    allowed = min(one.inertia_ for one in tries) * (1 + INERTIA_SLACK) + 1e-12
    good = [one.labels_.astype(np.int64) for one in tries if one.inertia_ <= allowed]
    return max(good, key=lambda labels: _entropy(np.bincount(labels, sizes, clusters).astype(np.float64)))


def _entropy(sizes: NDArray[np.float64]) -> float:
    """How evenly `sizes` divide their sum, in nats."""
    shares = sizes[sizes > 0] / sizes.sum()
    return float(-(shares * np.log(shares)).sum())


def _with_minimum(rows: NDArray[np.float64], labels: Labels, clusters: int) -> Labels:
    """Fill clusters below the minimum with the nearest rows of the largest one. An empty cluster, which
    duplicate images can leave, starts from the row farthest from its centroid."""
    minimum = max(MIN_IMAGES, int(MIN_SHARE * len(rows) / clusters))
    labels = labels.copy()
    for _ in range(len(rows)):  # a fill takes from one cluster at a time; few rounds are ever needed
        sizes = np.bincount(labels, minlength=clusters)
        poor, rich = int(sizes.argmin()), int(sizes.argmax())
        if sizes[poor] >= minimum:
            break
        donors = np.flatnonzero(labels == rich)
        spread = np.linalg.norm(rows[donors] - rows[donors].mean(axis=0), axis=1)
        centre = rows[labels == poor].mean(axis=0) if sizes[poor] else rows[donors[spread.argmax()]]
        nearest = np.argsort(np.linalg.norm(rows[donors] - centre, axis=1), kind="stable")
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
def _steady() -> Iterator[None]:
    """One thread, for sums split over threads round differently each time; and no warning about fewer
    distinct points than clusters, which `_with_minimum` handles."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
