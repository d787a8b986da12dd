"""Selective prediction: answer only confident rows, with a confidence threshold for a target error rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.core.errors import UserError
from utils.numeric.means import unit_indices
from utils.numeric.metrics import check_probabilities
from utils.numeric.proportions import upper_bound

TARGET_RISK = 0.05
"""Default of the target error rate of selective prediction."""
CONFIDENCE = 0.95
"""Probability with which the error rate of a threshold is at most the target."""
STEPS = 20
"""Number of thresholds that are tested, at equal fractions of the rows."""
MAX_CURVE_POINTS = 50
Floats = NDArray[np.float64]


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


def min_rows(target_risk: float) -> int | None:
    """Return the fewest rows, or groups, that can establish `target_risk` if none is wrong; None for a risk of 0."""
    if target_risk <= 0:
        return None
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - target_risk))


def confidence_threshold(
    probabilities: ArrayLike, labels: ArrayLike, target_risk: float, groups: ArrayLike | None = None
) -> float | None:
    """Return a confidence threshold at or above which rows have an error rate of at most `target_risk`.

    Takes probabilities (N, C) and labels (N,). The guarantee holds with probability 0.95 for new rows. Thresholds at
    equal fractions of the rows are tested in the order of decreasing confidence, by the exact upper bound of the error
    rate, up to the first that fails (fixed-sequence testing, Angelopoulos et al. 2021); the last that passed is
    returned. The sequence starts at the threshold that is most likely to pass if the confidences are calibrated, so
    that the start does not depend on labels. One row of each group (N,) is used, since rows of one group are not
    independent. None if the first test fails. Raises UserError for a `target_risk` outside [0, 1).
    """
    if not 0 <= target_risk < 1:
        raise UserError(f"target risk: found {target_risk}; expected an error rate from 0 to below 1, such as 0.05")
    scores, truth = check_probabilities(probabilities, labels)
    if groups is not None:
        rows = _one_of_each(unit_indices(len(truth), groups))
        scores, truth = scores[rows], truth[rows]
    confidence = scores.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    ordered = confidence[order]
    errors = np.cumsum(scores.argmax(axis=1)[order] != truth[order])
    ranks = np.unique(np.ceil(len(truth) * np.arange(1, STEPS + 1) / STEPS).astype(int))
    counts = np.unique(np.searchsorted(-ordered, -ordered[ranks - 1], side="right"))  # with equal confidences
    allowed = [_most_errors(count, target_risk) for count in counts.tolist()]
    start = _likeliest(counts, allowed, 1 - np.cumsum(ordered)[counts - 1] / counts)
    threshold = None
    for count, most in list(zip(counts.tolist(), allowed, strict=True))[start:]:
        if errors[count - 1] > most:
            break
        threshold = float(ordered[count - 1])
    return threshold


def _one_of_each(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the index of one row of each group, drawn with a fixed seed."""
    order = np.random.default_rng(0).permutation(len(groups))
    return np.asarray(order[np.unique(groups[order], return_index=True)[1]], dtype=np.int64)


def _most_errors(rows: int, target_risk: float) -> int:
    """Return the most errors in `rows` rows whose upper bound is at most the target risk; -1 for too few rows."""
    low, high = -1, rows
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if upper_bound(middle, rows, confidence=CONFIDENCE) <= target_risk else (low, middle)
    return low


def _likeliest(answered: NDArray[np.int64], allowed: Sequence[int], risks: Floats) -> int:
    """Return the index of the threshold that is passed with the highest probability, given these error rates.

    `answered` (T,), `allowed` (T,) and `risks` (T,) are the rows, the most errors and the error rate at each threshold.
    """
    from scipy.special import bdtr

    chances = [
        float(bdtr(most, count, min(max(risk, 0.0), 1.0))) if most >= 0 else 0.0
        for count, most, risk in zip(answered.tolist(), allowed, risks.tolist(), strict=True)
    ]
    return int(np.argmax(chances))


def selective_metrics(
    evaluated: tuple[ArrayLike, ArrayLike],
    calibration: tuple[ArrayLike, ArrayLike] | None,
    *,
    target_risk: float = TARGET_RISK,
    groups: ArrayLike | None = None,
) -> dict[str, Any]:
    """Return `{coverage, risk, aurc, threshold, confidence, target_risk, answered, error}` of selective prediction.

    `evaluated` and `calibration` are probabilities (N, C) and labels (N,) of rows. `coverage` and `risk` are at most 50
    points of the risk-coverage curve of the evaluated rows, and `aurc` is the mean risk of the whole curve. `threshold`
    is the `confidence_threshold` of the calibration rows with their `groups`, for `target_risk`; None without
    calibration rows or if no threshold passes. `answered` is the fraction of the evaluated rows that reach it, and
    `error` their error rate.
    """
    coverage, risk = risk_coverage(*evaluated)
    points = np.unique(np.linspace(0, len(coverage) - 1, min(MAX_CURVE_POINTS, len(coverage))).round().astype(int))
    limit = None if calibration is None else confidence_threshold(*calibration, target_risk, groups)
    scores, truth = check_probabilities(*evaluated)
    is_answered = np.zeros(len(truth), dtype=bool) if limit is None else scores.max(axis=1) >= limit
    is_wrong = scores.argmax(axis=1) != truth
    return {
        "coverage": coverage[points].tolist(),
        "risk": risk[points].tolist(),
        "aurc": float(risk.mean()),
        "threshold": limit,
        "confidence": CONFIDENCE,
        "target_risk": target_risk,
        "wanted_error": target_risk,  # the earlier name of `target_risk` in records
        "answered": None if limit is None else float(is_answered.mean()),
        "error": float(is_wrong[is_answered].mean()) if is_answered.any() else None,
    }
