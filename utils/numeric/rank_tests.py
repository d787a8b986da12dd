"""Tests of several methods over several data sets by their ranks (Demsar 2006): Friedman, Nemenyi, Wilcoxon.

Scores are (D, K): D data sets, K methods. Rank 1 is the best, and equal scores share the mean of their ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.numeric.metrics import ROUNDING

Floats = NDArray[np.float64]


def ranks(scores: ArrayLike, *, higher_is_better: bool) -> Floats:
    """Return the ranks (D, K) of the methods on each data set, from scores (D, K); differences by rounding are ties."""
    from scipy.stats import rankdata

    values = np.asarray(scores, dtype=np.float64).round(12)
    ranked: Floats = rankdata(-values if higher_is_better else values, axis=1)
    return ranked


@dataclass(frozen=True)
class FriedmanTest:
    """Whether the mean ranks of K methods differ."""

    chi_square: float
    """Friedman's statistic (1937) with K - 1 degrees of freedom, without correction for ties: conservative"""
    chi_square_p: float
    f: float | None
    """Statistic of Iman and Davenport (1980); None where the ranks are the same on all data sets (infinite)"""
    f_p: float
    degrees: tuple[int, int]
    """Of the F distribution"""


def friedman(ranked: Floats) -> FriedmanTest:
    """Test ranks (D, K) of at least two methods on at least two data sets."""
    from scipy.special import chdtrc, fdtrc

    sets, methods = ranked.shape
    means = ranked.mean(axis=0)
    scale = 12 * sets / (methods * (methods + 1))
    chi_square = float(scale * ((means**2).sum() - methods * (methods + 1) ** 2 / 4))
    degrees = (methods - 1, (methods - 1) * (sets - 1))
    rest = sets * (methods - 1) - chi_square
    f = (sets - 1) * chi_square / rest if rest > ROUNDING else None
    f_p = 0.0 if f is None else float(fdtrc(*degrees, max(0.0, f)))
    return FriedmanTest(chi_square, float(chdtrc(methods - 1, max(0.0, chi_square))), f, f_p, degrees)


def rank_error(sets: int, methods: int) -> float:
    """Return the standard error of the difference of two mean ranks, for these numbers of data sets and methods."""
    return float((methods * (methods + 1) / (6 * sets)) ** 0.5)


def critical_difference(sets: int, methods: int, *, alpha: float = 0.05) -> float:
    """Return the least significant difference of two mean ranks by Nemenyi's test (1963)."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(1 - alpha, methods, np.inf)) / 2**0.5 * rank_error(sets, methods)


def nemenyi_p(differences: ArrayLike, sets: int, methods: int) -> Floats:
    """Return Nemenyi's p-values (...,) of differences (...,) of mean ranks, corrected for all pairs of methods."""
    from scipy.stats import studentized_range

    statistic = np.abs(np.asarray(differences, dtype=np.float64)) / rank_error(sets, methods) * 2**0.5
    p_values: Floats = np.clip(studentized_range.sf(statistic, methods, np.inf), 0, 1)
    return p_values


def rank_difference_p(differences: ArrayLike, sets: int, methods: int) -> Floats:
    """Return two-sided p-values (...,) of differences (...,) of mean ranks to a control, without correction."""
    from scipy.special import ndtr

    p_values: Floats = 2 * ndtr(-np.abs(np.asarray(differences, dtype=np.float64)) / rank_error(sets, methods))
    return p_values


@dataclass(frozen=True)
class SignedRankTest:
    """Wilcoxon's signed-rank test (1945) of paired differences."""

    positive: float
    """Sum of the ranks of differences above 0, plus half of those of differences of 0"""
    negative: float
    """Sum of the ranks of differences below 0, plus half of those of differences of 0"""
    p_value: float
    """Two-sided and exact, given the ties"""


def signed_rank(differences: ArrayLike) -> SignedRankTest:
    """Test differences (D,); zeros are ranked but have no sign (Pratt 1959), and one of an odd number is left out.

    The exact distribution is over all assignments of signs to the ranks, also where ranks are tied.
    """
    from scipy.stats import rankdata

    values = np.asarray(differences, dtype=np.float64)
    zeros = np.flatnonzero(np.abs(values) <= ROUNDING)
    if len(zeros) % 2:
        values, zeros = np.delete(values, zeros[0]), zeros[1:]
    if not len(values) or len(values) == len(zeros):
        half = len(values) * (len(values) + 1) / 4
        return SignedRankTest(half, half, 1.0)
    is_zero = np.abs(values) <= ROUNDING
    ranked = rankdata(np.abs(values).round(12))
    shared = float(ranked[is_zero].sum()) / 2
    positive, negative = (float(ranked[~is_zero & side].sum()) for side in (values > 0, values < 0))
    doubled = np.rint(2 * ranked[~is_zero]).astype(np.int64)  # integers also where ranks are tied
    chances = np.ones(1)
    for step in doubled.tolist():
        longer = np.zeros(len(chances) + step)
        longer[: len(chances)] += chances / 2
        longer[step:] += chances / 2
        chances = longer
    lower = round(2 * min(positive, negative))
    p_value = min(1.0, 2 * float(chances[: lower + 1].sum()))
    return SignedRankTest(positive + shared, negative + shared, p_value)
