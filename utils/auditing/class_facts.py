"""Differences between the classes in number, resolution and brightness of images, and nearly empty images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.auditing.image_signatures import Signatures, jpeg_quality

NEARLY_EMPTY = 2.0  # standard deviation of the grey levels of a thumbnail, of 255


def by_class(
    signatures: Signatures, labels: np.ndarray, splits: Sequence[str], classes: Sequence[str]
) -> list[dict[str, Any]]:
    """One entry per class: images by split, median width, height and JPEG quality, mean brightness and contrast.

    `labels` (N,) are indices into `classes`; pixel statistics are those of readable images, None without any.
    """
    names, readable = np.array(splits), signatures.readable
    widths, heights = (np.array([getattr(file, side) for file in signatures.files]) for side in ("width", "height"))
    facts = []
    for label, name in enumerate(classes):
        in_class = labels == label
        is_used = in_class & readable
        qualities = [jpeg_quality(signatures.files[row].quantisation) for row in np.flatnonzero(is_used)]
        known_qualities = [quality for quality in qualities if quality is not None]
        facts.append(
            {
                "name": name,
                "images": {split: int((in_class & (names == split)).sum()) for split in dict.fromkeys(splits)},
                "width": _median(widths[is_used]),
                "height": _median(heights[is_used]),
                "jpeg_quality": _median(np.array(known_qualities)),
                "brightness": _mean(signatures.brightness[is_used]),
                "contrast": _mean(signatures.deviation[is_used]),
            }
        )
    return facts


def nearly_empty(signatures: Signatures) -> np.ndarray:
    """Indices (n,) of readable images with nearly a single colour."""
    return np.flatnonzero(signatures.readable & (signatures.deviation < NEARLY_EMPTY))


def imbalance_ratio(labels: np.ndarray, classes: Sequence[str]) -> float | None:
    """Ratio of the sizes of the largest and the smallest class of `labels` (N,); None if a class has no images."""
    counts = np.bincount(labels, minlength=len(classes))
    return round(float(counts.max() / counts.min()), 2) if len(counts) and counts.min() else None


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()) / 255, 4) if len(values) else None
