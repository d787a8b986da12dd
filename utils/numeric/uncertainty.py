"""Uncertainty of predictions: conformal prediction sets and out-of-distribution (OOD) scores.

Thresholds are fitted on calibration rows: val rows with out-of-sample predictions. They are valid for other rows of the
same distribution. Val rows also selected the members' epochs, so that their predictions are slightly optimistic.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.core.errors import UserError
from utils.numeric.means import MIN_UNITS, count_units, unit_indices
from utils.numeric.metrics import check_probabilities

ALPHA = 0.1
"""Default of the fraction of rows that prediction sets may fail to cover."""
RAPS_PENALTY, RAPS_FREE = 0.01, 1
"""`raps_scores` add the penalty for each more probable class beyond the first `RAPS_FREE`."""
COUNT_TOLERANCE = 1e-9  # rounding error of products that are compared with integers or scores
OOD_FRACTION = 0.05  # of rows like the reference that lie beyond it
MIN_ENERGY_RANGE = 1e-4  # a smaller range of energies is rounding error
Floats = NDArray[np.float64]


def lac_scores(probabilities: Floats, uniforms: Floats | None = None) -> Floats:
    """Return the nonconformity of each class, (N, C): 1 - p (least ambiguous sets, Sadinle et al. 2019)."""
    scores: Floats = 1 - probabilities
    return scores


def aps_scores(probabilities: Floats, uniforms: Floats | None = None) -> Floats:
    """Return the nonconformity of each class, (N, C): the summed probability of all classes at least as probable.

    These are adaptive prediction sets (Romano et al. 2020) without the randomised part, so that sets are reproducible
    and cover slightly more than 1 - alpha. Equally probable classes get the same score, which is at most 1.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ordered = np.take_along_axis(probabilities, order, axis=1)
    sums = np.minimum(np.cumsum(ordered, axis=1), 1.0)
    for column in reversed(range(ordered.shape[1] - 1)):  # include later classes of equal probability
        is_equal = ordered[:, column] == ordered[:, column + 1]
        sums[is_equal, column] = sums[is_equal, column + 1]
    scores = np.empty_like(sums)
    np.put_along_axis(scores, order, sums, axis=1)
    return scores


def raps_scores(probabilities: Floats, uniforms: Floats | None = None) -> Floats:
    """Return the nonconformity of each class, (N, C), of regularised adaptive sets (RAPS, Angelopoulos et al. 2021).

    It is the summed probability of all more probable classes, plus a random fraction of the class's probability, plus
    0.01 for each more probable class beyond the first. `uniforms` (N,) are the random fractions, see `uniform_numbers`;
    1/2 where `uniforms` is None. Coverage is 1 - alpha, unless the most probable class alone covers more.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ordered = np.take_along_axis(probabilities, order, axis=1)
    part = 0.5 if uniforms is None else np.asarray(uniforms, dtype=np.float64)[:, None]
    penalties = RAPS_PENALTY * np.maximum(np.arange(probabilities.shape[1]) - RAPS_FREE, 0)
    sums = np.cumsum(ordered, axis=1) - ordered + part * ordered + penalties
    scores = np.empty_like(sums)
    np.put_along_axis(scores, order, sums, axis=1)
    return scores


def uniform_numbers(names: Iterable[str]) -> Floats:
    """Return a number (N,) in [0, 1) for each name, derived from its SHA-256, so that equal names get equal numbers.

    Names are the digests of images' contents, or sample ids where there are no images.
    """
    digests = (hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names)
    return np.array([int.from_bytes(digest[:6], "big") / 2**48 for digest in digests])


NONCONFORMITY_SCORES: dict[str, Callable[[Floats, Floats | None], Floats]] = {
    "lac": lac_scores,
    "aps": aps_scores,
    "raps": raps_scores,
}
"""Kinds of prediction sets: function of probabilities (N, C) and uniform numbers (N,) -> nonconformity (N, C)."""


def conformal_threshold(scores: ArrayLike, alpha: float = ALPHA, groups: ArrayLike | None = None) -> float | None:
    """Return the score that a new row's true class exceeds with probability at most `alpha`.

    It is the ceil((n + 1)(1 - alpha))-th smallest of the calibration rows' scores (n,) (Vovk et al. 2005); None for
    fewer than 1 / alpha - 1 rows, which allow no finite threshold. With `groups` (n,), each group has the same weight,
    shared by its rows, and the new row is from a new group (hierarchical conformal prediction, Lee et al. 2023); the
    count is then that of groups. Raises UserError for an `alpha` outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise UserError(f"alpha: found {alpha}; expected a fraction of rows between 0 and 1, such as 0.1")
    values = np.asarray(scores, dtype=np.float64)
    if groups is not None:
        return _grouped_threshold(values, alpha, unit_indices(len(values), groups))
    ordered = np.sort(values)
    rank = _threshold_rank(len(ordered), alpha)
    return None if rank > len(ordered) else float(ordered[rank - 1])


