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
    """The first area minus the second"""
    standard_error: float
    interval: tuple[float, float] | None
    """95%; None where rows or groups are too few, or the variance is 0"""
    p_value: float | None
    """Two-sided; None for too few rows or groups. Without variance: 1 for equal areas, None for different ones"""


def compare_areas(
    first: MeanAreas, second: MeanAreas, labels: ArrayLike, groups: ArrayLike | None = None
) -> AreaComparison | None:
    """Compare the mean one-vs-rest areas of two models on the same rows with labels (N,).

    For two classes this is the test of two correlated curves; for more, the structural components of all classes are
    averaged. With groups (N,), groups are independent instead of rows. None where every row belongs to one class.
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
    """Return the variance of an area from the influences (N,) of the rows and their labels, `truth` (N,).

    For one curve, `truth` states which rows belong to the class. Rows are independent within their class, whose size is
    fixed; for one curve this is the variance of DeLong et al. (1988). With `groups` (N,) the sums of groups are
    independent (Obuchowski 1997). It is 0 where the influences do not vary.
    """
    if groups is not None:
        sums = np.bincount(unit_indices(len(influence), groups), weights=influence)
        return float((sums**2).sum() * len(sums) / max(1, len(sums) - 1))
    sides = np.unique(np.asarray(truth), return_inverse=True)[1].reshape(-1)
    counts = np.bincount(sides)
    deviations = influence - (np.bincount(sides, weights=influence) / counts)[sides]
    side_sums = np.bincount(sides, weights=deviations**2)
    return float((side_sums * counts / np.maximum(1, counts - 1)).sum())
