"""Uncertainty of predictions: conformal prediction sets, selective prediction and out-of-distribution (OOD) scores.

Thresholds are fitted on calibration rows, which are val rows in out-of-sample predictions. They hold for other rows as
far as both have the same distribution. Val rows also selected the members' epochs, which flatters them slightly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.core.errors import UserError
from utils.numeric.metrics import check_probabilities

ALPHA = 0.1
"""Default of the fraction of rows that prediction sets may fail to cover."""
TARGET_RISK = 0.05
"""Default of the error rate that selective prediction aims at."""
MAX_CURVE_POINTS = 50
COUNT_TOLERANCE = 1e-9  # rounding of products that are compared with whole numbers or scores
MIN_ENERGY_RANGE = 1e-4  # a smaller range of energies is rounding
Floats = NDArray[np.float64]


def lac_scores(probabilities: Floats) -> Floats:
    """Return the nonconformity of each class, (N, C): 1 - p (least ambiguous sets, Sadinle et al. 2019)."""
    scores: Floats = 1 - probabilities
    return scores


def aps_scores(probabilities: Floats) -> Floats:
    """Return the nonconformity of each class, (N, C): the summed probability of all classes at least as probable.

    These are adaptive prediction sets (Romano et al. 2020) without the randomised part, so that sets are reproducible
    and cover slightly more than 1 - alpha. Equally probable classes get the same score, which is at most 1.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ordered = np.take_along_axis(probabilities, order, axis=1)
    sums = np.minimum(np.cumsum(ordered, axis=1), 1.0)
    for column in range(ordered.shape[1] - 2, -1, -1):  # an equally probable class further on counts as well
        is_equal = ordered[:, column] == ordered[:, column + 1]
        sums[is_equal, column] = sums[is_equal, column + 1]
    scores = np.empty_like(sums)
    np.put_along_axis(scores, order, sums, axis=1)
    return scores


NONCONFORMITY_SCORES: dict[str, Callable[[Floats], Floats]] = {"lac": lac_scores, "aps": aps_scores}
"""Kinds of prediction sets: function of probabilities (N, C) -> nonconformity scores (N, C)."""


