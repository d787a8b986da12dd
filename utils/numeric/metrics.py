"""Point metrics of class probabilities (N, C) against labels (N,); numpy alone, float64 inside.

Every function checks its input and raises UserError naming the first row at fault. The predicted class is the one of
highest probability, the first of equals. Precision, recall and F1 average over all C classes, as scikit-learn does with
`labels=range(C), zero_division=0`: a class that is neither labelled nor predicted counts as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.core.errors import UserError

SMALLEST_PROBABILITY = 1e-12
SUM_TOLERANCE = 1e-3
SIGN_TOLERANCE = 1e-6
BINS = 15
ROUNDING = 1e-12
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def log_softmax(logits: ArrayLike) -> Floats:
    """Logits (..., C) -> log-probabilities (..., C) in float64, finite for every finite input."""
    values = np.asarray(logits, dtype=np.float64)
    with np.errstate(over="ignore"):  # 1e308 beside -1e308: the difference is clipped below
        shifted = values - values.max(axis=-1, keepdims=True)
    shifted = np.maximum(shifted, -np.finfo(np.float64).max)
    found: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def softmax(logits: ArrayLike) -> Floats:
    """Logits (..., C) -> probabilities (..., C) in float64."""
    found: Floats = np.exp(log_softmax(logits))
    return found


def check_probabilities(probabilities: ArrayLike, labels: ArrayLike) -> tuple[Floats, Integers]:
    """Probabilities (N, C), labels (N,) -> the same in float64 and int64; UserError for whatever cannot be scored."""
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
        counted = f"{count} of {len(rows)} rows"
        raise UserError(
            f"{complaint.format(counted)}, first row {first}: {np.array2string(values[first], threshold=10)}"
        )


def _confusion(scores: Floats, truth: Integers) -> Integers:
    classes = scores.shape[1]
    return np.bincount(truth * classes + scores.argmax(axis=1), minlength=classes**2).reshape(classes, classes)


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    found: Floats = np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
    return found


def _by_class(table: Integers) -> dict[str, NDArray[Any]]:
    hits, support, predicted = table.diagonal(), table.sum(axis=1), table.sum(axis=0)
    return {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, support),
        "f1": _ratio(2 * hits, predicted + support),
        "support": support,
    }


def confusion_matrix(probabilities: ArrayLike, labels: ArrayLike) -> Integers:
    """Counts (C, C): rows are the true classes, columns the predicted ones."""
    return _confusion(*check_probabilities(probabilities, labels))


def per_class(probabilities: ArrayLike, labels: ArrayLike) -> dict[str, NDArray[Any]]:
    """`precision`, `recall`, `f1` (C,) float64, 0 where there is nothing to divide by, and `support` (C,) int64."""
    return _by_class(confusion_matrix(probabilities, labels))


def accuracy(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Share of rows whose predicted class is the true one."""
    scores, truth = check_probabilities(probabilities, labels)
    return float((scores.argmax(axis=1) == truth).mean())


