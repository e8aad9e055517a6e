"""How good generated images are, as numbers over features: pure functions of arrays.

Owns: Frechet distance, precision and recall. Does not own: features (`features`), sampling, reports.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

Features = NDArray[np.float64]
_ROWS_AT_ONCE = 1024


def frechet_distance(real: Features, fake: Features) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features, (N, D) and (M, D), as Gaussians
    (Heusel et al. 2017). Raises `ValueError` for fewer than two rows.

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is
    symmetric: no complex numbers come in, as they do with a general matrix root.
    """
    if min(len(real), len(fake)) < 2:
        raise ValueError("a covariance needs at least two images")
    gap = real.mean(axis=0) - fake.mean(axis=0)
    first, second = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ second @ root)
    trace = np.trace(first) + np.trace(second) - 2 * np.sqrt(shared.clip(min=0)).sum()
    return float(max(gap @ gap + trace, 0.0))


def precision_recall(real: Features, fake: Features, neighbours: int = 3) -> tuple[float, float]:
    """The share of fake images within the real ones' manifold, and of real ones within the fake ones'
    (Kynkaanniemi et al. 2019). A manifold: balls around its points up to their k-th nearest neighbour.

    (N, D) and (M, D) with N, M > `neighbours`, else `ValueError`.
    """
    if min(len(real), len(fake)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} images on both sides")
    return _covered(real, fake, neighbours), _covered(fake, real, neighbours)


def _covered(manifold: Features, points: Features, neighbours: int) -> float:
    """The share of `points` that lie in one of the manifold's balls."""
    radii = np.concatenate(
        [
            # the nearest of each is itself
            np.partition(cdist(manifold[start : start + _ROWS_AT_ONCE], manifold), neighbours)[:, neighbours]
            for start in range(0, len(manifold), _ROWS_AT_ONCE)
        ]
    )
    inside = [
        (cdist(points[start : start + _ROWS_AT_ONCE], manifold) <= radii).any(axis=1)
        for start in range(0, len(points), _ROWS_AT_ONCE)
    ]
    return float(np.concatenate(inside).mean())
