"""Point metrics of class probabilities (N, C) against labels (N,); NumPy only, computed in float64.

Every public function of probabilities and labels validates them and raises UserError, which names the first invalid
row, unless its docstring states otherwise. The predicted class is the one of highest probability, the first on ties.
Macro averages are over the classes that have rows, as in scikit-learn with `labels=unique(labels), zero_division=0`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.core.errors import UserError
from utils.numeric.agreement import CHANCE_CORRECTED, chance_corrected, column_distances
from utils.numeric.areas import class_areas
from utils.numeric.rates import binary_rates, top_k_hits

SMALLEST_PROBABILITY = 1e-12
"""Lower bound of a probability before its logarithm is taken."""
SUM_TOLERANCE = 1e-3
"""Largest deviation from 1 of the sum of a row's probabilities."""
SIGN_TOLERANCE = 1e-6
"""Largest probability below 0 that counts as rounding."""
MAX_LISTED_CLASSES = 1000  # classes up to which `metrics.json` has the confusion matrix; for 5,000 it takes 150 MB
BINS = 15
TOP_K = (3, 5)
"""Values of k of the top-k accuracies."""
ROUNDING = 1e-12
"""Differences of losses up to this count as rounding."""
MACRO_AVERAGES = (
    *("f1_macro", "precision_macro", "recall_macro", "balanced_accuracy", "roc_auc_ovr_macro"),
    "average_precision_macro",
)
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def log_softmax(logits: ArrayLike) -> Floats:
    """Return log-probabilities (..., C) of logits (..., C) in float64, finite for every finite input."""
    values = np.asarray(logits, dtype=np.float64)
    with np.errstate(over="ignore"):  # the difference of 1e308 and -1e308 overflows and is clipped below
        shifted = values - values.max(axis=-1, keepdims=True)
    shifted = np.maximum(shifted, -np.finfo(np.float64).max)
    log_probabilities: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_probabilities


def softmax(logits: ArrayLike) -> Floats:
    """Return probabilities (..., C) of logits (..., C) in float64."""
    probabilities: Floats = np.exp(log_softmax(logits))
    return probabilities


def clipped_log(probabilities: NDArray[Any]) -> NDArray[Any]:
    """Return the logarithm of probabilities of any shape, clipped at 1e-12, in the dtype of the input; unchecked."""
    logs: NDArray[Any] = np.log(np.maximum(probabilities, SMALLEST_PROBABILITY))
    return logs


def ratio_or_zero(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    """Return part / whole in float64, elementwise for equal shapes; 0 where `whole` is not above 0."""
    ratio: Floats = np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)
    return ratio


def check_probabilities(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Floats, Integers]:
    """Return validated probabilities (N, C) and labels (N,) in float64 and int64.

    Raises UserError for wrong shapes or types, for probabilities that are not finite, are below 0 or do not sum to 1,
    and for labels outside 0..C-1.
    """
    scores, truth = np.asarray(probabilities), np.asarray(labels)
    if scores.ndim != 2 or 0 in scores.shape or scores.dtype.kind not in "fiu":
        raise UserError(f"probabilities: found {_shape(scores)}; expected numbers (N, C) with N and C at least 1")
    if truth.shape != scores.shape[:1] or truth.dtype.kind not in "iu":
        raise UserError(f"labels: found {_shape(truth)}; expected integers of shape ({len(scores)},)")
    scores = scores.astype(np.float64)
    _refuse(~np.isfinite(scores).all(axis=1), scores, "probabilities: {} with NaN or infinity")
    _refuse(scores.min(axis=1) < -SIGN_TOLERANCE, scores, "probabilities: {} below 0")
    sums = scores.sum(axis=1)
    _refuse(np.abs(sums - 1) > SUM_TOLERANCE, sums, f"probabilities: {{}} that do not sum to 1 within {SUM_TOLERANCE}")
    classes = scores.shape[1]
    _refuse((truth < 0) | (truth >= classes), truth, f"labels: {{}} outside 0..{classes - 1}")
    return scores, truth.astype(np.int64)


