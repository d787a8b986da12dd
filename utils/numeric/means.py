"""Standard errors and intervals of means of rows that may come in groups, and of ratios of means.

Rows of one group (images of one patient, frames of one film) are not independent. Their values are summed by group
before any variance is computed, and degrees of freedom are those of the groups.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.numeric.metrics import ROUNDING

MIN_UNITS = 10
"""Fewest independent rows, or groups, for which an interval is given."""
MIN_ERRORS = 3
"""Fewest misclassified rows for which the interval of a mean loss is given; fewer do not show how large losses get."""
SMALLEST_SKEWNESS = 1e-6
LEVEL = 0.95
"""Confidence level of intervals unless stated otherwise."""
Floats = NDArray[np.float64]


def unit_indices(rows: int, groups: ArrayLike | None) -> NDArray[np.int64]:
    """Return the index (N,) of each row's group among the distinct groups; 0 to N - 1 where `groups` is None."""
    if groups is None:
        return np.arange(rows)
    return np.asarray(np.unique(np.asarray(groups), return_inverse=True)[1], dtype=np.int64).reshape(-1)


def unit_sums(values: ArrayLike, groups: ArrayLike | None = None) -> Floats:
    """Return the sums (G,) of values (N,) by group; the values themselves where `groups` is None."""
    numbers = np.asarray(values, dtype=np.float64)
    if groups is None:
        return numbers
    return np.asarray(np.bincount(unit_indices(len(numbers), groups), weights=numbers), dtype=np.float64)


def count_units(rows: int, groups: ArrayLike | None) -> int:
    """Return the number of independent units: distinct groups, or rows where `groups` is None."""
    return rows if groups is None else len(np.unique(np.asarray(groups)))


def standard_error(values: ArrayLike, groups: ArrayLike | None = None) -> float:
    """Return the standard error of the mean of values (N,), whose groups (N,) are independent; 0 for one unit.

    It is the linearised standard error of a ratio of sums (Cochran 1977, section 6.3), so that groups may differ in
    size.
    """
    numbers = np.asarray(values, dtype=np.float64)
    deviations = unit_sums(numbers - numbers.mean(), groups)
    units = len(deviations)
    if units < 2:
        return 0.0
    return float(np.sqrt(units / (units - 1) * (deviations**2).sum()) / len(numbers))


def mean_interval(
    values: ArrayLike, groups: ArrayLike | None = None, *, level: float = LEVEL
) -> tuple[float, float] | None:
    """Return the interval of the mean of values (N,) over rows or groups (N,), corrected for skewness.

    Uses Student's t with Hall's monotone transformation (1992), since a few large losses dominate the mean of many
    small ones. None for fewer than `MIN_UNITS` rows or groups.
    """
    from scipy.special import stdtrit

    numbers = np.asarray(values, dtype=np.float64)
    mean = float(numbers.mean())
    deviations = unit_sums(numbers - mean, groups)
    units = len(deviations)
    if units < MIN_UNITS:
        return None
    error, spread = standard_error(numbers, groups), float(np.sqrt((deviations**2).mean()))
    if error <= ROUNDING * abs(mean):
        return mean, mean
    skewness = float((deviations**3).mean()) / spread**3 / units**0.5
    t = float(stdtrit(units - 1, (1 + level) / 2))
    return mean - error * _unskewed(t, skewness), mean - error * _unskewed(-t, skewness)


def paired_interval(
    differences: ArrayLike, groups: ArrayLike | None = None, *, level: float = LEVEL
) -> tuple[float, float] | None:
    """Return the interval of the mean of paired differences (N,) by Student's t over rows or groups (N,).

    Differences of two models have heavy tails on both sides; correcting for the skewness of the sample would add noise.
    None for fewer than `MIN_UNITS` rows or groups.
    """
    from scipy.special import stdtrit

    numbers = np.asarray(differences, dtype=np.float64)
    units = count_units(len(numbers), groups)
    if units < MIN_UNITS:
        return None
    mean, half = float(numbers.mean()), float(stdtrit(units - 1, (1 + level) / 2)) * standard_error(numbers, groups)
    return mean - half, mean + half


def ratio_interval(
    parts: ArrayLike, wholes: ArrayLike, groups: ArrayLike | None = None, *, level: float = LEVEL
) -> tuple[float, float] | None:
    """Return the interval of mean(parts) / mean(wholes) of paired values (N,) over rows or groups (N,).

    It contains the ratios r for which Student's t does not reject that the mean of `parts - r wholes` is 0 (Fieller
    1954). None where the mean of `wholes` is not above 0 at this level, so that the interval is unbounded, and for
    fewer than `MIN_UNITS` rows or groups.
    """
    from scipy.special import stdtrit

    values = np.stack([np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)])
    part, whole = values.mean(axis=1)
    deviations = np.stack([unit_sums(row - row.mean(), groups) for row in values])
    units = deviations.shape[1]
    if units < MIN_UNITS:
        return None
    reach = float(stdtrit(units - 1, (1 + level) / 2)) ** 2
    products = reach * units / (units - 1) * (deviations @ deviations.T) / values.shape[1] ** 2
    square = whole**2 - products[1, 1]
    if whole <= 0 or square <= ROUNDING * whole**2:
        return None
    middle, rest = part * whole - products[0, 1], part**2 - products[0, 0]
    half = max(0.0, middle**2 - square * rest) ** 0.5
    return float((middle - half) / square), float((middle + half) / square)


def _unskewed(quantile: float, skewness: float) -> float:
    """Return x with x + s x^2 / 3 + s^2 x^3 / 27 + s / 6 = quantile, the inverse of Hall's transformation."""
    if abs(skewness) < SMALLEST_SKEWNESS:
        return quantile
    return float((np.cbrt(1 + skewness * (quantile - skewness / 6)) - 1) * 3 / skewness)


def is_within_one_standard_error(losses: Floats, lowest: Floats, groups: ArrayLike | None = None) -> bool:
    """Return whether the mean of losses (N,) is within one standard error of that of `lowest` (N,), paired by row."""
    differences = losses - lowest
    return bool(differences.mean() <= standard_error(differences, groups) + ROUNDING)


def design_effect(values: ArrayLike, groups: ArrayLike | None) -> float:
    """Return the factor by which groups raise the variance of the mean of values (N,) over that of independent rows.

    It is at least 1, and 1 where `groups` is None or all values are equal (Kish 1965).
    """
    if groups is None:
        return 1.0
    row_error = standard_error(values)
    return max(1.0, (standard_error(values, groups) / row_error) ** 2) if row_error > 0 else 1.0
