"""Out-of-fold predictions: read from a file, fitted to the train rows, and told apart from in-sample ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.core.errors import UserError
from utils.predictions import prediction_files
from utils.predictions.image_splits import ImageSplit

EQUAL = 1e-5  # logits closer than this, relative where they are above 1, come from the same network
SAME_NETWORK_SHARE = 0.01  # more equal rows than this share are no coincidence
SUM_TOLERANCE = 0.01  # training on CUDA leaves probabilities of half precision
BEYOND_CHANCE = 0.001  # p value below which out-of-fold rows are suspiciously better than val rows
FLOOR = {"probabilities": 1e-11, "half-precision probabilities": 1e-3}
"""What is smaller says nothing of the network: rounding and clipping made it."""
ROUNDING = {"probabilities": 1e-4, "half-precision probabilities": 3e-3}
"""How far log-probabilities above the floor are off by rounding alone."""


@dataclass(frozen=True)
class OutOfFoldPredictions:
    """Predictions for train rows by networks that were trained on the other folds."""

    logits: np.ndarray
    """float32 (N, C), columns in the workspace's class order"""
    labels: np.ndarray
    """int64 (N,), indices into the workspace's classes"""
    sample_ids: np.ndarray
    """unicode (N,)"""
    fold: np.ndarray
    """int64 (N,)"""
    kind: str
    """What the file held: logits, probabilities or half-precision probabilities."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored of them."""
        return {"logits": self.logits, "labels": self.labels, "sample_ids": self.sample_ids, "fold": self.fold}

    @property
    def accuracy(self) -> float:
        """Share of rows whose largest logit is the true class."""
        return float((self.logits.argmax(axis=1) == self.labels).mean())


def read(path: Path, name: str, train: ImageSplit, classes: tuple[str, ...], *, remedy: str) -> OutOfFoldPredictions:
    """The out-of-fold predictions of member `name`, columns brought into the order of `classes`.

    Raises UserError that names what does not fit, and then says `remedy`: whatever `prediction_files.read` refuses,
    other classes, rows outside the train split, labels that are not those of the class folders.
    """
    what = f"out-of-fold predictions of {name}"
    needs = ("labels", "fold")
    found = prediction_files.read(path, what=what, remedy=remedy, needs=needs, sum_tolerance=SUM_TOLERANCE)

    def refuse(reason: str) -> UserError:
        return UserError(f"{path}: {what} refused: {reason}. {remedy}")

    own = classes if found.classes is None else found.classes
    if sorted(own) != sorted(classes):
        raise refuse(f"its classes are {', '.join(own)}; the split has {', '.join(classes)}")
    if found.logits.shape[1] != len(classes):
        raise refuse(f"{found.logits.shape[1]} outputs; the split has {len(classes)} classes")
    ids, labels = found.sample_ids, found.labels
    outside = np.setdiff1d(ids, np.array(train.sample_ids))
    if outside.size:
        raise refuse(f"{outside.size} rows are not train images, first {outside[0]}")
    truth = train.labels[_places(ids, train.sample_ids)]
    if labels.min() < 0 or not np.array_equal(np.array([classes.index(label) for label in own])[labels], truth):
        raise refuse("its labels are not those of the class folders")
    order = [own.index(label) for label in classes]
    logits = np.ascontiguousarray(found.logits[:, order])
    return OutOfFoldPredictions(logits, truth.astype(np.int64), ids, found.fold, found.kind)


def duplicates_across_folds(predictions: OutOfFoldPredictions, train: ImageSplit) -> list[str]:
    """Sample ids whose image stands in another fold under another name, so that its network has seen it."""
    contents = np.array(train.contents)[_places(predictions.sample_ids, train.sample_ids)]
    _, group = np.unique(contents, return_inverse=True)
    order = np.lexsort((predictions.fold, group))
    same = group[order][1:] == group[order][:-1]
    apart = np.unique(group[order][1:][same & (predictions.fold[order][1:] != predictions.fold[order][:-1])])
    return sorted(predictions.sample_ids[np.isin(group, apart)].tolist())


def _places(sample_ids: np.ndarray, known: tuple[str, ...]) -> np.ndarray:
    """Where each id stands in `known`, which holds all of them; int64 (N,)."""
    place = {sample_id: row for row, sample_id in enumerate(known)}
    return np.array([place[sample_id] for sample_id in sample_ids.tolist()], dtype=np.int64)


def count_equal_rows(kind: str, stored: np.ndarray, logits: np.ndarray, *, tolerance: float) -> tuple[int, int]:
    """How many rows of a network's `logits` (N, C) are the `stored` ones, and of how many that can be told.

    `tolerance` is absolute, and relative to a row's largest logit where that is above 1. Probabilities are compared as
    log-probabilities; rows in which one class has all of it are left out, since every confident network gives them.
    """
    if kind == "logits":
        scale = np.maximum(1.0, np.abs(logits).max(axis=1))
        return int((np.abs(stored - logits).max(axis=1) <= tolerance * scale).sum()), len(logits)
    floor = math.log(FLOOR[kind])
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logs = np.maximum(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), floor)
    telling = np.partition(logs, -2, axis=1)[:, -2] > floor + 1
    near = np.abs(logs - np.maximum(stored, floor)).max(axis=1) <= max(tolerance, ROUNDING[kind])
    return int((near & telling).sum()), int(telling.sum())


def higher_accuracy_p_value(better: Mapping[str, float], other: Mapping[str, float]) -> float:
    """One-sided p value that shares `better` and `other`, each {accuracy, n}, come from equal chances of being right.

    Two-proportion z test with the pooled share; 1 where every row is right or every row is wrong.
    """
    n, m = better["n"], other["n"]
    pooled = (better["accuracy"] * n + other["accuracy"] * m) / (n + m)
    error = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
    if error == 0:
        return 1.0
    return 0.5 * math.erfc((better["accuracy"] - other["accuracy"]) / error / math.sqrt(2))
