"""Linear maps between embedding spaces, fitted without labels, and the variance that they explain on held-out rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RIDGE_STRENGTHS = 10.0 ** np.arange(-8, 3)  # relative to the largest eigenvalue
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LinearMap:
    """The affine map (values - centre) @ matrix + offset."""

    centre: Floats
    """(D,)"""
    matrix: Floats
    """(D, K)"""
    offset: Floats
    """(K,)"""
    strength: float
    explained: float
    """Leave-one-out R^2: fraction of the targets' variance that the map explains, at most 1"""

    def apply(self, values: NDArray) -> Floats:
        """Map values (N, D) to values (N, K)."""
        return (np.asarray(values, dtype=np.float64) - self.centre) @ self.matrix + self.offset


def fit_ridge_map(inputs: NDArray, targets: NDArray) -> LinearMap:
    """Fit ridge regression of targets (N, K) on inputs (N, D) with the strength of least leave-one-out error.

    One decomposition gives the leave-one-out errors of all strengths in closed form (PRESS, Allen 1974).
    """
    rows = len(inputs)
    centre, offset = inputs.mean(axis=0, dtype=np.float64), targets.mean(axis=0, dtype=np.float64)
    left, values, right = np.linalg.svd(np.asarray(inputs, dtype=np.float64) - centre, full_matrices=False)
    centred_targets = np.asarray(targets, dtype=np.float64) - offset
    projected = left.T @ centred_targets
    squares = values**2
    errors = []
    for strength in RIDGE_STRENGTHS:
        shrinkage = squares / np.maximum(squares + strength * squares[0], np.finfo(float).tiny)
        leverages = 1 / rows + np.square(left) @ shrinkage
        residuals = centred_targets - left @ (shrinkage[:, None] * projected)
        errors.append(float(np.square(residuals / np.maximum(1 - leverages, 1e-6)[:, None]).sum()))
    best = int(np.argmin(errors))
    strength = float(RIDGE_STRENGTHS[best])
    factors = values / np.maximum(squares + strength * squares[0], np.finfo(float).tiny)
    # Without a map, the prediction of a row is the mean of the other rows.
    total = float(np.square(centred_targets).sum()) * (rows / max(1, rows - 1)) ** 2
    explained = 1 - errors[best] / total if total > 0 else 1.0
    return LinearMap(centre, right.T @ (factors[:, None] * projected), offset, strength, explained)


def pearson_correlation(values: NDArray, others: NDArray) -> float:
    """Return the correlation of two arrays (N, K) over all entries, each column centred; 0 if one is constant."""
    first, second = (array - array.mean(axis=0) for array in (np.asarray(values), np.asarray(others)))
    size = float(np.sqrt(np.square(first).sum() * np.square(second).sum()))
    return float((first * second).sum()) / size if size > 0 else 0.0
