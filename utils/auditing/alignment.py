"""Pixel comparison of candidate pairs: is one thumbnail a crop of the other?

The window is fitted by Gauss-Newton steps on position and scale of each axis (Lucas and Kanade 1981), with gain and
offset of the brightness, first at half the resolution. The decision is based on fine detail with normalised contrast:
of leaves with similar outlines, only the same leaf has the same veins and spots. The correlation over the whole image
is averaged with its median over blocks, which is robust to a watermark on some of them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from utils.auditing.thumbnail_views import WINDOWS, blocks, flip, interpolation

COARSE_STEPS, FINE_STEPS = 6, 5
COARSE_BLUR, FINE_BLUR = 1.5, 1.0  # standard deviations in pixels of the coarse and of the fine resolution
COARSE_CORRELATION = 0.88  # of the blurred images; pairs below are not fitted at the fine resolution
DETAIL_BLURS = 0.7, 2.5  # detail is the difference of two blurs with these standard deviations, in pixels
CONTRAST_BLUR, CONTRAST_FLOOR = 3.0, 2.0  # detail is divided by its local deviation plus the noise floor in grey levels
BLOCK = 8  # pixels; side of a block of the comparison
BATCH = 256  # pairs that are fitted at a time
LOWEST_SCALE, HIGHEST_SCALE, MARGIN = 0.75, 1.04, 0.03
"""Bounds of the window's sides as fractions of the source's, and the margin by which it may exceed the source."""


def similarity(
    thumbnails: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    flips: np.ndarray,
    windows: np.ndarray,
    *,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Correlation of detail, float32 (B,), between `target` and the fitted window of the flipped `source`.

    `source` and `target` (B,) are indices into the thumbnails, uint8 (N, SIDE, SIDE), `flips` (B,) into FLIPS, and
    `windows` (B,) into WINDOWS, the initial windows of the fit. Pairs that differ at the coarse resolution get 0. Also
    returns the fitted windows (B, 4).
    """
    scores = np.zeros(len(source), dtype=np.float32)
    starts = flipped_windows(np.array(WINDOWS)[windows], flips)
    transforms = starts.astype(np.float32)

    def compare(block: slice) -> None:
        first = flip(thumbnails[source[block]], flips[block]).astype(np.float32)
        second = thumbnails[target[block]].astype(np.float32)
        fitted = _fitted(_halved(first), _halved(second), starts[block], COARSE_BLUR, COARSE_STEPS)
        is_similar = _correlation(_warped(_halved(first), fitted), _halved(second)) >= COARSE_CORRELATION
        if is_similar.any():
            rows = np.arange(len(source))[block][is_similar]
            transforms[rows] = _fitted(first[is_similar], second[is_similar], fitted[is_similar], FINE_BLUR, FINE_STEPS)
            pair = _warped(_detail(first[is_similar]), transforms[rows]), _detail(second[is_similar])
            scores[rows] = _detail_correlation(*pair)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(compare, blocks(len(source), BATCH)):
            pass
    return scores, transforms


