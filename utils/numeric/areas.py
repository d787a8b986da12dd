"""Areas under the one-vs-rest ROC and precision-recall curves of all classes, and the influence of each row on them.

The influence of a row is the derivative of an area with respect to the row's weight. Influences sum to 0, and the sum
of their squares estimates the variance of the area. For the ROC curve they are the structural components of DeLong et
al. (1988). Each class costs one sort of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
COLUMNS = 64  # copied at a time


@dataclass(frozen=True)
class ClassAreas:
    """Areas of one class against the rest, on N rows."""

    index: int
    """Column of the class"""
    roc_auc: float
    """Ties count half; NaN where every row belongs to the class"""
    average_precision: float
    """Mean over the rows of the class of the precision at their score, as in scikit-learn"""
    is_positive: NDArray[np.bool_]
    """(N,): whether the row belongs to the class"""
    roc_auc_influence: Floats
    """(N,); zeros where the area is NaN, empty without influences"""
    average_precision_influence: Floats
    """(N,); empty without influences"""


def class_areas(scores: Floats, truth: Integers, *, influences: bool = False) -> Iterator[ClassAreas]:
    """Yield the areas of each class that has rows, from probabilities (N, C) and labels (N,); inputs are unchecked."""
    present = np.flatnonzero(np.bincount(truth, minlength=scores.shape[1])).tolist()
    for first in range(0, len(present), COLUMNS):
        block = present[first : first + COLUMNS]
        columns = np.ascontiguousarray(scores[:, block].T)  # the values of a column are contiguous
        for index, column in zip(block, columns, strict=True):
            yield _class_areas(index, column, truth == index, influences)


def _class_areas(index: int, scores: Floats, is_positive: NDArray[np.bool_], influences: bool) -> ClassAreas:
    ordered, negatives = np.sort(scores[is_positive]), scores[~is_positive]
    others = np.sort(negatives)
    n_positives, n_negatives = len(ordered), len(others)
    left, right = (np.searchsorted(others, ordered, side=side) for side in ("left", "right"))
    above = (left + right) / (2 * n_negatives) if n_negatives else np.full(n_positives, np.nan)
    hits = n_positives - np.searchsorted(ordered, ordered, side="left")
    retrieved = hits + n_negatives - left
    precision = hits / retrieved
    roc_auc, average = float(above.mean()), float(precision.mean())
    if not influences:
        return ClassAreas(index, roc_auc, average, is_positive, np.empty(0), np.empty(0))
    at_most = np.searchsorted(ordered, scores, side="right")  # rows of the class with at most each row's score
    reached = at_most[is_positive] - 1
    roc_influence = np.zeros(len(scores))
    if n_negatives:
        below = 1 - (np.searchsorted(ordered, negatives, side="left") + at_most[~is_positive]) / (2 * n_positives)
        roc_influence[is_positive] = (above[reached] - roc_auc) / n_positives
        roc_influence[~is_positive] = (below - roc_auc) / n_negatives
    # A row adds to the rows retrieved at every threshold up to its score, and to the hits if it belongs to the class.
    gains, losses = (np.append(0, np.cumsum(values)) for values in (1 / retrieved, precision / retrieved))
    influence = -losses[at_most]
    influence[is_positive] += gains[reached + 1] + precision[reached] - average
    return ClassAreas(index, roc_auc, average, is_positive, roc_influence, influence / n_positives)


@dataclass(frozen=True)
class MeanAreas:
    """Means of the areas over the classes that have rows, with the influence of each row on them."""

    roc_auc: float | None
    """None where every row belongs to one class"""
    roc_auc_influence: Floats
    """(N,)"""
    average_precision: float
    average_precision_influence: Floats
    """(N,)"""


def mean_areas(scores: Floats, truth: Integers) -> MeanAreas:
    """Return the mean areas from probabilities (N, C) and labels (N,); inputs are unchecked."""
    roc_influence, precision_influence = np.zeros(len(truth)), np.zeros(len(truth))
    roc_auc, average_precision, count = 0.0, 0.0, 0
    for areas in class_areas(scores, truth, influences=True):
        roc_auc += areas.roc_auc
        average_precision += areas.average_precision
        roc_influence += areas.roc_auc_influence
        precision_influence += areas.average_precision_influence
        count += 1
    mean = roc_auc / count
    return MeanAreas(
        None if np.isnan(mean) else mean, roc_influence / count, average_precision / count, precision_influence / count
    )