def _shape(array: NDArray[Any]) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _refuse(rows: NDArray[Any], values: NDArray[Any], complaint: str) -> None:
    if rows.any():
        first, count = int(rows.argmax()), int(rows.sum())
        rows_text = f"{count} of {len(rows)} rows"
        raise UserError(
            f"{complaint.format(rows_text)}, first row {first}: {np.array2string(values[first], threshold=10)}"
        )


def _confusion(scores: Floats, truth: Integers) -> Integers:
    classes = scores.shape[1]
    return np.bincount(truth * classes + scores.argmax(axis=1), minlength=classes**2).reshape(classes, classes)


def _class_metrics(confusion: Integers) -> dict[str, NDArray[Any]]:
    hits, support, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return {
        "precision": ratio_or_zero(hits, predicted),
        "recall": ratio_or_zero(hits, support),
        "f1": ratio_or_zero(2 * hits, predicted + support),
        "support": support,
    }


def matthews_corrcoef(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the Matthews correlation of predicted and true classes (Gorodkin 2004), 0 where either does not vary."""
    confusion = confusion_matrix(probabilities, labels)
    nothing = np.zeros(())
    agreement = chance_corrected(confusion.sum(axis=1), confusion.sum(axis=0), confusion.trace(), (nothing, nothing))
    return float(agreement["matthews_corrcoef"])


def top_k_accuracy(probabilities: ArrayLike, labels: ArrayLike, k: int) -> float:
    """Return the fraction of rows whose class is among the k most probable ones; ties go to the first class."""
    return float(top_k_hits(*check_probabilities(probabilities, labels), k).mean())


def confusion_matrix(probabilities: ArrayLike, labels: ArrayLike) -> Integers:
    """Return counts (C, C): rows are the true classes, columns the predicted classes."""
    return _confusion(*check_probabilities(probabilities, labels))


def per_class(probabilities: ArrayLike, labels: ArrayLike) -> dict[str, NDArray[Any]]:
    """Return `precision`, `recall` and `f1`, float64 (C,), 0 where the denominator is 0, and `support`, int64 (C,)."""
    return _class_metrics(confusion_matrix(probabilities, labels))


def accuracy(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the fraction of rows whose predicted class is the true class."""
    scores, truth = check_probabilities(probabilities, labels)
    return float((scores.argmax(axis=1) == truth).mean())


def precision_macro(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the unweighted mean of the precision of the classes that have rows."""
    return _macro(per_class(probabilities, labels), "precision")


def recall_macro(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the unweighted mean of the recall of the classes that have rows."""
    return _macro(per_class(probabilities, labels), "recall")


def f1_macro(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the unweighted mean of the F1 of the classes that have rows."""
    return _macro(per_class(probabilities, labels), "f1")


def macro_mean(values: NDArray[Any], support: NDArray[Any]) -> Floats:
    """Return the mean (...,) of classes' values (..., C) over the classes whose number of rows (..., C) is above 0."""
    has_rows = support > 0
    mean: Floats = (values * has_rows).sum(axis=-1) / has_rows.sum(axis=-1)
    return mean


def _macro(by_class: dict[str, NDArray[Any]], name: str) -> float:
    return float(macro_mean(by_class[name], by_class["support"]))


def f1_weighted(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean F1 of the classes, weighted by the number of rows of each class."""
    by_class = per_class(probabilities, labels)
    return float(np.average(by_class["f1"], weights=by_class["support"]))


def log_loss_per_row(probabilities: ArrayLike, labels: ArrayLike) -> Floats:
    """Return the loss -log p(true class) of each row (N,) in nats; p is clipped at 1e-12, so that it is at most 27.6.

    scikit-learn clips at the machine epsilon of the input's dtype (at most 36.0 in float64); both agree above 1e-12.
    """
    return _log_losses(*check_probabilities(probabilities, labels))


def log_loss(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean of `log_loss_per_row`, in nats."""
    return float(log_loss_per_row(probabilities, labels).mean())


def _log_losses(scores: Floats, truth: Integers) -> Floats:
    p_true = scores[np.arange(len(truth)), truth]
    losses: Floats = np.abs(np.log(p_true.clip(SMALLEST_PROBABILITY, 1.0)))  # all logarithms are at most 0
    return losses


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean over rows of the squared distance to the one-hot label, summed over classes: 0 to 2.

    This is the original form (Brier 1950); for two classes it is twice scikit-learn's score of one class.
    """
    return _brier(*check_probabilities(probabilities, labels))


def _brier(scores: Floats, truth: Integers) -> float:
    return float(_brier_per_row(scores, truth).mean())


def _brier_per_row(scores: Floats, truth: Integers) -> Floats:
    p_true = scores[np.arange(len(truth)), truth]
    losses: Floats = (scores**2).sum(axis=1) - p_true**2 + (1 - p_true) ** 2
    return losses


def confidence_bins(confidence: Floats) -> Integers:
    """Return the index (N,) of the equal-width bin, of 15, that contains each confidence (N,).

    Bins are (low, high]; the first also contains 0, the last also values that rounding puts above 1.
    """
    return np.searchsorted(np.arange(1, BINS) / BINS, confidence, side="left").astype(np.int64)


def _calibration(scores: Floats, truth: Integers) -> tuple[Integers, Floats, Floats]:
    """Return the number of rows, the number of hits and the summed confidence (15,) of each bin."""
    confidence = scores.max(axis=1)
    bins = confidence_bins(confidence)
    is_hit = scores.argmax(axis=1) == truth
    hits, sums = (np.bincount(bins, weights=weights, minlength=BINS) for weights in (is_hit, confidence))
    return np.bincount(bins, minlength=BINS), np.asarray(hits, dtype=np.float64), np.asarray(sums, dtype=np.float64)


def _calibration_gaps(scores: Floats, truth: Integers) -> tuple[Floats, Floats]:
    """Return the fraction of rows in each non-empty bin and its |accuracy - mean confidence|."""
    counts, hits, sums = _calibration(scores, truth)
    filled = counts > 0
    return counts[filled] / len(truth), np.abs(hits - sums)[filled] / counts[filled]


def reliability(probabilities: ArrayLike, labels: ArrayLike) -> dict[str, list[Any]]:
    """Return the data of a reliability diagram: mean `confidence`, `accuracy` and `count` of each of the 15 bins.

    The confidence of an empty bin is its centre, and its accuracy is None.
    """
    counts, hits, sums = _calibration(*check_probabilities(probabilities, labels))
    centres = (np.arange(BINS) + 0.5) / BINS
    divisors = np.maximum(counts, 1)
    return {
        "confidence": np.where(counts > 0, sums / divisors, centres).tolist(),
        "accuracy": [hit / count if count else None for hit, count in zip(hits.tolist(), counts.tolist(), strict=True)],
        "count": counts.tolist(),
    }


def ece(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the expected calibration error of the top class over 15 equal-width bins (Guo et al. 2017)."""
    fractions, gaps = _calibration_gaps(*check_probabilities(probabilities, labels))
    return float(fractions @ gaps)


def ece_adaptive(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the expected calibration error of the top class over 15 bins of equal size (Nguyen and O'Connor 2015).

    Rows are sorted by confidence. A row on the boundary of two bins belongs in part to each of them, and so do rows of
    equal confidence, so that the result depends neither on the order of the rows nor on their number.
    """
    return _ece_adaptive(*check_probabilities(probabilities, labels))


def _ece_adaptive(scores: Floats, truth: Integers) -> float:
    order, ends, gaps = order_by_confidence(scores, truth)
    rows = np.append(0, ends + 1)
    sums = np.append(0, np.cumsum(gaps[order])[ends])
    at_boundaries = np.interp(np.linspace(0, len(truth), BINS + 1), rows, sums)
    return float(np.abs(np.diff(at_boundaries)).sum() / len(truth))


def order_by_confidence(scores: Floats, truth: Integers) -> tuple[Integers, Integers, Floats]:
    """Return the order (N,) of rows by confidence, the last position (U,) of each value, and hit - confidence (N,).

    The differences hit - confidence are in the order of the input.
    """
    confidence = scores.max(axis=1)
    order = np.argsort(confidence, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(confidence[order]) > 0), len(truth) - 1)
    return order, ends, (scores.argmax(axis=1) == truth) - confidence


def mce(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the maximum calibration error: the largest gap among the non-empty of 15 bins (Guo et al. 2017)."""
    return float(_calibration_gaps(*check_probabilities(probabilities, labels))[1].max())


def roc_auc_ovr_macro(
    probabilities: ArrayLike, labels: ArrayLike, classes: Sequence[str] | None = None
) -> tuple[float | None, str]:
    """Return the mean one-vs-rest area under the ROC curve over classes, and ""; ties count half.

    Classes without rows are left out. If every row belongs to one class, returns None and the reason, which gives its
    name in `classes` (C,) or its index.
    """
    scores, truth = check_probabilities(probabilities, labels)
    names = list(map(str, range(scores.shape[1]) if classes is None else classes))
    return _mean_roc_auc(_areas(scores, truth)["roc_auc"], np.bincount(truth, minlength=len(names)), names)


def _areas(scores: Floats, truth: Integers) -> dict[str, Floats]:
    """Return one-vs-rest `roc_auc` and `average_precision` (C,).

    NaN for a class without rows; `roc_auc` is also NaN for a class with all rows.
    """
    areas = {name: np.full(scores.shape[1], np.nan) for name in ("roc_auc", "average_precision")}
    for entry in class_areas(scores, truth):
        areas["roc_auc"][entry.index] = entry.roc_auc
        areas["average_precision"][entry.index] = entry.average_precision
    return areas


def _mean_roc_auc(areas: Floats, support: Integers, classes: Sequence[str]) -> tuple[float | None, str]:
    if support.max() == support.sum():
        return None, f"every row is of class {classes[int(support.argmax())]}, so no class has both rows and others"
    return float(macro_mean(np.nan_to_num(areas), support)), ""


def _notes(support: Integers, classes: Sequence[str], reason: str) -> dict[str, str]:
    """Return {metric: why its macro average is null or leaves classes out}."""
    absent = [name for name, count in zip(classes, support.tolist(), strict=True) if not count]
    if not absent:
        return {"roc_auc_ovr_macro": reason} if reason else {}
    names = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
    left_out = f"average over {len(classes) - len(absent)} of {len(classes)} classes; without rows: {names}"
    averages = dict.fromkeys(MACRO_AVERAGES, left_out)
    return averages | ({"roc_auc_ovr_macro": reason} if reason else {})


def point_metrics(probabilities: ArrayLike, labels: ArrayLike, classes: Sequence[str]) -> dict[str, Any]:
    """Return all point metrics of `metrics.json` as JSON values, and `notes` {key: why it is null or partial}.

    Takes probabilities (N, C), labels (N,) and the names of the classes (C,) in column order.
    """
    scores, truth = check_probabilities(probabilities, labels)
    names = list(map(str, classes))
    if len(names) != scores.shape[1] or len(set(names)) != len(names):
        raise UserError(
            f"classes: found {', '.join(names)}; expected {scores.shape[1]} different names, one per column"
        )
    confusion = _confusion(scores, truth)
    by_class = _class_metrics(confusion)
    fractions, gaps = _calibration_gaps(scores, truth)
    areas = _areas(scores, truth)
    area, reason = _mean_roc_auc(areas["roc_auc"], by_class["support"], names)
    notes = _notes(by_class["support"], names, reason)
    further = _further_metrics(scores, truth, confusion, notes)
    rates = {
        name: np.divide(part, rows, out=np.full(len(names), np.nan), where=rows > 0)
        for name, (part, rows) in binary_rates(confusion).items()
    }
    is_listed = len(names) <= MAX_LISTED_CLASSES
    if not is_listed:
        notes["confusion_matrix"] = (
            f"{len(names)} classes, more than {MAX_LISTED_CLASSES}: the counts are in confusion_matrix*.npz beside this"
        )
    return {
        "n_samples": len(truth),
        "n_classes": len(names),
        "accuracy": float(confusion.trace() / len(truth)),
        "f1_macro": _macro(by_class, "f1"),
        "f1_weighted": float(np.average(by_class["f1"], weights=by_class["support"])),
        "precision_macro": _macro(by_class, "precision"),
        "precision_weighted": float(np.average(by_class["precision"], weights=by_class["support"])),
        "recall_macro": _macro(by_class, "recall"),
        "recall_weighted": float(confusion.trace() / len(truth)),
        "log_loss": float(_log_losses(scores, truth).mean()),
        "brier": _brier(scores, truth),
        "ece": float(fractions @ gaps),
        "ece_adaptive": _ece_adaptive(scores, truth),
        "mce": float(gaps.max()),
        "reliability": reliability(scores, truth),
        "roc_auc_ovr_macro": area,
        "average_precision_macro": float(macro_mean(np.nan_to_num(areas["average_precision"]), by_class["support"])),
        "balanced_accuracy": _macro(by_class, "recall"),
        **further,
        "confusion_matrix": confusion.tolist() if is_listed else None,
        "per_class": {
            name: {key: values[index].item() for key, values in by_class.items()}
            | {key: _number(values[index]) for key, values in (rates | areas).items()}
            for index, name in enumerate(names)
        },
        "notes": notes,
    }


def _further_metrics(
    scores: Floats, truth: Integers, confusion: Integers, notes: dict[str, str]
) -> dict[str, float | None]:
    """Return top-k accuracies and chance-corrected agreement; adds the reasons for null values to `notes`."""
    classes, support, predicted = len(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    distances = [distance.sum() for distance in column_distances(truth, scores.argmax(axis=1))]
    agreement = chance_corrected(support, predicted, confusion.trace(), (distances[0], distances[1]))
    record = {name: _number(agreement[name]) for name in CHANCE_CORRECTED}
    for name in (name for name in CHANCE_CORRECTED if record[name] is None):
        notes[name] = "every row has the same true and predicted class, so agreement by chance is complete"
    for k in TOP_K:
        record[f"top_{k}_accuracy"] = float(top_k_hits(scores, truth, k).mean()) if k < classes else None
        if k >= classes:
            notes[f"top_{k}_accuracy"] = f"{classes} classes; it is 1 with so few"
    return record


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def row_losses(probabilities: NDArray[Any], labels: NDArray[Any], metric: str) -> Floats:
    """Return losses (N,), whose mean is the metric's loss, from probabilities (N, C) and labels (N,); unchecked.

    Macro F1 is not a mean over rows: each row gets the loss of all rows plus its first-order influence on it, so that
    the spread of these values is the spread of the metric (influence curve, Hampel 1974).
    """
    rows, classes = probabilities.shape
    winners = probabilities.argmax(axis=1)
    hits = winners == labels
    if metric == "accuracy":
        return 1.0 - hits
    p_true = probabilities[np.arange(rows), labels].astype(np.float64)
    if metric == "log_loss":
        losses: Floats = -clipped_log(p_true)
        return losses
    if metric == "brier":
        losses = (probabilities.astype(np.float64) ** 2).sum(axis=1) - 2 * p_true + 1
        return losses
    support = np.bincount(labels, minlength=classes)
    counts = np.bincount(winners, minlength=classes) + support
    inverse = (support > 0) / np.maximum(counts, 1)  # 0 for classes without rows, which the average leaves out
    f1 = 2 * np.bincount(labels[hits], minlength=classes) * inverse
    influence = 2 * hits * inverse[labels] - (f1 * inverse)[winners] - (f1 * inverse)[labels]
    n_present = (support > 0).sum()
    losses = 1 - f1.sum() / n_present - influence * rows / n_present
    return losses


class Metric(NamedTuple):
    """A ranking metric: a function of probabilities (N, C) and labels (N,), and which direction is better."""

    function: Callable[[ArrayLike, ArrayLike], float]
    higher_is_better: bool


METRICS: dict[str, Metric] = {
    "f1_macro": Metric(f1_macro, higher_is_better=True),
    "accuracy": Metric(accuracy, higher_is_better=True),
    "log_loss": Metric(log_loss, higher_is_better=False),
    "brier": Metric(brier, higher_is_better=False),
}
