"""`data.cluster`: every cluster gets its images, the same ones each time."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_p2p.data import cluster
from paris_p2p.data.cluster import (
    BALANCE_SLACK,
    MIN_IMAGES,
    MIN_SHARE,
    Features,
    Labels,
    coarse_clusters,
    fine_clusters,
    require_enough,
    with_capacity,
)
from paris_p2p.errors import ConfigError


def clumps(sizes: list[int], seed: int = 0) -> Features:
    """Points around as many random directions as there are sizes."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(sizes), 16))
    rows = [centre + 0.05 * rng.normal(size=(size, 16)) for centre, size in zip(centres, sizes, strict=True)]
    return np.concatenate(rows).astype(np.float32)


def cluster_features(features: Features, clusters: int, seed: int, *, balanced: bool = False) -> Labels:
    """Both stages, as `data.prepare` does them."""
    require_enough(len(features), clusters)
    return coarse_clusters(fine_clusters(features, clusters, seed), clusters, seed, balanced=balanced)


def test_clumps_are_found_and_numbered_by_size() -> None:
    labels = cluster_features(clumps([60, 100, 80]), 3, 0)
    assert np.bincount(labels).tolist() == [100, 80, 60]
    assert all(len(set(labels[part].tolist())) == 1 for part in (slice(60), slice(60, 160), slice(160, 240)))


def test_the_same_seed_gives_the_same_clusters() -> None:
    features = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    assert np.array_equal(cluster_features(features, 5, 3), cluster_features(features, 5, 3))


def test_a_lopsided_division_is_evened_out_to_the_minimum() -> None:
    sizes = np.bincount(cluster_features(clumps([990, 5, 5]), 3, 0), minlength=3)
    assert sizes.min() >= int(MIN_SHARE * 1000 / 3)


def test_of_equally_good_divisions_the_even_one_is_taken() -> None:
    sizes = np.bincount(cluster_features(clumps([50] * 8), 4, 0), minlength=4)
    assert sizes.max() <= 150


def test_identical_images_still_fill_every_cluster() -> None:
    sizes = np.bincount(cluster_features(np.ones((40, 4), np.float32), 4, 0), minlength=4)
    assert sizes.min() >= MIN_IMAGES


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.integers(2, 40), st.integers(1, 20), st.integers(1, 4))
def test_no_cluster_is_ever_empty(images: int, clusters: int, distinct: int) -> None:
    features = np.random.default_rng(images).normal(size=(distinct, 6))[np.arange(images) % distinct]
    if images < clusters * MIN_IMAGES:
        with pytest.raises(ConfigError, match="more clusters than images"):
            cluster_features(features.astype(np.float32), clusters, 0)
        return
    labels = cluster_features(features.astype(np.float32), clusters, 0)
    assert labels.shape == (images,) and np.bincount(labels, minlength=clusters).min() >= MIN_IMAGES


def test_no_cluster_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        cluster_features(np.ones((10, 4), np.float32), 0, 0)


def test_clusters_fitted_to_a_sample_are_those_of_all_rows(tmp_path: Path) -> None:
    features = clumps([300, 200, 100])
    features.tofile(tmp_path / "features")
    mapped = np.memmap(tmp_path / "features", np.float32, "r", shape=features.shape)
    fine = fine_clusters(mapped, 3, 0, sample=150)
    assert np.array_equal(coarse_clusters(fine, 3, 0), cluster_features(features, 3, 0))


def test_balanced_clusters_differ_little_in_size_and_move_those_who_mind_least() -> None:
    features = clumps([500, 60, 40])
    sizes = np.bincount(cluster_features(features, 3, 0, balanced=True))
    assert sizes.sum() == 600 and sizes.max() <= np.ceil(200 * (1 + BALANCE_SLACK))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 5), st.integers(0, 100))
def test_no_cluster_exceeds_its_capacity_and_rows_move_only_from_full_ones(
    images: int, clusters: int, spare: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.random((images, clusters)).astype(np.float32)
    before, capacity = costs.argmin(axis=1), -(-images // clusters) + spare
    after = with_capacity(costs, before, capacity)
    assert np.bincount(after).max() <= capacity
    full = np.flatnonzero(np.bincount(before, minlength=clusters) > capacity)
    assert np.isin(before[before != after], full).all()


def test_rows_left_out_belong_to_no_cluster() -> None:
    features = clumps([60, 100, 80])
    keep = np.arange(240) % 3 > 0
    labels = coarse_clusters(fine_clusters(features, 3, 0), 3, 0, keep=keep)
    assert np.array_equal(labels < 0, ~keep) and np.bincount(labels[keep]).min() >= MIN_IMAGES


def test_fitting_takes_little_more_memory_than_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features may be as large as a machine's memory can just hold once."""
    monkeypatch.setattr(cluster, "CHUNK", 256)
    rows = np.random.default_rng(0).normal(size=(20_000, 64)).astype(np.float32)
    monkeypatch.setattr(cluster, "_fitted", lambda sample, count, seed: sample[:count].copy())
    tracemalloc.start()
    try:
        cluster.fine_clusters(rows, 2, 0)
        assert tracemalloc.get_traced_memory()[1] < 1.6 * rows.nbytes
    finally:
        tracemalloc.stop()