def _grouped_threshold(scores: Floats, alpha: float, groups: NDArray[np.int64]) -> float | None:
    sizes = np.bincount(groups)
    order = np.argsort(scores, kind="stable")
    below = np.cumsum(1 / sizes[groups[order]])  # in groups
    index = int(np.searchsorted(below, (len(sizes) + 1) * (1 - alpha) - COUNT_TOLERANCE))
    return None if index >= len(scores) else float(scores[order[index]])


def min_calibration_rows(alpha: float) -> int:
    """Return the smallest number of calibration rows, or groups, for which `conformal_threshold` is finite."""
    return math.ceil(1 / alpha - 1 - COUNT_TOLERANCE)


def prediction_sets(
    kind: str, probabilities: ArrayLike, limits: float | ArrayLike, uniforms: Floats | None = None
) -> NDArray[np.bool_]:
    """Return which classes are in the prediction set of each row, bool (N, C), from probabilities (N, C).

    `limits` is one threshold, or one per class (C,), and `uniforms` (N,) are the rows' `uniform_numbers`. The most
    probable class is always in the set; a class whose threshold is NaN is in every set.
    """
    values = np.asarray(probabilities, dtype=np.float64)
    return _sets(NONCONFORMITY_SCORES[kind](values, uniforms), values, limits)


def _sets(scores: Floats, probabilities: Floats, limits: float | ArrayLike) -> NDArray[np.bool_]:
    """Return the sets (N, C) of rows with these nonconformity scores (N, C)."""
    thresholds = np.asarray(limits, dtype=np.float64)
    sets = (scores <= thresholds + COUNT_TOLERANCE) | np.isnan(thresholds)
    sets[np.arange(len(scores)), probabilities.argmax(axis=1)] = True
    return sets


def coverage_interval(calibrated: int, rows: int, alpha: float = ALPHA, *, covered_by_rank: int = 0) -> list[float]:
    """Return the central 95% interval of the coverage on `rows` new rows, given the number of calibration rows.

    The number of rows that the threshold covers is beta-binomial (Vovk 2012) for exchangeable rows and scores without
    ties; ties only raise it. `covered_by_rank` further rows are covered only because the most probable class is always
    in the set.
    """
    from scipy.special import betaln, gammaln

    rank = _threshold_rank(calibrated, alpha)
    n_below, n_above = rank, calibrated + 1 - rank
    covered = np.arange(rows + 1)
    log_combinations = gammaln(rows + 1) - gammaln(covered + 1) - gammaln(rows - covered + 1)
    density = np.exp(log_combinations + betaln(covered + n_below, rows - covered + n_above) - betaln(n_below, n_above))
    cumulative = np.cumsum(density)
    bounds = [int(np.searchsorted(cumulative, quantile)) + covered_by_rank for quantile in (0.025, 0.975)]
    return [min(1.0, bound / rows) for bound in bounds]


def _threshold_rank(rows: int, alpha: float) -> int:
    return math.ceil((rows + 1) * (1 - alpha) - COUNT_TOLERANCE)


@dataclass(frozen=True)
class LabelledRows:
    """Probabilities, labels, random numbers and groups of rows, for conformal sets."""

    probabilities: ArrayLike
    """(N, C)"""
    labels: ArrayLike
    """(N,)"""
    uniforms: Floats | None = None
    """`uniform_numbers` (N,)"""
    groups: ArrayLike | None = None
    """Group of each row (N,); None where rows are independent"""

    def nonconformity(self, kind: str) -> tuple[Floats, NDArray[np.int64]]:
        """Return the scores (N,) of the true classes, and the labels (N,)."""
        scores, truth = check_probabilities(self.probabilities, self.labels)
        return NONCONFORMITY_SCORES[kind](scores, self.uniforms)[np.arange(len(truth)), truth], truth


def conformal_metrics(
    kind: str, calibration: LabelledRows, evaluated: LabelledRows, *, alpha: float = ALPHA
) -> dict[str, Any] | None:
    """Return `{alpha, threshold, n, coverage, coverage_interval, mean_size}` of split-conformal sets of a `kind`.

    `n` is the number of calibration rows. The function `coverage_interval` describes the interval, which is None where
    rows come in groups. Returns None if there are too few calibration rows or groups.
    """
    true_scores, truth = calibration.nonconformity(kind)
    limit = conformal_threshold(true_scores, alpha, calibration.groups)
    if limit is None:
        return None
    sets = _EvaluatedSets.of(kind, evaluated, limit)
    is_grouped = calibration.groups is not None or evaluated.groups is not None
    by_rank = int(sets.covered_by_rank.sum())
    interval = None if is_grouped else coverage_interval(len(truth), len(sets.labels), alpha, covered_by_rank=by_rank)
    return {
        "alpha": alpha,
        "threshold": limit,
        "n": len(truth),
        "coverage": float(sets.covered.mean()),
        "coverage_interval": interval,
        "mean_size": sets.mean_size,
    }


