"""Pairs of images that are copies of one another: re-encoded, resized, cropped, flipped, brightened or watermarked.

Candidates are nearest neighbours by descriptors of thumbnails and of windows of them (`thumbnail_views`), and by stored
embeddings, if any. `alignment` compares the pixels of candidates. Memory grows with the number of images, not of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.auditing import alignment, thumbnail_views
from utils.auditing.image_signatures import Signatures

NEIGHBOURS = 10  # per view of an image
CANDIDATES = 10  # per image
LOWEST_CORRELATION = 0.65  # minimum correlation of the low frequencies of candidates
SAME_IMAGE = 0.84
"""Minimum correlation of detail of a copy, selected on 596 photographs of citrus leaves (benchmarks/audit.py)."""
CUT_AREA = 0.96  # fraction of the source's area in a copy, below which the copy is reported as cut
IDENTICAL, EQUAL_PIXELS = "identical file", "equal pixels"
MIRRORED, CUT, EDITED = "mirrored or turned", "cut", "same image"
"""Relations of the second image of a pair to the first."""


@dataclass(frozen=True)
class Pair:
    """Two images that are copies of one another."""

    first: int
    second: int
    relation: str
    similarity: float
    """Correlation of detail, up to 1"""


def find_pairs(
    signatures: Signatures,
    contents: Sequence[str],
    embeddings: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    *,
    threads: int = 1,
) -> list[Pair]:
    """All pairs of copies among N images, sorted; `contents` are the digests of their files.

    `embeddings` are arrays (n, D) with the indices (n,) of their images; each adds candidates. Images of equal content
    are linked in a chain, and only the first of them is compared with other images.
    """
    pairs = _equal(contents, IDENTICAL)
    is_first = np.zeros(len(contents), dtype=bool)
    is_first[np.unique(np.array(contents), return_index=True)[1]] = True
    digests = [digest if first else "" for digest, first in zip(signatures.pixel_digests, is_first, strict=True)]
    pairs += _equal(digests, EQUAL_PIXELS)
    rows = np.flatnonzero(signatures.is_tolerant & is_first)
    if len(rows) > 1:
        pairs += _tolerant(signatures, rows, embeddings, threads)
    return sorted(pairs, key=lambda pair: (pair.first, pair.second))


def _equal(keys: Sequence[str], relation: str) -> list[Pair]:
    latest: dict[str, int] = {}
    pairs = []
    for index, key in enumerate(keys):
        if key and key in latest:
            pairs.append(Pair(latest[key], index, relation, 1.0))
        latest[key] = index
    return pairs


def _tolerant(
    signatures: Signatures, rows: np.ndarray, embeddings: Sequence[tuple[np.ndarray, np.ndarray]], threads: int
) -> list[Pair]:
    thumbnails = signatures.thumbnails[rows]
    candidates = _candidates(thumbnails, _embedding_pairs(rows, embeddings))
    scores, windows = alignment.similarity(thumbnails, *candidates, threads=threads)
    best: dict[tuple[int, int], Pair] = {}
    for pair_index in np.flatnonzero(scores >= SAME_IMAGE):
        first, second = sorted(int(rows[part[pair_index]]) for part in candidates[:2])
        relation = EDITED
        if candidates[2][pair_index]:
            relation = MIRRORED
        elif windows[pair_index, 2] * windows[pair_index, 3] < CUT_AREA:
            relation = CUT
        pair = Pair(first, second, relation, round(float(scores[pair_index]), 4))
        if (first, second) not in best or best[first, second].similarity < pair.similarity:
            best[first, second] = pair
    return list(best.values())


def _embedding_pairs(rows: np.ndarray, embeddings: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """int64 (2, P): pairs of nearest neighbours by embedding, as positions in `rows`."""
    from sklearn.neighbors import NearestNeighbors

    pairs = [np.empty((2, 0), dtype=np.int64)]
    for values, owners in embeddings:
        position = np.searchsorted(rows, owners).clip(max=len(rows) - 1)
        is_in_rows = rows[position] == owners
        vectors = np.asarray(values, dtype=np.float32)[is_in_rows]
        if len(vectors) < 2:
            continue
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        count = min(NEIGHBOURS, len(vectors))
        nearest = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(vectors).kneighbors(return_distance=False)
        owner_position = position[is_in_rows]
        pairs.append(np.stack([np.repeat(owner_position, nearest.shape[1]), owner_position[nearest].ravel()]))
    return np.concatenate(pairs, axis=1)


def _candidates(thumbnails: np.ndarray, added: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Source, target, flip and window of every directed pair to compare by pixels, each int64 (B,)."""
    from sklearn.neighbors import NearestNeighbors

    whole_coefficients = thumbnail_views.all_coefficients(thumbnails, thumbnail_views.WINDOWS[0])
    weights = thumbnail_views.weights(whole_coefficients)
    described = thumbnail_views.descriptors(whole_coefficients, weights)
    count = min(NEIGHBOURS, len(thumbnails))
    index = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(described)
    sources, targets, flips, windows, correlations = [], [], [], [], []
    for number, window in enumerate(thumbnail_views.WINDOWS):
        view = whole_coefficients if number == 0 else thumbnail_views.all_coefficients(thumbnails, window)
        nearest = index.kneighbors(thumbnail_views.descriptors(view, weights), return_distance=False)
        source = np.concatenate([np.repeat(np.arange(len(thumbnails)), count), added[0]])
        target = np.concatenate([nearest.ravel(), added[1]])
        source, target = source[source != target], target[source != target]
        for block in thumbnail_views.blocks(len(source), 1 << 14):
            correlation, flip = thumbnail_views.best_flips(
                view[source[block]], whole_coefficients[target[block]], weights
            )
            is_candidate = correlation >= LOWEST_CORRELATION
            sources.append(source[block][is_candidate])
            targets.append(target[block][is_candidate])
            flips.append(flip[is_candidate])
            windows.append(np.full(int(is_candidate.sum()), number))
            correlations.append(correlation[is_candidate])
    parts = [np.concatenate(part) for part in (sources, targets, flips, windows)]
    selected = _most_alike(parts[0], parts[1], np.concatenate(correlations), len(thumbnails))
    return parts[0][selected], parts[1][selected], parts[2][selected], parts[3][selected]


def _most_alike(source: np.ndarray, target: np.ndarray, correlation: np.ndarray, count: int) -> np.ndarray:
    """Indices of the CANDIDATES most correlated targets of each source, each with its most correlated window."""
    order = np.lexsort((-correlation, source * count + target))
    keys = (source * count + target)[order]
    order = order[np.r_[True, keys[1:] != keys[:-1]]] if len(order) else order
    order = order[np.lexsort((-correlation[order], source[order]))]
    sorted_sources = source[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_sources, sorted_sources)
    return order[rank < CANDIDATES]


def group_indices(count: int, pairs: Sequence[Pair], groups_to_keep: np.ndarray | None = None) -> np.ndarray:
    """Group of each of `count` images, int64 (N,): joins pairs and images of equal group in `groups_to_keep` (N,)."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    first = [pair.first for pair in pairs]
    second = [pair.second for pair in pairs]
    if groups_to_keep is not None:
        order = np.argsort(groups_to_keep, kind="stable")
        same = groups_to_keep[order][1:] == groups_to_keep[order][:-1]
        first += order[:-1][same].tolist()
        second += order[1:][same].tolist()
    graph = coo_matrix((np.ones(len(first)), (first, second)), shape=(count, count))
    groups: np.ndarray = connected_components(graph, directed=False)[1]
    return groups.astype(np.int64)
