"""How the classes differ in number, resolution and brightness, and which images hold nothing."""

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

    `labels` (N,) index `classes`; figures of pixels are of readable images, None where a class has none.
    """
    names, readable = np.array(splits), signatures.readable
    widths, heights = (np.array([getattr(file, side) for file in signatures.files]) for side in ("width", "height"))
    facts = []
    for label, name in enumerate(classes):
        own = labels == label
        shown = own & readable
        qualities = [jpeg_quality(signatures.files[row].quantisation) for row in np.flatnonzero(shown)]
        known = [quality for quality in qualities if quality is not None]
        facts.append(
            {
                "name": name,
                "images": {split: int((own & (names == split)).sum()) for split in dict.fromkeys(splits)},
                "width": _median(widths[shown]),
                "height": _median(heights[shown]),
                "jpeg_quality": _median(np.array(known)),
                "brightness": _mean(signatures.brightness[shown]),
                "contrast": _mean(signatures.deviation[shown]),
            }
        )
    return facts


def nearly_empty(signatures: Signatures) -> np.ndarray:
    """Rows of readable images that hold a single colour, or hardly more."""
    return np.flatnonzero(signatures.readable & (signatures.deviation < NEARLY_EMPTY))


def imbalance_ratio(labels: np.ndarray, classes: Sequence[str]) -> float | None:
    """Images of the largest class over those of the smallest; None where a class has none."""
    counts = np.bincount(labels, minlength=len(classes))
    return round(float(counts.max() / counts.min()), 2) if len(counts) and counts.min() else None


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()) / 255, 4) if len(values) else None
