"""`data.cards`: what a person sees of each cluster."""

from pathlib import Path

import numpy as np
from PIL import Image

from paris_p2p.data.cards import COLUMNS, NEAREST, TILE, make_cards, sheet, write_cards
from paris_p2p.data.cluster import Rows

CAPTIONS = ["a red fox"] * 50 + ["a blue whale"] * 50 + ["left out"]
LABELS = np.array([0] * 50 + [1] * 50 + [-1])


def rows() -> Rows:
    features = np.random.default_rng(0).normal(size=(101, 4)).astype(np.float32) * 0.1
    features[:50, 0] += 1
    features[50:, 1] += 1
    features[17], features[63] = (5, 0, 0, 0), (0, 5, 0, 0)  # exactly along their clusters
    return Rows(features, np.zeros(4, np.float32), np.ones(4, np.float32))


def test_a_card_tells_size_words_that_set_it_apart_and_the_nearest_images() -> None:
    first, second = make_cards(rows(), LABELS, CAPTIONS, 2)
    assert (first.images, second.images) == (50, 50)
    assert set(first.words) == {"red", "fox"} and set(second.words) == {"blue", "whale"}
    assert 17 in first.nearest[:5] and 63 in second.nearest[:5]
    assert len(first.nearest) == NEAREST and 100 not in second.nearest


def test_words_that_all_clusters_share_are_not_shown() -> None:
    (first, _) = make_cards(rows(), LABELS, ["the same words"] * 101, 2)
    assert first.words == ()


def test_sheets_and_index_are_written(tmp_path: Path) -> None:
    images = np.zeros((101, 8, 8, 1), np.uint8)
    cards = make_cards(rows(), LABELS, CAPTIONS, 2)
    write_cards(tmp_path, cards, images, [f"{index}`.png" for index in range(101)])
    index = (tmp_path / "index.md").read_text()
    assert "## Cluster 1: 50 images" in index and "(cluster-01.png)" in index and "``" not in index
    assert "Its expert is" not in index
    write_cards(tmp_path, cards, images, [""] * 101, {1: ("small:ddpm",)})
    assert (tmp_path / "index.md").read_text().count("Its expert is small:ddpm.") == 1
    with Image.open(tmp_path / "cluster-00.png") as picture:
        assert picture.size == (COLUMNS * TILE, COLUMNS * TILE)


def test_a_sheet_shows_images_in_order() -> None:
    images = np.zeros((7, 8, 8, 3), np.uint8)
    images[6] = (255, 0, 0)
    picture = sheet(images)
    assert picture.size == (COLUMNS * TILE, 2 * TILE)
    assert picture.getpixel((3, TILE + 3)) == (255, 0, 0) and picture.getpixel((3, 3)) == (0, 0, 0)