def class_conditional_metrics(
    kind: str, calibration: LabelledRows, evaluated: LabelledRows, classes: tuple[str, ...], *, alpha: float = ALPHA
) -> dict[str, Any]:
    """Return metrics of sets with one threshold per class, so that each class is covered (Mondrian, Vovk 2012).

    Returns `{alpha, mean_size, coverage, classes: {class: {threshold, n, coverage, coverage_interval, note}}}`. A class
    with fewer than 1 / alpha - 1 calibration rows or groups has no threshold and is in every set, as its `note` states.
    """
    true_scores, truth = calibration.nonconformity(kind)
    groups = None if calibration.groups is None else np.asarray(calibration.groups)
    limits = [
        conformal_threshold(true_scores[truth == index], alpha, None if groups is None else groups[truth == index])
        for index in range(len(classes))
    ]
    sets = _EvaluatedSets.of(kind, evaluated, np.array([math.nan if limit is None else limit for limit in limits]))
    is_grouped = groups is not None or evaluated.groups is not None
    needed, unit = min_calibration_rows(alpha), "rows" if groups is None else "groups"
    by_class: dict[str, Any] = {}
    for index, name in enumerate(classes):
        is_calibration_row, is_row = truth == index, sets.labels == index
        calibrated, rows = int(is_calibration_row.sum()), int(is_row.sum())
        units = calibrated if groups is None else len(np.unique(groups[is_calibration_row]))
        too_few = f"too few {unit}: {units} val {unit}, and {alpha:g} needs {needed}; it is in every set"
        interval = None
        if rows > 0 and limits[index] is not None and not is_grouped:
            by_rank = int(sets.covered_by_rank[is_row].sum())
            interval = coverage_interval(calibrated, rows, alpha, covered_by_rank=by_rank)
        by_class[name] = {
            "threshold": limits[index],
            "n": calibrated,
            "coverage": float(sets.covered[is_row].mean()) if rows else None,
            "coverage_interval": interval,
            "note": too_few if limits[index] is None else None,
        }
    return {
        "alpha": alpha,
        "mean_size": sets.mean_size,
        "coverage": float(sets.covered.mean()),
        "classes": by_class,
    }


@dataclass(frozen=True)
class _EvaluatedSets:
    """Coverage and size of the prediction sets of labelled rows."""

    labels: NDArray[np.int64]
    """(N,)"""
    covered: NDArray[np.bool_]
    """(N,): whether the true class is in the set"""
    covered_by_rank: NDArray[np.bool_]
    """(N,): whether it is in the set only because it is the most probable class"""
    mean_size: float

    @classmethod
    def of(cls, kind: str, evaluated: LabelledRows, limits: float | Floats) -> _EvaluatedSets:
        """Evaluate the sets by `limits`: one threshold, or one per class (C,) with NaN where a class has none."""
        probabilities, labels = check_probabilities(evaluated.probabilities, evaluated.labels)
        scores = NONCONFORMITY_SCORES[kind](probabilities, evaluated.uniforms)
        sets, true_class = _sets(scores, probabilities, limits), (np.arange(len(labels)), labels)
        covered = sets[true_class]
        thresholds = np.broadcast_to(limits, scores.shape[1])[labels]
        is_beyond = scores[true_class] > thresholds + COUNT_TOLERANCE
        return cls(labels, covered, covered & is_beyond, float(sets.sum(axis=1).mean()))


def ood_scores(logits: ArrayLike) -> Floats:
    """Return two OOD scores of each row from its logits (N, C): the energy and minus the largest logit, (2, N).

    The energy is -log(sum(exp(logits))) (Liu et al. 2020). Both are high for rows unlike the training data.
    """
    values = np.asarray(logits, dtype=np.float64)
    highest = values.max(axis=-1)
    return np.stack([-(highest + np.log(np.exp(values - highest[..., None]).sum(axis=-1))), -highest])


def has_too_few_groups(rows: int, groups: ArrayLike | None) -> bool:
    """Return whether rows come in fewer than `MIN_UNITS` groups (N,); False where `groups` is None."""
    return groups is not None and count_units(rows, groups) < MIN_UNITS


def ood_summary(rows: Floats, reference: Floats, groups: ArrayLike | None = None) -> dict[str, Any] | None:
    """Return the fraction of rows that look OOD, from `ood_scores` (2, N) of rows and (2, R) of reference rows.

    The scores may be means over members. Returns `{energy, max_logit: {reference, beyond}}`: a quantile of the
    reference rows, as an energy and as a logit, and the fraction of rows beyond it, which is about 0.05 if both have
    the same distribution. The quantile is the score that a new row exceeds with a probability of at most 0.05
    (`conformal_threshold`); with too few reference rows it is the largest score. This is a hint, not a test, since
    networks can be confident on OOD images. None if the logits are log-probabilities, whose energy is 0, or if the
    reference rows come in fewer than `MIN_UNITS` groups (R,), too few to show the variance between groups.
    """
    if np.ptp(reference[0]) < MIN_ENERGY_RANGE or has_too_few_groups(reference.shape[1], groups):
        return None
    summary = {}
    for name, row_scores, reference_scores, sign in zip(("energy", "max_logit"), rows, reference, (1, -1), strict=True):
        threshold = conformal_threshold(reference_scores, OOD_FRACTION)
        bound = float(reference_scores.max()) if threshold is None else threshold
        summary[name] = {"reference": sign * bound, "beyond": float((row_scores > bound).mean())}
    return summary