def precision_macro(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Plain mean over the C classes."""
    return float(per_class(probabilities, labels)["precision"].mean())


def recall_macro(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Plain mean over the C classes."""
    return float(per_class(probabilities, labels)["recall"].mean())


def f1_macro(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Plain mean over the C classes."""
    return float(per_class(probabilities, labels)["f1"].mean())


def f1_weighted(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean over the C classes, weighted by how many rows each has."""
    found = per_class(probabilities, labels)
    return float(np.average(found["f1"], weights=found["support"]))


def log_loss_per_row(probabilities: ArrayLike, labels: ArrayLike) -> Floats:
    """-log p(true class) of each row (N,) in nats, p clipped at 1e-12, so a row costs at most 27.6.

    scikit-learn clips at the machine epsilon of the input's type (36.0 at most in float64) and is equal above 1e-12.
    """
    return _log_losses(*check_probabilities(probabilities, labels))


def log_loss(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean of `log_loss_per_row`."""
    return float(log_loss_per_row(probabilities, labels).mean())


def _log_losses(scores: Floats, truth: Integers) -> Floats:
    p_true = scores[np.arange(len(truth)), truth]
    found: Floats = np.abs(np.log(p_true.clip(SMALLEST_PROBABILITY, 1.0)))  # no logarithm here is above 0
    return found


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean over rows of the squared distance to the one-hot truth, summed over classes: 0 to 2.

    Brier (1950), the original form; for two classes it is twice the score of one class that scikit-learn prints.
    """
    return _brier(*check_probabilities(probabilities, labels))


def _brier(scores: Floats, truth: Integers) -> float:
    return float(_brier_per_row(scores, truth).mean())


def _brier_per_row(scores: Floats, truth: Integers) -> Floats:
    p_true = scores[np.arange(len(truth)), truth]
    found: Floats = (scores**2).sum(axis=1) - p_true**2 + (1 - p_true) ** 2
    return found


def confidence_bins(confidence: Floats) -> Integers:
    """Which of the 15 equal-width bins each confidence (N,) lies in, (N,).

    Bins are (lo, hi], the first also holds 0 and the last 1.0 and whatever rounding put above it.
    """
    return np.searchsorted(np.arange(1, BINS) / BINS, confidence, side="left").astype(np.int64)


def _calibration(scores: Floats, truth: Integers) -> tuple[Integers, Floats, Floats]:
    """Rows, right answers and summed confidence of each of the 15 bins."""
    confidence = scores.max(axis=1)
    bins = confidence_bins(confidence)
    hits = np.bincount(bins, weights=scores.argmax(axis=1) == truth, minlength=BINS)
    return np.bincount(bins, minlength=BINS), hits, np.bincount(bins, weights=confidence, minlength=BINS)


def _calibration_gaps(scores: Floats, truth: Integers) -> tuple[Floats, Floats]:
    """Per non-empty bin the share of rows in it and |accuracy - mean confidence|."""
    counts, hits, sums = _calibration(scores, truth)
    filled = counts > 0
    return counts[filled] / len(truth), np.abs(hits - sums)[filled] / counts[filled]


def reliability(probabilities: ArrayLike, labels: ArrayLike) -> dict[str, list[Any]]:
    """What a reliability diagram shows: `confidence`, `accuracy` and `count` of each of the 15 bins.

    Of an empty bin the confidence is its middle and the accuracy None.
    """
    counts, hits, sums = _calibration(*check_probabilities(probabilities, labels))
    middles = (np.arange(BINS) + 0.5) / BINS
    whole = np.maximum(counts, 1)
    return {
        "confidence": np.where(counts > 0, sums / whole, middles).tolist(),
        "accuracy": [hit / count if count else None for hit, count in zip(hits.tolist(), counts.tolist(), strict=True)],
        "count": counts.tolist(),
    }


def ece(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Expected calibration error of the top class over 15 equal-width bins (Guo et al. 2017)."""
    shares, gaps = _calibration_gaps(*check_probabilities(probabilities, labels))
    return float(shares @ gaps)


def ece_adaptive(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Expected calibration error of the top class over 15 bins of equally many rows (Nguyen and O'Connor 2015).

    Rows in order of confidence; a row on the bound of two bins belongs to each in part, and so do rows of one
    confidence, so that neither the order of rows nor their number decides.
    """
    return _ece_adaptive(*check_probabilities(probabilities, labels))


def _ece_adaptive(scores: Floats, truth: Integers) -> float:
    order, ends, gaps = order_by_confidence(scores, truth)
    rows = np.append(0, ends + 1)
    sums = np.append(0, np.cumsum(gaps[order])[ends])
    at_bounds = np.interp(np.linspace(0, len(truth), BINS + 1), rows, sums)
    return float(np.abs(np.diff(at_bounds)).sum() / len(truth))


def order_by_confidence(scores: Floats, truth: Integers) -> tuple[Integers, Integers, Floats]:
    """Rows in order of confidence (N,), places in it where a confidence ends, and hit minus confidence by row (N,)."""
    confidence = scores.max(axis=1)
    order = np.argsort(confidence, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(confidence[order]) > 0), len(truth) - 1)
    return order, ends, (scores.argmax(axis=1) == truth) - confidence


def mce(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """The largest gap of any of the 15 bins that holds a row (Guo et al. 2017)."""
    return float(_calibration_gaps(*check_probabilities(probabilities, labels))[1].max())


def roc_auc_ovr_macro(
    probabilities: ArrayLike, labels: ArrayLike, classes: Sequence[str] | None = None
) -> tuple[float | None, str]:
    """Mean over classes of the area under the one-against-rest curve, ties by mid-ranks, and "".

    None and the reason, which names `classes` (C,) or their numbers, where a class has no rows or no others.
    """
    scores, truth = check_probabilities(probabilities, labels)
    return _roc_auc(scores, truth, list(map(str, range(scores.shape[1]) if classes is None else classes)))


def _roc_auc(scores: Floats, truth: Integers, classes: Sequence[str]) -> tuple[float | None, str]:
    support = np.bincount(truth, minlength=len(classes))
    if support.max() == len(truth):
        return None, f"every row is of class {classes[int(support.argmax())]}, so no class has both rows and others"
    if not support.all():
        empty = [classes[number] for number in np.flatnonzero(support == 0)[:5]]
        return None, f"{int((support == 0).sum())} of {len(classes)} classes without rows: {', '.join(empty)}"
    areas = np.empty(len(classes))
    for number, count in enumerate(support):
        ordered = np.sort(scores[:, number])
        own = scores[truth == number, number]
        ranks = np.searchsorted(ordered, own, side="left") + np.searchsorted(ordered, own, side="right") + 1
        areas[number] = (ranks.sum() / 2 - count * (count + 1) / 2) / (count * (len(truth) - count))
    return float(areas.mean()), ""


def point_metrics(probabilities: ArrayLike, labels: ArrayLike, classes: Sequence[str]) -> dict[str, Any]:
    """All point metrics of `metrics.json` in plain types, and `notes` {key: why it is null}.

    Probabilities (N, C), labels (N,), classes (C,) in column order; UserError for what cannot be scored.
    """
    scores, truth = check_probabilities(probabilities, labels)
    names = list(map(str, classes))
    if len(names) != scores.shape[1] or len(set(names)) != len(names):
        raise UserError(
            f"classes: found {', '.join(names)}; expected {scores.shape[1]} different names, one per column"
        )
    table = _confusion(scores, truth)
    found = _by_class(table)
    shares, gaps = _calibration_gaps(scores, truth)
    area, reason = _roc_auc(scores, truth, names)
    return {
        "n_samples": len(truth),
        "n_classes": len(names),
        "accuracy": float(table.trace() / len(truth)),
        "f1_macro": float(found["f1"].mean()),
        "f1_weighted": float(np.average(found["f1"], weights=found["support"])),
        "precision_macro": float(found["precision"].mean()),
        "precision_weighted": float(np.average(found["precision"], weights=found["support"])),
        "recall_macro": float(found["recall"].mean()),
        "recall_weighted": float(table.trace() / len(truth)),
        "log_loss": float(_log_losses(scores, truth).mean()),
        "brier": _brier(scores, truth),
        "ece": float(shares @ gaps),
        "ece_adaptive": _ece_adaptive(scores, truth),
        "mce": float(gaps.max()),
        "reliability": reliability(scores, truth),
        "roc_auc_ovr_macro": area,
        "confusion_matrix": table.tolist(),
        "per_class": {
            name: {key: values[number].item() for key, values in found.items()} for number, name in enumerate(names)
        },
        "notes": {"roc_auc_ovr_macro": reason} if area is None else {},
    }


def row_losses(probabilities: NDArray[Any], labels: NDArray[Any], metric: str) -> Floats:
    """Losses (N,) of rows of probabilities (N, C), whose mean is the metric's loss, unchecked.

    Macro F1 is no mean over rows; each gets the loss of all plus what it itself moves it by in first order, so that the
    spread of these numbers is that of the metric (Hampel 1974, the influence curve).
    """
    rows, classes = probabilities.shape
    winners = probabilities.argmax(axis=1)
    hits = winners == labels
    if metric == "accuracy":
        return 1.0 - hits
    p_true = probabilities[np.arange(rows), labels].astype(np.float64)
    if metric == "log_loss":
        found: Floats = -np.log(np.maximum(p_true, SMALLEST_PROBABILITY))
        return found
    if metric == "brier":
        found = (probabilities.astype(np.float64) ** 2).sum(axis=1) - 2 * p_true + 1
        return found
    counts = np.bincount(winners, minlength=classes) + np.bincount(labels, minlength=classes)
    per_row = 1 / np.maximum(counts, 1)
    f1 = 2 * np.bincount(labels[hits], minlength=classes) * per_row
    moved = 2 * hits * per_row[labels] - (f1 * per_row)[winners] - (f1 * per_row)[labels]
    found = 1 - f1.mean() - moved * rows / classes
    return found


def within_one_standard_error(losses: Floats, lowest: Floats) -> bool:
    """Whether losses (N,) are on average within one standard error of the lowest's (N,), the error of paired rows."""
    apart = losses - lowest
    error = apart.std(ddof=1) / np.sqrt(len(apart)) if len(apart) > 1 else 0.0
    return bool(apart.mean() <= error + ROUNDING)


class Metric(NamedTuple):
    """What a ranking is ordered by: probabilities (N, C), labels (N,) -> one number, and which way is better."""

    function: Callable[[ArrayLike, ArrayLike], float]
    higher_is_better: bool


METRICS: dict[str, Metric] = {
    "f1_macro": Metric(f1_macro, higher_is_better=True),
    "accuracy": Metric(accuracy, higher_is_better=True),
    "log_loss": Metric(log_loss, higher_is_better=False),
    "brier": Metric(brier, higher_is_better=False),
}
