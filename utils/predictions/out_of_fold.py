"""Out-of-fold predictions: reading, matching with the train rows, and comparison with in-sample predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.core.errors import UserError
from utils.predictions import prediction_files
from utils.predictions.image_splits import ImageSplit

EQUAL = 1e-5  # logits closer than this (relative if they are above 1) come from the same network
SAME_NETWORK_FRACTION = 0.01  # a larger fraction of equal rows means that the network is the same
SUM_TOLERANCE = 0.01  # for half-precision probabilities from training on CUDA
BEYOND_CHANCE = 0.001  # p value below which out-of-fold accuracy is suspiciously higher than val accuracy
FLOOR = {"probabilities": 1e-11, "half-precision probabilities": 1e-3}
"""Smaller probabilities are artefacts of rounding and clipping."""
ROUNDING = {"probabilities": 1e-4, "half-precision probabilities": 3e-3}
"""Largest rounding error of log-probabilities above the floor."""


@dataclass(frozen=True)
class OutOfFoldPredictions:
    """Predictions on train rows by networks trained on the other folds."""

    logits: np.ndarray
    """float32 (N, C), columns in the workspace's class order"""
    labels: np.ndarray
    """int64 (N,), indices into the workspace's classes"""
    sample_ids: np.ndarray
    """unicode (N,)"""
    fold: np.ndarray
    """int64 (N,), fold in which each row was held out"""
    kind: str
    """Contents of the file: logits, probabilities or half-precision probabilities."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays to be stored."""
        return {"logits": self.logits, "labels": self.labels, "sample_ids": self.sample_ids, "fold": self.fold}

    @property
    def accuracy(self) -> float:
        """Fraction of rows whose largest logit is the true class."""
        return float((self.logits.argmax(axis=1) == self.labels).mean())


def read(path: Path, name: str, train: ImageSplit, classes: tuple[str, ...], *, remedy: str) -> OutOfFoldPredictions:
    """Read the out-of-fold predictions of member `name`, columns in the order of `classes`.

    Raises UserError, with `remedy`, for everything that `prediction_files.read` refuses, for other classes, rows
    outside the train split, and labels that differ from the class folders.
    """
    description = f"out-of-fold predictions of {name}"
    needs = ("labels", "fold")
    predictions = prediction_files.read(path, what=description, remedy=remedy, needs=needs, sum_tolerance=SUM_TOLERANCE)
    assert predictions.fold is not None  # required by `needs`

    def refuse(reason: str) -> UserError:
        return UserError(f"{path}: {description} refused: {reason}. {remedy}")

    columns = classes if predictions.classes is None else predictions.classes
    if sorted(columns) != sorted(classes):
        raise refuse(f"its classes are {', '.join(columns)}; the split has {', '.join(classes)}")
    if predictions.logits.shape[1] != len(classes):
        raise refuse(f"{predictions.logits.shape[1]} outputs; the split has {len(classes)} classes")
    ids, labels = predictions.sample_ids, predictions.labels
    outside = np.setdiff1d(ids, np.array(train.sample_ids))
    if outside.size:
        raise refuse(f"{outside.size} rows are not train images, first {outside[0]}")
    expected = train.labels[_positions(ids, train.sample_ids)]
    if labels.min() < 0 or not np.array_equal(np.array([classes.index(name) for name in columns])[labels], expected):
        raise refuse("its labels are not those of the class folders")
    order = [columns.index(name) for name in classes]
    logits = np.ascontiguousarray(predictions.logits[:, order])
    return OutOfFoldPredictions(logits, expected.astype(np.int64), ids, predictions.fold, predictions.kind)


def duplicates_across_folds(predictions: OutOfFoldPredictions, train: ImageSplit) -> list[str]:
    """Sample ids of images with a copy in another fold, so that their fold network was trained on the copy."""
    contents = np.array(train.contents)[_positions(predictions.sample_ids, train.sample_ids)]
    _, group = np.unique(contents, return_inverse=True)
    order = np.lexsort((predictions.fold, group))
    is_equal = group[order][1:] == group[order][:-1]
    split_groups = np.unique(group[order][1:][is_equal & (predictions.fold[order][1:] != predictions.fold[order][:-1])])
    return sorted(predictions.sample_ids[np.isin(group, split_groups)].tolist())


def _positions(sample_ids: np.ndarray, all_ids: tuple[str, ...]) -> np.ndarray:
    """Index of each id in `all_ids`, which must contain all of them; int64 (N,)."""
    position = {sample_id: row for row, sample_id in enumerate(all_ids)}
    return np.array([position[sample_id] for sample_id in sample_ids.tolist()], dtype=np.int64)


def count_equal_rows(kind: str, stored: np.ndarray, logits: np.ndarray, *, tolerance: float) -> tuple[int, int]:
    """Number of rows of a network's `logits` (N, C) equal to `stored` (N, C), and number of comparable rows.

    `tolerance` is absolute, or relative to the largest logit of a row if that is above 1. Probabilities are compared
    as log-probabilities; rows in which one class has a probability of about 1 are excluded, since any confident network
    predicts them.
    """
    if kind == "logits":
        scale = np.maximum(1.0, np.abs(logits).max(axis=1))
        return int((np.abs(stored - logits).max(axis=1) <= tolerance * scale).sum()), len(logits)
    floor = math.log(FLOOR[kind])
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logs = np.maximum(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), floor)
    is_comparable = np.partition(logs, -2, axis=1)[:, -2] > floor + 1
    is_equal = np.abs(logs - np.maximum(stored, floor)).max(axis=1) <= max(tolerance, ROUNDING[kind])
    return int((is_equal & is_comparable).sum()), int(is_comparable.sum())


def higher_accuracy_p_value(better: Mapping[str, float], other: Mapping[str, float]) -> float:
    """One-sided p value of the hypothesis that `better` and `other`, each {accuracy, n}, have equal accuracies.

    Two-proportion z test with the pooled proportion; 1 if all rows are right or all are wrong. `n` is the number of
    independent observations; if rows form groups, the number of groups, as if all rows of a group were right or wrong
    together.
    """
    n, m = better["n"], other["n"]
    pooled = (better["accuracy"] * n + other["accuracy"] * m) / (n + m)
    error = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
    if error == 0:
        return 1.0
    return 0.5 * math.erfc((better["accuracy"] - other["accuracy"]) / error / math.sqrt(2))
