"""Features of stacking: the members' outputs as one row of numbers per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from utils.numeric.metrics import clipped_log, softmax

KINDS = ("log_probabilities", "log_probabilities+disagreement", "probabilities")
"""Logits are not a kind: centred over the classes, they equal the centred log-probabilities."""
STEPS = "steps"
"""The kind for trees: log-probabilities rounded to multiples of 1 / `STEPS_PER_NAT`. Trees place thresholds at the
values of rows, so that differences between runtimes in the last bit would change predictions; rounded values almost
always agree."""
STEPS_PER_NAT = 64


def features(logits: np.ndarray, kind: str) -> np.ndarray:
    """Logits (M, N, C) -> features float64 (N, F) of one of the `KINDS`, or `STEPS`.

    Log-probabilities are centred over the classes, which removes their mean, a number without information about any
    class. The C + 3 columns of disagreement are, per image, the entropy of the mean probability, the mean of the
    members' entropies, their difference (mutual information) and the standard deviation of the members' probabilities
    of each class.
    """
    members, rows, classes = logits.shape
    probabilities = softmax(logits)
    if kind == STEPS:
        main = np.round(clipped_log(probabilities) * STEPS_PER_NAT)
    elif kind.startswith("log_probabilities"):
        main = centred_log(probabilities)
    else:
        main = probabilities
    columns = [main.transpose(1, 0, 2).reshape(rows, members * classes)]
    if kind.endswith("+disagreement"):
        total, mean = _entropy(probabilities.mean(axis=0)), _entropy(probabilities).mean(axis=0)
        columns += [np.stack([total, mean, total - mean], axis=1), probabilities.std(axis=0)]
    return np.concatenate(columns, axis=1)


def centred_log(probabilities: np.ndarray) -> np.ndarray:
    """Return log(p), with p clipped at 1e-12, minus its mean over the last axis, of probabilities (..., C)."""
    logs = clipped_log(probabilities)
    return logs - logs.mean(axis=-1, keepdims=True)


def standardisation(values: np.ndarray, blocks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return centre and scale (F,) of features (N, F), with one scale per block of columns.

    `blocks` are the widths of the blocks. The common scale keeps the columns of rare classes small.
    """
    centre, scale = values.mean(axis=0), np.ones(values.shape[1])
    start = 0
    for width in blocks:
        spread = float((values[:, start : start + width] - centre[start : start + width]).std())
        scale[start : start + width] = spread if spread > 0 else 1.0
        start += width
    return centre, scale


@dataclass(frozen=True)
class FeatureRows:
    """Features of one kind for all rows; fits read subsets of the rows."""

    kind: str
    raw: np.ndarray
    """float64 (N, F)"""
    labels: np.ndarray
    """int64 (N,)"""
    members: int
    classes: int

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray, kind: str) -> FeatureRows:
        """Compute the features of logits (M, N, C) with labels (N,)."""
        members, _, classes = logits.shape
        return cls(kind, features(logits, kind), np.asarray(labels), members, classes)

    @cached_property
    def single_precision(self) -> np.ndarray:
        """The features as float32 (N, F), converted once for all fits."""
        return self.raw.astype(np.float32)

    def standardisation(self, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return centre and scale (F,) of the rows `inside`, a mask or indices; the members' outputs have one scale."""
        width = self.members * self.classes
        return standardisation(self.raw[inside], [width] + [1] * (self.raw.shape[1] - width))


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    return -(probabilities * clipped_log(probabilities)).sum(axis=-1)
