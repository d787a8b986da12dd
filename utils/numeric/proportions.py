"""Fractions of rows, such as accuracies and error rates: intervals, upper bounds and paired comparisons.

With `groups` (N,), rows of one group are not independent: counts are divided by the design effect of the groups, and
tests exchange whole groups.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.core.errors import UserError
from utils.numeric.means import LEVEL, MIN_UNITS, count_units, design_effect, unit_sums

MIN_TESTED_UNITS = 6
"""Fewest rows, or groups, for which a test can give a p-value below 0.05."""
MIN_DIFFERING = 6
"""Fewest differing rows, or groups, of two classifiers for which the interval of their difference is given."""


def proportion_interval(
    successes: ArrayLike, groups: ArrayLike | None = None, *, level: float = LEVEL
) -> tuple[float, float] | None:
    """Return Wilson's score interval (1927) of the fraction of rows (N,) that are successes.

    With groups (N,), the number of rows is divided by the design effect and Student's t replaces the normal quantile
    (Dean and Pavlou 2015); where all rows or none are successes, the number of groups is used as the number of rows.
    None for fewer than `MIN_UNITS` rows or groups.
    """
    from scipy.special import stdtrit

    hits = np.asarray(successes, dtype=np.float64)
    units = count_units(len(hits), groups)
    if units < MIN_UNITS:
        return None
    fraction = float(hits.mean())
    rows = units if fraction in (0, 1) else len(hits) / design_effect(hits, groups)
    z = _quantile(level) if groups is None else float(stdtrit(units - 1, (1 + level) / 2))
    return wilson_interval(fraction, rows, z)


def wilson_interval(fraction: float, rows: float, z: float | None = None) -> tuple[float, float]:
    """Return Wilson's score interval of a fraction of `rows` independent rows, at the quantile `z` (None: of 95%)."""
    z = _quantile(LEVEL) if z is None else z
    centre = (fraction + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z / (1 + z**2 / rows) * float(np.sqrt(fraction * (1 - fraction) / rows + z**2 / (4 * rows**2)))
    low = 0.0 if fraction == 0 else max(0.0, centre - half)
    return low, 1.0 if fraction == 1 else min(1.0, centre + half)


def difference_interval(
    hits: ArrayLike, others: ArrayLike, groups: ArrayLike | None = None, *, level: float = LEVEL
) -> tuple[float, float] | None:
    """Return the interval of the difference of two accuracies on the same rows, `hits` minus `others` (N,).

    It is Wald's interval with half a row added to each of the four counts (Agresti and Min 2005). With groups (N,),
    counts are divided by the design effect of the difference. None for fewer than `MIN_UNITS` rows or groups, and where
    the classifiers differ in fewer than `MIN_DIFFERING` of them.
    """
    from scipy.special import stdtrit

    differences = _differences(hits, others)
    units = count_units(len(differences), groups)
    if units < MIN_UNITS or count_differing(hits, others, groups) < MIN_DIFFERING:
        return None
    effect = design_effect(differences, groups)
    rows, first, second = (
        count / effect for count in (len(differences), (differences > 0).sum(), (differences < 0).sum())
    )
    p_first, p_second = (first + 0.5) / (rows + 2), (second + 0.5) / (rows + 2)
    difference = p_first - p_second
    z = _quantile(level) if groups is None else float(stdtrit(units - 1, (1 + level) / 2))
    half = z * float(np.sqrt((p_first + p_second - difference**2) / (rows + 2)))
    return max(-1.0, float(difference) - half), min(1.0, float(difference) + half)


def count_differing(hits: ArrayLike, others: ArrayLike, groups: ArrayLike | None = None) -> int:
    """Return the number of rows, or of groups (N,), in which the numbers of hits (N,) of two classifiers differ."""
    return int((np.abs(unit_sums(_differences(hits, others), groups)) > 0.5).sum())


def sign_flip_p(hits: ArrayLike, others: ArrayLike, groups: ArrayLike | None = None) -> float | None:
    """Return the two-sided exact p-value of the hypothesis that two classifiers have the same accuracy.

    `hits` and `others` (N,) state which rows each classifies correctly. The classifiers are exchanged at random within
    each row, or within each group (N,) as a whole (sign-flip permutation test, Fisher 1935). The exact distribution of
    the difference is computed from its characteristic function. Without groups this is McNemar's exact test (1947). 1
    if the classifiers do not differ; None for fewer than 6 rows or groups. Raises UserError for different shapes.
    """
    sums = unit_sums(_differences(hits, others), groups)
    if len(sums) < MIN_TESTED_UNITS:
        return None
    sizes, counts = np.unique(np.abs(np.rint(sums[sums != 0])).astype(np.int64), return_counts=True)
    total = int(sizes @ counts)
    if not total:
        return 1.0
    length = 2 * total + 1  # differences from -total to total
    angles = 2 * np.pi * np.arange(length) / length
    characteristic = np.prod(np.cos(np.outer(sizes, angles)) ** counts[:, None], axis=0)
    chances = np.fft.fft(characteristic).real / length
    observed = abs(int(np.rint(sums.sum())))
    return float(np.clip(chances[observed : length - observed + 1].sum(), 0, 1)) if observed else 1.0


def upper_bound(errors: int, rows: int, *, confidence: float) -> float:
    """Return the exact upper bound of an error rate from errors among independent rows (Clopper and Pearson 1934)."""
    from scipy.special import betaincinv

    return 1.0 if errors >= rows else float(betaincinv(errors + 1, rows - errors, confidence))


def _differences(hits: ArrayLike, others: ArrayLike) -> NDArray[np.float64]:
    first, second = np.asarray(hits, dtype=bool), np.asarray(others, dtype=bool)
    if first.shape != second.shape:
        raise UserError(f"paired comparison: found {first.shape} and {second.shape} rows; expected the same rows")
    return first.astype(np.float64) - second


def _quantile(level: float) -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + level) / 2))
