"""One-vs-rest ROC and precision-recall curves of each class, with a bounded number of points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.numeric.metrics import check_probabilities

MAX_POINTS = 100
"""Of the curve of one class."""
MAX_CURVE_CLASSES = 100
"""With more classes no curves are kept."""
MAX_ALL_POINTS = 2000
"""Of the curves of all classes together."""
POINT_KEYS = ("threshold", "false_positive_rate", "true_positive_rate", "precision")


def class_curves(
    probabilities: ArrayLike, labels: ArrayLike, classes: Sequence[str]
) -> dict[str, dict[str, list[float]]] | None:
    """Return {class: {key of `POINT_KEYS`: values}} from probabilities (N, C), labels (N,) and class names (C,).

    A point describes the rows whose probability of the class is at least its threshold; the true positive rate is the
    recall. Thresholds decrease, each is the probability of some row, and the last retrieves every row. The points are
    those of scikit-learn's `roc_curve` without its first, and of `precision_recall_curve` without its last. If there
    are more than `MAX_POINTS` (or each class's share of `MAX_ALL_POINTS`), points evenly spaced along the ROC curve are
    kept. Classes with no rows, or with all rows, have no curves. None for more than `MAX_CURVE_CLASSES` classes.
    """
    scores, truth = check_probabilities(probabilities, labels)
    if len(classes) > MAX_CURVE_CLASSES:
        return None
    most = min(MAX_POINTS, MAX_ALL_POINTS // len(classes))
    return {
        name: _points(scores[:, index], truth == index, most)
        for index, name in enumerate(classes)
        if 0 < (truth == index).sum() < len(truth)
    }


def _points(scores: NDArray[np.float64], is_positive: NDArray[np.bool_], most: int) -> dict[str, list[float]]:
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last row of each probability
    hits = np.cumsum(is_positive[order])[ends]
    retrieved = ends + 1
    n_positives = int(is_positive.sum())
    false, true = (retrieved - hits) / (len(scores) - n_positives), hits / n_positives
    if len(ends) > most:
        along = false + true
        indices = np.unique(np.searchsorted(along, np.linspace(along[0], along[-1], most)))
        ends, hits, retrieved, false, true = (values[indices] for values in (ends, hits, retrieved, false, true))
    values: dict[str, Any] = dict(zip(POINT_KEYS, (scores[order][ends], false, true, hits / retrieved), strict=True))
    return {key: points.tolist() for key, points in values.items()}