def flipped_windows(windows: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """The windows (B, 4) of images in the coordinates of the flipped images."""
    top, left, height, width = windows.T
    transpose, vertical, horizontal = flips >> 2 & 1, flips >> 1 & 1, flips & 1
    top, left = np.where(transpose, left, top), np.where(transpose, top, left)
    height, width = np.where(transpose, width, height), np.where(transpose, height, width)
    top, left = np.where(vertical, 1 - top - height, top), np.where(horizontal, 1 - left - width, left)
    return np.stack([top, left, height, width], axis=1)


def _halved(images: np.ndarray) -> np.ndarray:
    halved: np.ndarray = images.reshape(len(images), images.shape[1] // 2, 2, images.shape[2] // 2, 2).mean(axis=(2, 4))
    return halved


def _blurred(images: np.ndarray, deviation: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    blurred: np.ndarray = gaussian_filter(images, (0, deviation, deviation), mode="nearest", truncate=3)
    return blurred


def _detail(images: np.ndarray) -> np.ndarray:
    fine, coarse = (_blurred(images, deviation) for deviation in DETAIL_BLURS)
    return fine - coarse


def _fitted(source: np.ndarray, target: np.ndarray, windows: np.ndarray, blur: float, steps: int) -> np.ndarray:
    """The windows (B, 4) of the sources (B, S, S) that best match the targets, fitted from the given windows."""
    source, target = _blurred(source, blur), _blurred(target, blur)
    images = np.stack([source, *np.gradient(source, axis=(1, 2))], axis=1)
    for _ in range(steps):
        windows = _stepped(images, target, windows)
    return windows


def _warped(images: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Windows (B, 4) of images (B, ..., S, S), resized to S x S."""
    side = images.shape[-1]
    centres = (np.arange(side) + 0.5) / side
    rows, columns = (
        interpolation((windows[:, axis, None] + windows[:, axis + 2, None] * centres) * side - 0.5, side)
        for axis in (0, 1)
    )
    if images.ndim == 4:
        rows, columns = rows[:, None], columns[:, None]
    return np.matmul(np.matmul(rows, images), columns.swapaxes(-1, -2))


def _stepped(images: np.ndarray, target: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """The windows after one Gauss-Newton step; `images` (B, 3, S, S): the source and its gradients along both axes."""
    count, side = len(images), images.shape[-1]
    warped = _warped(images, windows)
    source, vertical, horizontal = warped[:, 0], side * warped[:, 1], side * warped[:, 2]
    centres = ((np.arange(side, dtype=np.float32) + 0.5) / side)[None]
    design = np.empty((count, 6, side, side), dtype=np.float32)
    design[:, 0], design[:, 1] = vertical, horizontal
    design[:, 2], design[:, 3] = vertical * centres[:, :, None], horizontal * centres[:, None, :]
    design[:, 4], design[:, 5] = source, 1
    flat = design.reshape(count, 6, -1)
    normal = np.matmul(flat, flat.swapaxes(1, 2)).astype(np.float64)
    right = np.matmul(flat, target.reshape(count, -1, 1)).astype(np.float64)
    scale = np.sqrt(np.maximum(np.diagonal(normal, axis1=1, axis2=2), 1e-6))
    normal = normal / (scale[:, :, None] * scale[:, None, :]) + 1e-4 * np.eye(6)
    solution = np.linalg.solve(normal, right / scale[:, :, None])[..., 0] / scale
    gain = np.where(np.abs(solution[:, 4:5]) > 0.1, solution[:, 4:5], 1.0)
    moved = windows + np.clip(solution[:, :4] / gain, -0.04, 0.04)
    moved[:, 2:] = np.clip(moved[:, 2:], LOWEST_SCALE, HIGHEST_SCALE)
    moved[:, :2] = np.clip(moved[:, :2], -MARGIN, 1 + MARGIN - moved[:, 2:])
    return moved


def _correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Correlation (B,) of images (B, S, S)."""
    parts = [image.reshape(len(image), -1) for image in (first, second)]
    centred = [part - part.mean(axis=1, keepdims=True) for part in parts]
    norms = [np.linalg.norm(part, axis=1) for part in centred]
    return (centred[0] * centred[1]).sum(axis=1) / np.maximum(norms[0] * norms[1], 1e-6)


def _detail_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Correlation (B,) of detail (B, S, S) with normalised contrast: mean of the image's and of the blocks' median."""
    first, second = (
        detail / (np.sqrt(_blurred(np.square(detail), CONTRAST_BLUR)) + CONTRAST_FLOOR) for detail in (first, second)
    )
    return (_correlation(first, second) + _block_correlation(first, second)) / 2


def _block_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Median correlation (B,) over the half of the blocks of two images (B, S, S) with the most detail."""
    centred = [part - part.mean(axis=2, keepdims=True) for part in map(_in_blocks, (first, second))]
    norms = [np.linalg.norm(part, axis=2) for part in centred]
    detail = norms[0] * norms[1]
    correlations = (centred[0] * centred[1]).sum(axis=2) / np.maximum(detail, 1e-6)
    most_detailed = np.argsort(-detail, axis=1)[:, : detail.shape[1] // 2]
    return np.median(np.take_along_axis(correlations, most_detailed, axis=1), axis=1)


def _in_blocks(images: np.ndarray) -> np.ndarray:
    count = images.shape[1] // BLOCK
    parts = images.reshape(len(images), count, BLOCK, count, BLOCK).transpose(0, 1, 3, 2, 4)
    return parts.reshape(len(images), count * count, BLOCK * BLOCK)
