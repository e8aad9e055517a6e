"""Tests of `paris_p2p.diffusion.metrics`."""

import numpy as np
import pytest

from paris_p2p.diffusion.metrics import frechet_distance, precision_recall


def gaussian(count: int, mean: float, deviation: float, seed: int, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, deviation, (count, width))


def test_the_distance_of_two_gaussians_is_the_closed_form() -> None:
    # independent coordinates: |m1 - m2|^2 + sum (s1 - s2)^2
    found = frechet_distance(gaussian(60_000, 0.0, 1.0, 1), gaussian(60_000, 0.5, 2.0, 2))
    assert found == pytest.approx(6 * 0.25 + 6 * 1.0, rel=0.03)


def test_correlated_gaussians_too() -> None:
    turn = np.array([[1.0, 0.0], [0.9, 0.4]])
    other = np.array([[0.6, 0.0], [-0.3, 1.1]])
    one = gaussian(100_000, 0.0, 1.0, 3, 2) @ turn.T
    two = gaussian(100_000, 0.0, 1.0, 4, 2) @ other.T
    first, second = turn @ turn.T, other @ other.T
    # for 2 x 2: tr sqrt(AB) = sqrt(tr(AB) + 2 sqrt(det(AB)))
    product = first @ second
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    assert frechet_distance(one, two) == pytest.approx(np.trace(first + second) - 2 * root, rel=0.03)


def test_the_same_images_are_at_distance_zero_and_order_does_not_matter() -> None:
    one, two = gaussian(50, 0.0, 1.0, 5), gaussian(40, 1.0, 1.0, 6)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(one, two) == pytest.approx(frechet_distance(two, one))


def test_fewer_images_than_dimensions_are_no_error() -> None:
    assert frechet_distance(gaussian(4, 0.0, 1.0, 7, 20), gaussian(4, 5.0, 1.0, 8, 20)) > 100


def test_one_image_is_no_distribution() -> None:
    with pytest.raises(ValueError, match="two images"):
        frechet_distance(gaussian(1, 0.0, 1.0, 1), gaussian(5, 0.0, 1.0, 1))


def test_copies_are_precise_and_complete_and_strangers_are_neither() -> None:
    real = gaussian(300, 0.0, 1.0, 9)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)


def test_one_mode_is_precise_and_not_complete() -> None:
    real = np.concatenate([gaussian(200, 0.0, 1.0, 10), gaussian(200, 20.0, 1.0, 11)])
    precision, recall = precision_recall(real, gaussian(400, 0.0, 0.9, 12))
    assert precision > 0.9
    assert 0.3 < recall < 0.55


def test_too_few_images_for_a_manifold_are_said() -> None:
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(gaussian(3, 0.0, 1.0, 1), gaussian(9, 0.0, 1.0, 1))
