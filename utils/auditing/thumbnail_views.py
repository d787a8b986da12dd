"""Low-frequency descriptors of grey thumbnails, and of windows of them, for finding candidates of near duplicates.

The magnitudes of low DCT coefficients do not change when an image is flipped, and change little when it is cropped,
resized, compressed or brightened: the idea of the perceptual hash (Zauner 2010). Descriptors are real numbers instead
of bits, so that neighbours are found by distance; transposed coefficients are combined, so that quarter turns match.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

SIDE = 64  # pixels of a thumbnail
FREQUENCIES = 9  # lowest DCT frequencies per axis
CUT = 0.89  # side of the windows: the window of a copy with a side of 0.85 to 1 differs from one by at most 0.11
WINDOWS = (
    (0.0, 0.0, 1.0, 1.0),
    *((top, left, CUT, CUT) for top in (0.0, (1 - CUT) / 2, 1 - CUT) for left in (0.0, (1 - CUT) / 2, 1 - CUT)),
)
"""(top, left, height, width) as fractions: the whole image, and nine windows of it."""
FLIPS = tuple((transpose, vertical, horizontal) for transpose in (0, 1) for vertical in (0, 1) for horizontal in (0, 1))
"""The eight symmetries of a square, as (transpose first, then flip vertically, then flip horizontally)."""


def basis(start: float, length: float) -> np.ndarray:
    """float32 (FREQUENCIES, SIDE): DCT-II of a window of a line, as a linear map of the pixels of the whole line."""
    centres = (start + length * (np.arange(SIDE) + 0.5) / SIDE) * SIDE - 0.5
    sampling = interpolation(centres[None])[0]
    angles = np.pi * np.outer(np.arange(FREQUENCIES), np.arange(SIDE) + 0.5) / SIDE
    return (np.cos(angles) @ sampling / SIDE).astype(np.float32)


def interpolation(positions: np.ndarray, side: int = SIDE) -> np.ndarray:
    """float32 (B, P, side): linear interpolation of lines of `side` pixels at clipped `positions` (B, P)."""
    clipped = np.clip(positions, 0, side - 1).astype(np.float32)
    return np.maximum(0, 1 - np.abs(clipped[..., None] - np.arange(side, dtype=np.float32)))


def coefficients(thumbnails: np.ndarray, window: tuple[float, float, float, float]) -> np.ndarray:
    """float32 (N, F, F): low DCT coefficients of a window of each thumbnail uint8 (N, SIDE, SIDE), without the mean."""
    top, left, height, width = window
    values = np.matmul(basis(top, height) @ thumbnails.astype(np.float32), basis(left, width).T)
    values[:, 0, 0] = 0
    return values


def blocks(count: int, size: int = 2048) -> Iterator[slice]:
    """Consecutive slices of a range, to limit memory."""
    for start in range(0, count, size):
        yield slice(start, start + size)


def all_coefficients(thumbnails: np.ndarray, window: tuple[float, float, float, float]) -> np.ndarray:
    """`coefficients` (N, F, F) of many thumbnails (N, SIDE, SIDE), block by block to limit memory."""
    values = np.empty((len(thumbnails), FREQUENCIES, FREQUENCIES), dtype=np.float32)
    for block in blocks(len(thumbnails)):
        values[block] = coefficients(thumbnails[block], window)
    return values


def weights(coefficients: np.ndarray) -> np.ndarray:
    """float32 (F, F): inverse root mean square of each pair of transposed coefficients over the images (N, F, F)."""
    power = np.square(coefficients).mean(axis=0, dtype=np.float64)
    spread = np.sqrt((power + power.T) / 2)
    return np.where(spread > 1e-6, 1 / np.maximum(spread, 1e-6), 0).astype(np.float32)


def descriptors(coefficients: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float32 (N, D), of norm 1: magnitudes invariant to flips and quarter turns."""
    magnitudes = np.abs(coefficients) * weights
    upper = np.triu_indices(FREQUENCIES, k=1)
    first, second = magnitudes[:, upper[0], upper[1]], magnitudes[:, upper[1], upper[0]]
    diagonal = magnitudes[:, np.arange(1, FREQUENCIES), np.arange(1, FREQUENCIES)]
    joined = np.concatenate([diagonal, (first + second) / 2**0.5, np.abs(first - second) / 2**0.5], axis=1)
    return joined / np.maximum(np.linalg.norm(joined, axis=1, keepdims=True), 1e-12)


def best_flips(source: np.ndarray, target: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlation (B,) and index in FLIPS (B,) of the flip of `source` (B, F, F) that best matches `target`.

    Flipping an image negates its odd coefficients along that axis, and transposing it transposes them.
    """
    scores = np.empty((len(source), len(FLIPS)), dtype=np.float32)
    weighted = target * np.square(weights)
    for transpose in (0, 1):
        product = (source.transpose(0, 2, 1) if transpose else source) * weighted
        even, odd = product[:, ::2].sum(axis=1), product[:, 1::2].sum(axis=1)
        for vertical in (0, 1):
            along = even - odd if vertical else even + odd
            columns = along[:, ::2].sum(axis=1), along[:, 1::2].sum(axis=1)
            scores[:, 4 * transpose + 2 * vertical] = columns[0] + columns[1]
            scores[:, 4 * transpose + 2 * vertical + 1] = columns[0] - columns[1]
    norms = np.linalg.norm((source * weights).reshape(len(source), -1), axis=1)
    norms = norms * np.linalg.norm((target * weights).reshape(len(target), -1), axis=1)
    best = scores.argmax(axis=1)
    return scores[np.arange(len(best)), best] / np.maximum(norms, 1e-12), best


def flip(thumbnails: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """Transform thumbnails (B, SIDE, SIDE), each by its index in FLIPS (B,)."""
    turned = np.empty_like(thumbnails)
    for index, (transpose, vertical, horizontal) in enumerate(FLIPS):
        rows = flips == index
        flipped = thumbnails[rows]
        flipped = flipped.transpose(0, 2, 1) if transpose else flipped
        turned[rows] = flipped[:, :: -1 if vertical else 1, :: -1 if horizontal else 1]
    return turned
