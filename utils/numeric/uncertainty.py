"""What a prediction is worth: sets that hold the true class, when to abstain, what is foreign.

Thresholds are found on calibration rows, which are val rows that the same networks have not been trained on, and say
something about other rows as far as both are drawn alike. Val rows also chose the members' epochs; that flatters them a
little.
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
TARGET_RISK = 0.05
MAX_CURVE_POINTS = 50
ROUNDING = 1e-9
MIN_ENERGY_RANGE = 1e-4  # a spread of energies that rounding alone makes
Floats = NDArray[np.float64]


def lac_scores(probabilities: Floats) -> Floats:
    """How little each class fits, (N, C): 1 - p (Sadinle et al. 2019, least ambiguous sets)."""
    found: Floats = 1 - probabilities
    return found


def aps_scores(probabilities: Floats) -> Floats:
    """How little each class fits, (N, C): the summed probability of all classes at least as probable as it.

    Adaptive prediction sets (Romano et al. 2020) without their random part, so that a set never depends on chance and
    covers rather more than wanted. Equal classes count for one another; never above 1.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ordered = np.take_along_axis(probabilities, order, axis=1)
    sums = np.minimum(np.cumsum(ordered, axis=1), 1.0)
    for place in range(ordered.shape[1] - 2, -1, -1):  # an equal one further on counts as well
        equal = ordered[:, place] == ordered[:, place + 1]
        sums[equal, place] = sums[equal, place + 1]
    found = np.empty_like(sums)
    np.put_along_axis(found, order, sums, axis=1)
    return found


NONCONFORMITY_SCORES: dict[str, Callable[[Floats], Floats]] = {"lac": lac_scores, "aps": aps_scores}
"""Ways to make prediction sets: probabilities (N, C) -> scores (N, C), small where a class fits."""


def conformal_threshold(scores: ArrayLike, alpha: float = ALPHA) -> float | None:
    """The score that the true class of a new row stays within with probability 1 - alpha, from those of others (n,).

    The ceil((n + 1)(1 - alpha))-th smallest (Vovk et al. 2005); None for fewer than 1 / alpha - 1 rows, which no
    finite score can promise anything for. UserError for an `alpha` that is no share.
    """
    if not 0 < alpha < 1:
        raise UserError(f"alpha: found {alpha}; expected a share of rows between 0 and 1, such as 0.1")
    values = np.sort(np.asarray(scores, dtype=np.float64))
    place = _place(len(values), alpha)
    return None if place > len(values) else float(values[place - 1])


def min_calibration_rows(alpha: float) -> int:
    """How many calibration rows `threshold` needs at least."""
    return math.ceil(1 / alpha - 1 - ROUNDING)


def prediction_sets(kind: str, probabilities: ArrayLike, limits: float | ArrayLike) -> NDArray[np.bool_]:
    """Which classes the set of each row holds, (N, C): those of scores up to a threshold, or to those of classes (C,).

    The most probable class always is in it; a NaN among the thresholds of classes lets its class in everywhere.
    """
    scores = np.asarray(probabilities, dtype=np.float64)
    bounds = np.asarray(limits, dtype=np.float64)
    found = (NONCONFORMITY_SCORES[kind](scores) <= bounds + ROUNDING) | np.isnan(bounds)
    found[np.arange(len(scores)), scores.argmax(axis=1)] = True
    return found


def coverage_interval(calibrated: int, rows: int, alpha: float = ALPHA) -> list[float]:
    """Where the share of covered rows among `rows` new ones lies with probability 95 %, if all are drawn alike.

    The number covered is beta-binomial (Vovk 2012) for scores without ties; ties only add to it.
    """
    from scipy.special import betaln, gammaln

    place = _place(calibrated, alpha)
    hit, missed = place, calibrated + 1 - place
    covered = np.arange(rows + 1)
    ways = gammaln(rows + 1) - gammaln(covered + 1) - gammaln(rows - covered + 1)
    below = np.cumsum(np.exp(ways + betaln(covered + hit, rows - covered + missed) - betaln(hit, missed)))
    return [float(np.searchsorted(below, share)) / rows for share in (0.025, 0.975)]


def _place(rows: int, alpha: float) -> int:
    return math.ceil((rows + 1) * (1 - alpha) - ROUNDING)


def conformal_metrics(
    kind: str,
    calibration: tuple[ArrayLike, ArrayLike],
    evaluated: tuple[ArrayLike, ArrayLike],
    *,
    alpha: float = ALPHA,
) -> dict[str, Any] | None:
    """`{alpha, threshold, n, coverage, coverage_interval, mean_size}` of split-conformal sets, lac or aps.

    `calibration` and `evaluated` are probabilities (N, C) and labels (N,); `n` counts the calibration rows and
    `coverage_interval` is that of `coverage_interval`. None where there are too few of them.
    """
    scores, truth = check_probabilities(*calibration)
    limit = conformal_threshold(NONCONFORMITY_SCORES[kind](scores)[np.arange(len(truth)), truth], alpha)
    if limit is None:
        return None
    others, labels = check_probabilities(*evaluated)
    sets = prediction_sets(kind, others, limit)
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
    """Sets with a threshold of its own for each class, so that each is covered as wanted (Vovk 2012).

    `{alpha, mean_size, coverage, classes: {class: {threshold, n, coverage, coverage_interval, note}}}`. A class with
    fewer than 1 / alpha - 1 calibration rows has no threshold, is in every set and says so in `note`.
    """
    scores, truth = check_probabilities(*calibration)
    own = NONCONFORMITY_SCORES[kind](scores)[np.arange(len(truth)), truth]
    limits = [conformal_threshold(own[truth == number], alpha) for number in range(len(classes))]
    others, labels = check_probabilities(*evaluated)
    sets = prediction_sets(kind, others, np.array([math.nan if limit is None else limit for limit in limits]))
    covered = sets[np.arange(len(labels)), labels]
    table: dict[str, Any] = {}
    needed = min_calibration_rows(alpha)
    for number, name in enumerate(classes):
        calibrated, there = int((truth == number).sum()), int((labels == number).sum())
        too_few = f"too few rows: {calibrated} val rows, and {alpha:g} needs {needed}; it is in every set"
        measurable = there > 0 and limits[number] is not None
        table[name] = {
            "threshold": limits[number],
            "n": calibrated,
            "coverage": float(covered[labels == number].mean()) if there else None,
            "coverage_interval": coverage_interval(calibrated, there, alpha) if measurable else None,
            "note": too_few if limits[number] is None else None,
        }
    mean_size = float(sets.sum(axis=1).mean())
    return {"alpha": alpha, "mean_size": mean_size, "coverage": float(covered.mean()), "classes": table}


