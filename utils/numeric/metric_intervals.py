"""95% intervals of the point metrics of one model, each by a method with the stated coverage on few rows.

Accuracy and top-k accuracy: Wilson's interval. Mean losses: Student's t, corrected for skewness. F1, precision, recall,
areas under curves, Matthews correlation and kappas (as fractions of their range): Wilson's interval for the number of
rows that corresponds to the bootstrap variance. Calibration errors, which resampling biases upwards: reflected
percentiles; the lower bound is 0 where the error is compatible with chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.numeric.agreement import CHANCE_CORRECTED
from utils.numeric.calibration_chance import chance_ece
from utils.numeric.means import LEVEL, MIN_ERRORS, MIN_UNITS, count_units, mean_interval, unit_indices
from utils.numeric.metrics import ROUNDING, TOP_K, check_probabilities, log_loss_per_row, row_losses
from utils.numeric.proportions import proportion_interval, wilson_interval
from utils.numeric.rates import top_k_hits
from utils.numeric.statistics import TAILS

LOSSES = ("log_loss", "brier")
CALIBRATION_ERRORS = ("ece", "ece_adaptive", "mce")
MIN_CLASS_ROWS = 5
"""Fewest rows, or groups, of the smallest non-empty class for which the interval of a macro average is given."""
FEW_DECIDE = ("roc_auc_ovr_macro", "average_precision_macro", "cohen_kappa_linear", "cohen_kappa_quadratic")
AREA_WIDENING = 1.2
"""Factor of the standard error of metrics that depend on a few rows, such as areas near 1: the bootstrap sees too few
of these rows."""
Floats = NDArray[np.float64]


def metric_intervals(
    metrics: Mapping[str, Any],
    samples: Mapping[str, Floats],
    probabilities: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike | None = None,
) -> tuple[dict[str, list[float]], str]:
    """Return `ci95` {metric: [low, high]} of one model, and the reason for missing intervals, "" if none is missing.

    `metrics` are the model's point metrics on probabilities (N, C) with labels (N,) and groups (N,), and `samples`
    {metric: values (B,)} are its bootstrap values by `statistics.bootstrap_metrics`.
    """
    scores, truth = check_probabilities(probabilities, labels)
    units = count_units(len(truth), groups)
    if units < MIN_UNITS:
        return {}, f"{units} {'rows' if groups is None else 'groups'}; an interval needs {MIN_UNITS}"
    hits = scores.argmax(axis=1) == truth
    support = np.bincount(truth, minlength=scores.shape[1])
    class_units = np.bincount(truth if groups is None else _class_of_groups(truth, groups), minlength=len(support))
    fewest = int(class_units[support > 0].min())
    support = support[support > 0]
    widening = widening_of_classes(units, len(support), fewest)
    reasons = []
    intervals: dict[str, tuple[float, float] | None] = {"accuracy": proportion_interval(hits, groups)}
    intervals["recall_weighted"] = intervals["accuracy"]
    for k in TOP_K:
        if metrics.get(f"top_{k}_accuracy") is not None:
            intervals[f"top_{k}_accuracy"] = proportion_interval(top_k_hits(scores, truth, k), groups)
    if (~hits).sum() >= MIN_ERRORS:
        intervals["log_loss"] = mean_interval(log_loss_per_row(scores, truth), groups)
        intervals["brier"] = mean_interval(row_losses(scores, truth, "brier"), groups)
    else:
        reasons.append(f"{(~hits).sum()} errors; the interval of a mean loss needs {MIN_ERRORS}")
    if fewest < MIN_CLASS_ROWS:
        unit = "rows" if groups is None else "groups"
        reasons.append(f"a class with {fewest} {unit}; the interval of a macro average needs {MIN_CLASS_ROWS}")
    is_by_chance = metrics["ece"] <= chance_ece(scores, truth, groups)["quantile"]
    for name, values in samples.items():
        if name in intervals or name in LOSSES or metrics.get(name) is None:
            continue
        if name in CALIBRATION_ERRORS:
            intervals[name] = _reflected(metrics[name], values, is_by_chance=is_by_chance)
        elif fewest >= MIN_CLASS_ROWS or not name.endswith("_macro"):
            most = len(support) ** 2 / float((len(truth) / units / support).sum())
            factor = widening * (AREA_WIDENING if name in FEW_DECIDE else 1.0)
            if name in CHANCE_CORRECTED:
                intervals[name] = _signed_interval(metrics[name], values, most, factor)
            else:
                intervals[name] = score_interval(metrics[name], float(values.var()) * factor**2, most)
    if "recall_macro" in intervals:
        intervals["balanced_accuracy"] = intervals["recall_macro"]
    return {name: list(bounds) for name, bounds in intervals.items() if bounds is not None}, "; ".join(reasons)


def _class_of_groups(truth: NDArray[np.int64], groups: ArrayLike) -> NDArray[np.int64]:
    """Return the classes (P,) of the P distinct pairs of a class and a group."""
    pairs = np.unique(np.stack([truth, unit_indices(len(truth), groups)]), axis=1)
    return np.asarray(pairs[0], dtype=np.int64)


def widening_of_classes(units: int, classes: int, fewest: int) -> float:
    """Return the factor that widens the standard errors of a stratified bootstrap; `fewest` units in a class.

    Resampling a class of m units gives (m - 1) / m of the true variance within the class. Since the standard error is
    an estimate, Student's t replaces the normal quantile.
    """
    from scipy.special import ndtri, stdtrit

    level = (1 + LEVEL) / 2
    quantiles = float(stdtrit(max(1, units - classes), level) / ndtri(level))
    return quantiles * (fewest / max(1, fewest - 1)) ** 0.5


def score_interval(value: float, variance: float, most: float) -> tuple[float, float]:
    """Return Wilson's interval of a score between 0 and 1, for the number of rows that corresponds to its variance.

    Where the variance is 0, `most` is that number: the effective number of rows of a mean over classes.
    """
    rows = value * (1 - value) / variance if variance > ROUNDING**2 else most
    return wilson_interval(value, max(rows, 1.0))


def _signed_interval(value: float, samples: Floats, most: float, widening: float) -> tuple[float, float]:
    """Return the interval of a score between -1 and 1, from that of the score mapped to [0, 1]."""
    finite = samples[np.isfinite(samples)]
    low, high = score_interval((value + 1) / 2, float(finite.var()) / 4 * widening**2, most)
    return 2 * low - 1, 2 * high - 1


def _reflected(value: float, samples: Floats, *, is_by_chance: bool) -> tuple[float, float]:
    """Return percentiles of the samples, reflected about the value, clipped at 0 and widened to contain the value.

    The lower bound is lowered once more by the bias of the samples, since the bias of the value is larger. The upper
    bound is not lowered, because the estimate of the bias is too uncertain.
    """
    low, high = (float(quantile) for quantile in np.quantile(samples, TAILS))
    lowest = 2 * value - high - max(0.0, float(samples.mean()) - value)
    return 0.0 if is_by_chance else max(0.0, min(value, lowest)), value + max(value - low, (high - low) / 2)
