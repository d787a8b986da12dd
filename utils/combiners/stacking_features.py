"""What a stacker sees of its members: their outputs as a row of numbers per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.numeric.metrics import clipped_log, softmax

KINDS = ("log_probabilities", "log_probabilities+disagreement", "probabilities")
"""Logits are missing on purpose: centred over the classes they are the centred log-probabilities."""
STEPS = "steps"
"""The kind for trees: log-probabilities in whole steps. Trees put their thresholds where rows lie, so the last bit of a
number would decide; on steps this and another runtime's arithmetic all but always meet."""
STEPS_PER_NAT = 64


def features(logits: np.ndarray, kind: str) -> np.ndarray:
    """Logits (M, N, C) -> features float64 (N, F) of one of the `KINDS`, or `STEPS`.

    Log-probabilities are centred over the classes, so that a member's certainty about all classes at once, which says
    nothing about any of them, is no feature. Disagreement is, per image, the entropy of the mean probability, the mean
    of the members' entropies, their difference (mutual information) and the standard deviation of the members'
    probabilities per class: C + 3 columns.
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
    """log(p) clipped at 1e-12, less its mean over the last axis."""
    logs = clipped_log(probabilities)
    return logs - logs.mean(axis=-1, keepdims=True)


def standardisation(values: np.ndarray, blocks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Centre and scale (F,) of features (N, F): one scale per block of columns, so that a rare class stays small."""
    centre, scale = values.mean(axis=0), np.ones(values.shape[1])
    start = 0
    for width in blocks:
        spread = float((values[:, start : start + width] - centre[start : start + width]).std())
        scale[start : start + width] = spread if spread > 0 else 1.0
        start += width
    return centre, scale


@dataclass(frozen=True)
class FeatureRows:
    """Features of one kind of all rows, of which fits read some."""

    kind: str
    raw: np.ndarray
    """float64 (N, F)"""
    labels: np.ndarray
    """int64 (N,)"""
    members: int
    classes: int

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray, kind: str) -> FeatureRows:
        """Of logits (M, N, C) and labels (N,)."""
        members, _, classes = logits.shape
        return cls(kind, features(logits, kind), np.asarray(labels), members, classes)

    def standardisation(self, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Centre and scale (F,) of the rows `inside`, a mask or indices; the members' outputs have one scale."""
        width = self.members * self.classes
        return standardisation(self.raw[inside], [width] + [1] * (self.raw.shape[1] - width))


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    return -(probabilities * clipped_log(probabilities)).sum(axis=-1)
