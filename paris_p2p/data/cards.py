"""Cluster cards: what a person looks at to see what each expert will learn.

Owns: DIR/cards: `index.md` and one contact sheet `cluster-NN.png` a cluster, with its size, the captions'
words that set it apart, and the images nearest to its centre. Does not own: the clusters (`cluster`).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paris_p2p.data.cluster import Labels, Rows, steady

COLUMNS, TILE = 6, 64
NEAREST = COLUMNS * COLUMNS
NAMED = 5
WORDS = 8
NO_KINDS: Mapping[int, Sequence[str]] = {}
_WORD = re.compile(r"[^\W_]{2,}")


@dataclass(frozen=True, slots=True)
class Card:
    """A cluster: its `images`, the `words` that set its captions apart, and the rows `nearest` its centre."""

    index: int
    images: int
    words: tuple[str, ...]
    nearest: tuple[int, ...]


def make_cards(rows: Rows, labels: Labels, captions: Sequence[str], clusters: int) -> tuple[Card, ...]:
    """A card for each cluster; rows labelled -1 are on none."""
    near, words = _nearest(rows, labels, clusters), _top_words(captions, labels, clusters)
    sizes = np.bincount(labels[labels >= 0], minlength=clusters)
    return tuple(Card(n, int(sizes[n]), words[n], near[n]) for n in range(clusters))


def write_cards(
    folder: Path,
    cards: Sequence[Card],
    images: NDArray[np.uint8],
    names: Sequence[str],
    kinds: Mapping[int, Sequence[str]] = NO_KINDS,
) -> None:
    """Write the sheets and the index. images: (N, S, S, 1 or 3); `kinds`: what the experts of some clusters
    must be."""
    lines = ["# Clusters", ""]
    for card in cards:
        file = f"cluster-{card.index:02d}.png"
        sheet(images[np.array(card.nearest, np.int64)]).save(folder / file)
        shown = ", ".join(f"`{names[row].replace('`', '_')}`" for row in card.nearest[:NAMED])
        lines += [
            f"## Cluster {card.index}: {card.images} images",
            "",
            f"Words: {', '.join(card.words) or 'none that set it apart'}. Nearest to the centre: {shown}.",
            *([f"Its expert is {' or '.join(kinds[card.index])}."] if card.index in kinds else []),
            "",
            f"![images nearest to the centre of cluster {card.index}]({file})",
            "",
        ]
    (folder / "index.md").write_text("\n".join(lines), encoding="utf-8")


def sheet(images: NDArray[np.uint8]) -> Image.Image:
    """A contact sheet of images (N, S, S, 1 or 3), row by row; small ones are enlarged pixel by pixel."""
    grid = Image.new("RGB", (COLUMNS * TILE, -(-len(images) // COLUMNS) * TILE), "white")
    for place, image in enumerate(images):
        picture = Image.fromarray(np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3))))
        kind = Image.Resampling.NEAREST if picture.width < TILE else Image.Resampling.BOX
        at = (place % COLUMNS * TILE, place // COLUMNS * TILE)
        grid.paste(picture.resize((TILE, TILE), kind), at)
    return grid


def _nearest(rows: Rows, labels: Labels, clusters: int) -> list[tuple[int, ...]]:
    """The rows of each cluster that point most like its mean, nearest first."""
    with steady():
        sums = None
        for part, chunk in rows.chunks():
            sums = np.zeros((clusters, chunk.shape[1])) if sums is None else sums
            used = labels[part] >= 0
            np.add.at(sums, labels[part][used], chunk[used])
        assert sums is not None
        closeness = np.empty(len(labels), np.float32)
        for part, chunk in rows.chunks():
            closeness[part] = (chunk * sums[labels[part]].astype(np.float32)).sum(axis=1)
    members = [np.flatnonzero(labels == cluster) for cluster in range(clusters)]
    ordered = [of[np.argsort(-closeness[of], kind="stable")[:NEAREST]] for of in members]
    return [tuple(int(row) for row in one) for one in ordered]


def _top_words(captions: Sequence[str], labels: Labels, clusters: int) -> list[tuple[str, ...]]:
    """The words in most captions of a cluster and in few of the others: ranked by tf x idf, tf the share of
    the cluster's captions with the word, idf the log of how much rarer it is in all captions."""
    counts = [Counter[str]() for _ in range(clusters)]
    for caption, label in zip(captions, labels, strict=True):
        if label >= 0:
            counts[label].update(set(_WORD.findall(caption.lower())))
    whole = sum(counts, Counter[str]())
    sizes = np.bincount(labels[labels >= 0], minlength=clusters)
    total = int(sizes.sum())

    def score(word: str, cluster: int) -> float:
        share = counts[cluster][word] / sizes[cluster]
        return float(share * log(share / (whole[word] / total)))

    ranked = []
    for cluster, found in enumerate(counts):
        scores = sorted((-score(word, cluster), word) for word in found)
        ranked.append(tuple(word for negative, word in scores[:WORDS] if negative < -1e-9))
    return ranked
