"""Vector and Dirichlet scaling of class scores, shrunk to temperature scaling (Guo et al. 2017; Kull et al. 2019).

Log-probabilities z (N, C), already divided by a temperature, become the softmax of z + z D^T + b. Vector scaling has a
diagonal D, Dirichlet scaling a full one. Both minimise the mean log-loss plus
`strength * (sum of squares of D and b)`, which is convex and leads to D = 0 and b = 0, the temperature alone, as the
strength grows. Held-out folds select kind and strength.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.numeric import temperature
from utils.numeric.metrics import log_loss_per_row, log_softmax, softmax

STRENGTHS = (1.0, 0.1, 0.01, 0.001)
"""In nats per squared unit of a parameter."""
MAX_DIRICHLET_CLASSES = 50  # a full D has the square of this many parameters
MIN_STANDARD_ERRORS = 1.0
"""Least decrease of the held-out log-loss for which a map is kept."""
VECTOR, DIRICHLET = "vector", "dirichlet"
Floats = NDArray[np.float64]
Integers = NDArray[np.integer]


@dataclass(frozen=True)
class ClassScaling:
    """A temperature and the fitted affine map of the log-probabilities divided by it."""

    temperature: float
    matrix: Floats
    """I + D, (C, C)"""
    bias: Floats
    """(C,)"""

    def apply(self, scores: Floats) -> Floats:
        """Return scaled log-probabilities (N, C) of log-probabilities (N, C) at temperature 1."""
        scaled: Floats = log_softmax(log_softmax(scores / self.temperature) @ self.matrix.T + self.bias)
        return scaled


def fit(scores: Floats, labels: Integers, kind: str, strength: float) -> ClassScaling:
    """Fit a temperature, then a map of this kind and strength, to log-probabilities (N, C) and labels (N,)."""
    return _fit_map(scores, labels, temperature.fit_temperature(scores, labels), kind, strength)


def _fit_map(scores: Floats, labels: Integers, divisor: float, kind: str, strength: float) -> ClassScaling:
    from scipy.optimize import minimize

    scores = log_softmax(scores / divisor)
    rows, classes = scores.shape
    truth = np.eye(classes)[labels]
    is_vector = kind == VECTOR

    def unpacked(parameters: Floats) -> tuple[Floats, Floats]:
        offsets = parameters[:-classes]
        return np.diag(offsets) if is_vector else offsets.reshape(classes, classes), parameters[-classes:]

    def objective(parameters: Floats) -> tuple[float, Floats]:
        offsets, bias = unpacked(parameters)
        log_probabilities = log_softmax(scores + scores @ offsets.T + bias)
        errors = (np.exp(log_probabilities) - truth) / rows
        matrix_gradient = (errors * scores).sum(axis=0) if is_vector else (errors.T @ scores).ravel()
        gradient = np.concatenate([matrix_gradient, errors.sum(axis=0)]) + 2 * strength * parameters
        return float(-(truth * log_probabilities).sum() / rows + strength * (parameters @ parameters)), gradient

    start = np.zeros(classes * (1 if is_vector else classes) + classes)
    result = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 500, "gtol": 1e-7})
    offsets, bias = unpacked(result.x)
    return ClassScaling(divisor, np.eye(classes) + offsets, bias.copy())


def select(scores: Floats, labels: Integers, folds: Integers) -> tuple[ClassScaling, str] | None:
    """Return the map of least held-out log-loss and its kind; None where a temperature alone suffices.

    Takes log-probabilities (N, C) and labels (N,). Temperature and map are refitted without each fold of `folds` (N,).
    A map is kept when the held-out log-loss falls by more than one standard error of the paired difference, since the
    best of several would otherwise win by chance.
    """
    fold_names = np.unique(folds)
    if len(fold_names) < 2:
        return None
    kinds = (VECTOR, DIRICHLET) if scores.shape[1] <= MAX_DIRICHLET_CLASSES else (VECTOR,)
    candidates = [(kind, strength) for kind in kinds for strength in STRENGTHS]
    temperature_losses = np.empty(len(labels))
    losses = np.empty((len(candidates), len(labels)))
    for name in fold_names:
        inside = folds == name
        others, held_out, truth = scores[~inside], scores[inside], labels[inside]
        divisor = temperature.fit_temperature(others, labels[~inside])
        temperature_losses[inside] = log_loss_per_row(softmax(held_out / divisor), truth)
        for index, (kind, strength) in enumerate(candidates):
            scaled = _fit_map(others, labels[~inside], divisor, kind, strength).apply(held_out)
            losses[index, inside] = log_loss_per_row(softmax(scaled), truth)
    best = int(losses.mean(axis=1).argmin())
    gains = temperature_losses - losses[best]
    if gains.mean() <= MIN_STANDARD_ERRORS * gains.std() / np.sqrt(len(gains)):
        return None
    kind, strength = candidates[best]
    return fit(scores, labels, kind, strength), kind