def conformal_threshold(scores: ArrayLike, alpha: float = ALPHA) -> float | None:
    """Return the score that a new row's true class exceeds with probability at most `alpha`.

    It is the ceil((n + 1)(1 - alpha))-th smallest of the calibration rows' scores (n,) (Vovk et al. 2005); None for
    fewer than 1 / alpha - 1 rows, which allow no finite threshold. Raises UserError for an `alpha` outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise UserError(f"alpha: found {alpha}; expected a fraction of rows between 0 and 1, such as 0.1")
    values = np.sort(np.asarray(scores, dtype=np.float64))
    rank = _threshold_rank(len(values), alpha)
    return None if rank > len(values) else float(values[rank - 1])


def min_calibration_rows(alpha: float) -> int:
    """Return the smallest number of calibration rows for which `conformal_threshold` is finite."""
    return math.ceil(1 / alpha - 1 - COUNT_TOLERANCE)


def prediction_sets(kind: str, probabilities: ArrayLike, limits: float | ArrayLike) -> NDArray[np.bool_]:
    """Return which classes the prediction set of each row holds, (N, C).

    `limits` is one threshold, or one per class (C,). The most probable class always is in the set; a class whose
    threshold is NaN is in every set.
    """
    scores = np.asarray(probabilities, dtype=np.float64)
    thresholds = np.asarray(limits, dtype=np.float64)
    sets = (NONCONFORMITY_SCORES[kind](scores) <= thresholds + COUNT_TOLERANCE) | np.isnan(thresholds)
    sets[np.arange(len(scores)), scores.argmax(axis=1)] = True
    return sets


def coverage_interval(calibrated: int, rows: int, alpha: float = ALPHA) -> list[float]:
    """Return the central 95 % interval of the coverage on `rows` new rows, given the number of calibration rows.

    The number of covered rows is beta-binomial (Vovk 2012) for exchangeable rows and scores without ties; ties only
    raise it.
    """
    from scipy.special import betaln, gammaln

    rank = _threshold_rank(calibrated, alpha)
    n_below, n_above = rank, calibrated + 1 - rank
    covered = np.arange(rows + 1)
    ways = gammaln(rows + 1) - gammaln(covered + 1) - gammaln(rows - covered + 1)
    density = np.exp(ways + betaln(covered + n_below, rows - covered + n_above) - betaln(n_below, n_above))
    cumulative = np.cumsum(density)
    return [float(np.searchsorted(cumulative, quantile)) / rows for quantile in (0.025, 0.975)]


def _threshold_rank(rows: int, alpha: float) -> int:
    return math.ceil((rows + 1) * (1 - alpha) - COUNT_TOLERANCE)


def conformal_metrics(
    kind: str,
    calibration: tuple[ArrayLike, ArrayLike],
    evaluated: tuple[ArrayLike, ArrayLike],
    *,
    alpha: float = ALPHA,
) -> dict[str, Any] | None:
    """Return `{alpha, threshold, n, coverage, coverage_interval, mean_size}` of split-conformal sets of a `kind`.

    `calibration` and `evaluated` are probabilities (N, C) and labels (N,); `n` is the number of calibration rows. See
    the function `coverage_interval` for the interval. None if there are too few calibration rows.
    """
    scores, truth = check_probabilities(*calibration)
    limit = conformal_threshold(NONCONFORMITY_SCORES[kind](scores)[np.arange(len(truth)), truth], alpha)
    if limit is None:
        return None
    probabilities, labels = check_probabilities(*evaluated)
    sets = prediction_sets(kind, probabilities, limit)
    return {
        "alpha": alpha,
        "threshold": limit,
        "n": len(truth),
        "coverage": float(sets[np.arange(len(labels)), labels].mean()),
        "coverage_interval": coverage_interval(len(truth), len(labels), alpha),
        "mean_size": float(sets.sum(axis=1).mean()),
    }


def class_conditional_metrics(
    kind: str,
    calibration: tuple[ArrayLike, ArrayLike],
    evaluated: tuple[ArrayLike, ArrayLike],
    classes: tuple[str, ...],
    *,
    alpha: float = ALPHA,
) -> dict[str, Any]:
    """Return metrics of sets with one threshold per class, so that each class is covered (Mondrian, Vovk 2012).

    `{alpha, mean_size, coverage, classes: {class: {threshold, n, coverage, coverage_interval, note}}}`. A class with
    fewer than 1 / alpha - 1 calibration rows has no threshold and is in every set, as its `note` states.
    """
    scores, truth = check_probabilities(*calibration)
    true_scores = NONCONFORMITY_SCORES[kind](scores)[np.arange(len(truth)), truth]
    limits = [conformal_threshold(true_scores[truth == index], alpha) for index in range(len(classes))]
    probabilities, labels = check_probabilities(*evaluated)
    sets = prediction_sets(kind, probabilities, np.array([math.nan if limit is None else limit for limit in limits]))
    covered = sets[np.arange(len(labels)), labels]
    needed = min_calibration_rows(alpha)
    by_class: dict[str, Any] = {}
    for index, name in enumerate(classes):
        calibrated, rows = int((truth == index).sum()), int((labels == index).sum())
        too_few = f"too few rows: {calibrated} val rows, and {alpha:g} needs {needed}; it is in every set"
        is_measurable = rows > 0 and limits[index] is not None
        by_class[name] = {
            "threshold": limits[index],
            "n": calibrated,
            "coverage": float(covered[labels == index].mean()) if rows else None,
            "coverage_interval": coverage_interval(calibrated, rows, alpha) if is_measurable else None,
            "note": too_few if limits[index] is None else None,
        }
    mean_size = float(sets.sum(axis=1).mean())
    return {"alpha": alpha, "mean_size": mean_size, "coverage": float(covered.mean()), "classes": by_class}


def risk_coverage(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """Return the risk-coverage curve: coverage (N,) and error rate (N,) of the 1, 2, ... N most confident rows.

    Rows of equal confidence are interpolated linearly, so that their order does not matter (El-Yaniv and Wiener 2010).
    """
    scores, truth = check_probabilities(probabilities, labels)
    confidence = scores.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(confidence[order]) < 0), len(truth) - 1)
    errors = np.cumsum(scores.argmax(axis=1)[order] != truth[order])
    n_answered = np.arange(1, len(truth) + 1)
    interpolated = np.interp(n_answered, np.append(0, ends + 1), np.append(0, errors[ends]))
    return n_answered / len(truth), interpolated / n_answered


def confidence_threshold(probabilities: ArrayLike, labels: ArrayLike, target_risk: float) -> float | None:
    """Return the lowest confidence whose rows and all more confident ones have an error rate of at most `target_risk`.

    None if no confidence does. Raises UserError for a `target_risk` outside [0, 1).
    """
    if not 0 <= target_risk < 1:
        raise UserError(f"target risk: found {target_risk}; expected an error rate from 0 to below 1, such as 0.05")
    scores, truth = check_probabilities(probabilities, labels)
    confidence = scores.max(axis=1)
    levels, level_of_row = np.unique(confidence, return_inverse=True)
    errors = np.bincount(level_of_row, weights=scores.argmax(axis=1) != truth)[::-1].cumsum()[::-1]
    n_answered = np.bincount(level_of_row)[::-1].cumsum()[::-1]
    allowed = np.flatnonzero(errors <= target_risk * n_answered + COUNT_TOLERANCE)
    return float(levels[allowed[0]]) if len(allowed) else None


def selective_metrics(
    evaluated: tuple[ArrayLike, ArrayLike],
    calibration: tuple[ArrayLike, ArrayLike] | None,
    *,
    target_risk: float = TARGET_RISK,
) -> dict[str, Any]:
    """Return `{coverage, risk, aurc, threshold, target_risk, answered, error}` of selective prediction.

    `coverage` and `risk` are at most 50 points of the risk-coverage curve of the evaluated rows, and `aurc` is the mean
    risk of the whole curve. `threshold` is the `confidence_threshold` of the calibration rows for `target_risk`; None
    without calibration rows or if no confidence qualifies. `answered` is the fraction of the evaluated rows that reach
    it, and `error` their error rate.
    """
    coverage, risk = risk_coverage(*evaluated)
    points = np.unique(np.linspace(0, len(coverage) - 1, min(MAX_CURVE_POINTS, len(coverage))).round().astype(int))
    limit = None if calibration is None else confidence_threshold(*calibration, target_risk)
    scores, truth = check_probabilities(*evaluated)
    is_answered = np.zeros(len(truth), dtype=bool) if limit is None else scores.max(axis=1) >= limit
    is_wrong = scores.argmax(axis=1) != truth
    return {
        "coverage": coverage[points].tolist(),
        "risk": risk[points].tolist(),
        "aurc": float(risk.mean()),
        "threshold": limit,
        "target_risk": target_risk,
        "wanted_error": target_risk,  # the earlier name of `target_risk` in records
        "answered": None if limit is None else float(is_answered.mean()),
        "error": float(is_wrong[is_answered].mean()) if is_answered.any() else None,
    }


def ood_scores(logits: ArrayLike) -> Floats:
    """Return two OOD scores of each row from its logits (N, C): the energy and minus the largest logit, (2, N).

    The energy is -log(sum(exp(logits))) (Liu et al. 2020). Both are high for rows unlike the training data.
    """
    values = np.asarray(logits, dtype=np.float64)
    highest = values.max(axis=-1)
    return np.stack([-(highest + np.log(np.exp(values - highest[..., None]).sum(axis=-1))), -highest])


def ood_summary(rows: Floats, reference: Floats) -> dict[str, Any] | None:
    """Return how many rows look OOD, by the `ood_scores` (2, N) of rows and (2, R) of reference rows, or their means.

    `{energy, max_logit: {reference, beyond}}`: the 95 % quantile of the reference rows, as an energy and as a logit,
    and the fraction of rows beyond it, which is about 0.05 if both have the same distribution. This is a hint and no
    test, since networks can be confident on OOD images. None if the logits are log-probabilities, whose energy is 0.
    """
    if np.ptp(reference[0]) < MIN_ENERGY_RANGE:
        return None
    summary = {}
    for name, row_scores, reference_scores, sign in zip(("energy", "max_logit"), rows, reference, (1, -1), strict=True):
        bound = float(np.quantile(reference_scores, 0.95))
        summary[name] = {"reference": sign * bound, "beyond": float((row_scores > bound).mean())}
    return summary