def risk_coverage(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """Share of rows answered (N,) and the error among them (N,), the surest rows first (El-Yaniv and Wiener 2010).

    Rows of one confidence are answered together; in between, their errors count in equal parts.
    """
    scores, truth = check_probabilities(probabilities, labels)
    confidence = scores.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(confidence[order]) < 0), len(truth) - 1)
    wrong = np.cumsum(scores.argmax(axis=1)[order] != truth[order])
    answered = np.arange(1, len(truth) + 1)
    errors = np.interp(answered, np.append(0, ends + 1), np.append(0, wrong[ends]))
    return answered / len(truth), errors / answered


def confidence_threshold(probabilities: ArrayLike, labels: ArrayLike, target_risk: float) -> float | None:
    """The lowest confidence from which on rows (N,) are wrong at most as often as wanted; None where there is none."""
    if not 0 <= target_risk < 1:
        raise UserError(
            f"target risk: found {target_risk}; expected a fraction of rows from 0 to below 1, such as 0.05"
        )
    scores, truth = check_probabilities(probabilities, labels)
    confidence = scores.max(axis=1)
    levels, place = np.unique(confidence, return_inverse=True)
    wrong = np.bincount(place, weights=scores.argmax(axis=1) != truth)[::-1].cumsum()[::-1]
    answered = np.bincount(place)[::-1].cumsum()[::-1]
    fit = np.flatnonzero(wrong <= target_risk * answered + ROUNDING)
    return float(levels[fit[0]]) if len(fit) else None


def selective_metrics(
    evaluated: tuple[ArrayLike, ArrayLike],
    calibration: tuple[ArrayLike, ArrayLike] | None,
    *,
    target_risk: float = TARGET_RISK,
) -> dict[str, Any]:
    """`{coverage, risk, aurc, threshold, target_risk, answered, error}`: what abstaining on unsure rows gains.

    `coverage` and `risk` are at most 50 points of the curve of the evaluated rows, `aurc` the mean error over all of
    it. `threshold` is found on the calibration rows, None without them or where nothing is sure enough; `answered` and
    `error` are the share of evaluated rows that reach it and how many of these are wrong.
    """
    share, risk = risk_coverage(*evaluated)
    shown = np.unique(np.linspace(0, len(share) - 1, min(MAX_CURVE_POINTS, len(share))).round().astype(int))
    limit = None if calibration is None else confidence_threshold(*calibration, target_risk)
    scores, truth = check_probabilities(*evaluated)
    sure = np.zeros(len(truth), dtype=bool) if limit is None else scores.max(axis=1) >= limit
    wrong = scores.argmax(axis=1) != truth
    return {
        "coverage": share[shown].tolist(),
        "risk": risk[shown].tolist(),
        "aurc": float(risk.mean()),
        "threshold": limit,
        "target_risk": target_risk,
        "wanted_error": target_risk,  # the earlier name of `target_risk` in records
        "answered": None if limit is None else float(sure.mean()),
        "error": float(wrong[sure].mean()) if sure.any() else None,
    }


def ood_scores(logits: ArrayLike) -> Floats:
    """How little a network knows of each row, by its logits (N, C): energy and minus the largest logit, (2, N).

    The energy is minus log-sum-exp (Liu et al. 2020). Both are high where a row is unlike what is known.
    """
    values = np.asarray(logits, dtype=np.float64)
    highest = values.max(axis=-1)
    return np.stack([-(highest + np.log(np.exp(values - highest[..., None]).sum(axis=-1))), -highest])


def ood_summary(rows: Floats, reference: Floats) -> dict[str, Any] | None:
    """Whether rows look unlike val rows, by `ood_scores` of both, (2, N) and (2, R), or its mean over members.

    `{energy, max_logit: {reference, beyond}}`: the bound that 95 % of the reference rows keep, and the share of rows
    beyond it; 0.05 where both are alike. A hint and no test: networks can be very sure of foreign images. None where
    the logits are log-probabilities, whose energy is 0 and says nothing.
    """
    if np.ptp(reference[0]) < MIN_ENERGY_RANGE:
        return None
    found = {}
    for name, here, known, sign in zip(("energy", "max_logit"), rows, reference, (1, -1), strict=True):
        bound = float(np.quantile(known, 0.95))
        found[name] = {"reference": sign * bound, "beyond": float((here > bound).mean())}
    return found
