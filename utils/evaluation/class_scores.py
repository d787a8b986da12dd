"""Entries of `metrics.json` on single classes and folds: intervals, curves, mean and deviation over folds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.numeric.class_intervals import class_intervals
from utils.numeric.curves import MAX_CURVE_CLASSES, class_curves
from utils.numeric.metrics import (
    MAX_LISTED_CLASSES,
    accuracy,
    f1_macro,
    log_loss,
    matthews_corrcoef,
    recall_macro,
)

FOLD_METRICS: Mapping[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy,
    "balanced_accuracy": recall_macro,
    "f1_macro": f1_macro,
    "matthews_corrcoef": matthews_corrcoef,
    "log_loss": log_loss,
}
"""Metrics with mean and deviation over folds."""


def add_class_scores(
    record: dict[str, Any],
    probabilities: NDArray[Any],
    labels: NDArray[np.int64],
    groups: NDArray[Any] | None,
    notes: dict[str, str],
) -> None:
    """Add `curves` and `ci95` of each class to a record of point metrics, and the reasons for null values to `notes`.

    Takes probabilities (N, C), labels (N,) and groups (N,).
    """
    names = list(record["per_class"])
    intervals = class_intervals(probabilities, labels, groups)
    for index, name in enumerate(names):
        record["per_class"][name]["ci95"] = None if intervals is None else intervals[index]
    if intervals is None:
        notes["per_class.ci95"] = f"{len(names)} classes, more than {MAX_LISTED_CLASSES}"
    record["curves"] = class_curves(probabilities, labels, names)
    if record["curves"] is None:
        notes["curves"] = f"{len(names)} classes, more than {MAX_CURVE_CLASSES}; per_class has the areas"


def fold_scores(
    probabilities: NDArray[Any], labels: NDArray[np.int64], folds: NDArray[np.int64], rows: str
) -> dict[str, Any] | None:
    """Return `{k, n, rows, metric: {mean, deviation, values}}` over the folds of rows (N,); None for fewer than two.

    `deviation` is the standard deviation of the K values with K - 1 in its denominator. Since folds share training
    rows, it underestimates the spread over independent data (Nadeau and Bengio 2003). `rows` is a text that describes
    the rows.
    """
    numbers = np.unique(folds)
    if len(numbers) < 2:
        return None
    record: dict[str, Any] = {"k": len(numbers), "n": len(labels), "rows": rows}
    for name, function in FOLD_METRICS.items():
        values = np.array([function(probabilities[folds == fold], labels[folds == fold]) for fold in numbers])
        record[name] = {
            "mean": float(values.mean()),
            "deviation": float(values.std(ddof=1)),
            "values": values.tolist(),
        }
    return record
