"""DeLong's test (DeLong et al. 1988): whether two models have the same area under the ROC curve, on the same rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.numeric.areas import MeanAreas
from utils.numeric.means import LEVEL, MIN_UNITS, count_units, unit_indices

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class AreaComparison:
    """The difference of two areas."""

    difference: float
    """The first less the second"""
    standard_error: float
    interval: tuple[float, float] | None
    """95%; None where rows or groups are too few, or nothing varies"""
    p_value: float | None
    """Two-sided; 1 for equal areas without variance, None where rows or groups are too few"""


def compare_areas(
    first: MeanAreas, second: MeanAreas, labels: ArrayLike, groups: ArrayLike | None = None
) -> AreaComparison | None:
    """Compare the mean one-vs-rest areas of two models on the same rows with labels (N,), or groups (N,) of them.

    For two classes this is the test of two correlated curves; for more, the structural components of all classes are
    averaged. None where a class has every row.
    """
    from scipy.special import ndtr, ndtri

    if first.roc_auc is None or second.roc_auc is None:
        return None
    difference = first.roc_auc - second.roc_auc
    influence = first.roc_auc_influence - second.roc_auc_influence
    error = influence_variance(influence, labels, groups) ** 0.5
    if count_units(len(influence), groups) < MIN_UNITS:
        return AreaComparison(difference, error, None, None)
    if error <= np.finfo(np.float64).eps:
        return AreaComparison(difference, 0.0, None, 1.0 if abs(difference) < np.finfo(np.float64).eps else None)
    half = float(ndtri((1 + LEVEL) / 2)) * error
    p_value = 2 * float(ndtr(-abs(difference) / error))
    return AreaComparison(difference, error, (difference - half, difference + half), p_value)


def influence_variance(influence: Floats, truth: ArrayLike, groups: ArrayLike | None = None) -> float:
    """Return the variance of a mean area from the influences (N,) of its rows with labels (N,), or sides of one curve.

    Rows are independent within their class, whose size is fixed; for one curve this is the variance of DeLong et al.
    (1988). With `groups` (N,) the sums of groups are independent (Obuchowski 1997). 0 where nothing varies.
    """
    if groups is not None:
        sums = np.bincount(unit_indices(len(influence), groups), weights=influence)
        return float((sums**2).sum() * len(sums) / max(1, len(sums) - 1))
    sides = np.unique(np.asarray(truth), return_inverse=True)[1].reshape(-1)
    counts = np.bincount(sides)
    deviations = influence - (np.bincount(sides, weights=influence) / counts)[sides]
    of_side = np.bincount(sides, weights=deviations**2)
    return float((of_side * counts / np.maximum(1, counts - 1)).sum())
