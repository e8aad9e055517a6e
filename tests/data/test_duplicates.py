"""`data.duplicates`: what repeats an earlier image is found, whatever else is there."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.data.cluster import Fine, Rows, fine_clusters
from paris_p2p.data.duplicates import listed, near_duplicates


def fine(features: np.ndarray, clusters: int = 2) -> Fine:
    return fine_clusters(features.astype(np.float32), clusters, 0)


def test_copies_are_found_and_the_first_is_kept() -> None:
    features = np.random.default_rng(0).normal(size=(60, 16))
    features[40] = features[7]
    features[50] = features[7] * 1.0001
    repeats = near_duplicates(fine(features))
    assert np.flatnonzero(repeats >= 0).tolist() == [40, 50] and repeats[40] == repeats[50] == 7
    names = [str(index) for index in range(60)]
    assert listed(repeats, names) == [{"kept": "7", "repeats": ["40", "50"]}]


def test_no_duplicates_is_an_empty_report() -> None:
    repeats = near_duplicates(fine(np.random.default_rng(0).normal(size=(60, 16))))
    assert listed(repeats, []) == []


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(1, 40), st.integers(0, 50))
def test_what_is_kept_is_earlier_and_repeats_nothing(images: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(images, 3)).astype(np.float32)
    labels = rng.integers(0, 3, images)
    rows = Rows(features, np.zeros(3, np.float32), np.ones(3, np.float32))
    repeats = near_duplicates(Fine(rows, labels, np.zeros((3, 3), np.float32)), 0.9)
    again = np.flatnonzero(repeats >= 0)
    assert (repeats[again] < again).all() and (repeats[repeats[again]] == -1).all()
    assert (labels[repeats[again]] == labels[again]).all()
    alike = rows[np.arange(images)] @ rows[np.arange(images)].T >= 0.9 + 1e-6
    kept = np.flatnonzero(repeats < 0)
    pairs = (
        alike[np.ix_(kept, kept)]
        & (labels[kept][:, None] == labels[kept][None])
        & ~np.eye(len(kept), dtype=bool)
    )
    assert not pairs.any()
