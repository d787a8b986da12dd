"""Linear maps between spaces of embeddings, learned without labels, and how well they hold on rows left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RIDGE_STRENGTHS = 10.0 ** np.arange(-8, 3)  # of the ridge, relative to the largest eigenvalue
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LinearMap:
    """(values - centre) @ matrix + offset."""

    centre: Floats
    """(D,)"""
    matrix: Floats
    """(D, K)"""
    offset: Floats
    """(K,)"""
    strength: float
    explained: float
    """Share of the targets' variance that it explains on rows left out one at a time; 1 is all, below 0 is none"""

    def apply(self, values: NDArray) -> Floats:
        """(N, D) -> (N, K)"""
        return (np.asarray(values, dtype=np.float64) - self.centre) @ self.matrix + self.offset


def fit_ridge_map(inputs: NDArray, targets: NDArray) -> LinearMap:
    """The ridge regression of targets (N, K) on inputs (N, D) whose strength has the least leave-one-out error.

    In closed form from one decomposition (Allen 1974: what a row adds to its own fit is known).
    """
    rows = len(inputs)
    centre, offset = inputs.mean(axis=0, dtype=np.float64), targets.mean(axis=0, dtype=np.float64)
    left, values, right = np.linalg.svd(np.asarray(inputs, dtype=np.float64) - centre, full_matrices=False)
    wanted = np.asarray(targets, dtype=np.float64) - offset
    seen = left.T @ wanted
    squares = values**2
    errors = []
    for strength in RIDGE_STRENGTHS:
        shares = squares / np.maximum(squares + strength * squares[0], np.finfo(float).tiny)
        own = 1 / rows + np.square(left) @ shares
        residuals = (wanted - left @ (shares[:, None] * seen)) / np.maximum(1 - own, 1e-6)[:, None]
        errors.append(float(np.square(residuals).sum()))
    best = int(np.argmin(errors))
    strength = float(RIDGE_STRENGTHS[best])
    factors = values / np.maximum(squares + strength * squares[0], np.finfo(float).tiny)
    # Against the mean of the other rows, which is what is known of a row without a map.
    total = float(np.square(wanted).sum()) * (rows / max(1, rows - 1)) ** 2
    explained = 1 - errors[best] / total if total > 0 else 1.0
    return LinearMap(centre, right.T @ (factors[:, None] * seen), offset, strength, explained)


def pearson_correlation(found: NDArray, expected: NDArray) -> float:
    """Correlation of (N, K) with (N, K) over all entries, each column centred; 0 where one of them does not vary."""
    one, other = (values - values.mean(axis=0) for values in (np.asarray(found), np.asarray(expected)))
    size = float(np.sqrt(np.square(one).sum() * np.square(other).sum()))
    return float((one * other).sum()) / size if size > 0 else 0.0
