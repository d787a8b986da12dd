"""Opinion pools with optimal weights: convex fits of members' probabilities, each with its duality gap.

A linear pool is a mixture of probabilities with non-negative weights that sum to 1. A log-linear pool is the softmax of
the weighted sum of log-probabilities; its weights are non-negative too, and their unconstrained sum is an inverse
temperature.
The log-loss of both and the Brier score of the mixture are convex in the weights, and `weight_search` minimises them.

The sum s of log-linear weights has a Gamma(2, 1) prior: (s - ln s) / N is added to the mean log-loss of N rows. Without
the prior, there is no finite optimum if all rows are predicted correctly, and probabilities tend to 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.numeric.metrics import SMALLEST_PROBABILITY
from utils.numeric.weight_search import TOLERANCE, Floats, Solution, minimise

SUM_BOUNDS = (0.05, 20.0)
"""Bounds of the sum of log-linear weights, whatever the scale of the scores."""
BLOCK = 4096  # numbers per member that are processed at a time, so that they stay in the cache
MIN_BLOCK_ROWS = 16  # a Python iteration per row would cost more than its arithmetic
MANY_CLASSES = 256  # from which sums over classes are faster along contiguous classes than along contiguous rows


class LinearLogLoss:
    """Log-loss of a mixture, from each member's probability of the true class, (M, N)."""

    def __init__(self, p_true: NDArray[Any]) -> None:
        self.p_true = np.maximum(np.asarray(p_true, dtype=np.float64), SMALLEST_PROBABILITY)
        self.members = len(self.p_true)
        self.duplicate_of = first_duplicates([self.p_true])

    def value(self, weights: Floats) -> float:
        """Return the mean of -log of the mixture, in nats."""
        return float(-np.log(weights @ self.p_true).mean())

    def derivatives(self, weights: Floats) -> tuple[float, Floats, Floats]:
        """Return the loss, its gradient (M,) and its Hessian (M, M)."""
        mixture = weights @ self.p_true
        ratios = self.p_true / mixture
        return float(-np.log(mixture).mean()), -ratios.mean(axis=1), ratios @ ratios.T / mixture.size


class LinearBrier:
    """Brier score of a mixture of probabilities (M, N, C) with labels (N,): quadratic in weights that sum to 1."""

    def __init__(self, probabilities: NDArray[Any], labels: NDArray[Any]) -> None:
        self.members, rows, classes = probabilities.shape
        self.products = np.zeros((self.members, self.members))
        length = max(MIN_BLOCK_ROWS, BLOCK // classes)
        for start in range(0, rows, length):
            residuals = probabilities[:, start : start + length].astype(np.float64)
            truth = labels[start : start + length]
            residuals[:, np.arange(len(truth)), truth] -= 1
            flat = residuals.reshape(self.members, -1)
            self.products += flat @ flat.T / rows
        self.duplicate_of = first_duplicates([probabilities])

    def value(self, weights: Floats) -> float:
        """Return the mean over rows of the squared distance to the one-hot label, for weights that sum to 1."""
        return float(weights @ self.products @ weights)

    def derivatives(self, weights: Floats) -> tuple[float, Floats, Floats]:
        """Return the loss, its gradient (M,) and its Hessian (M, M)."""
        half = self.products @ weights
        return float(weights @ half), 2 * half, 2 * self.products


class LogLinearLogLoss:
    """Log-loss of the softmax of the weighted sum of scores (M, N, C) with labels (N,).

    Scores are log-probabilities, clipped by the caller, or logits: a constant added to a member's row changes nothing.
    """

    def __init__(self, scores: NDArray[Any], labels: NDArray[Any]) -> None:
        self.members, self.rows, classes = scores.shape
        self.axis = 1 if classes >= MANY_CLASSES else 0
        """Axis of the classes in a block of one member"""
        length = max(1 if self.axis else MIN_BLOCK_ROWS, BLOCK // classes)
        self.blocks = [
            _margins(scores[:, start : start + length], labels[start : start + length], self.axis)
            for start in range(0, self.rows, length)
        ]
        self.duplicate_of = first_duplicates(self.blocks)

    def value(self, weights: Floats) -> float:
        """Return the mean of -log of the pool's probability of the true class, in nats."""
        return sum(float(losses.sum()) for _, losses, _ in self._pooled(weights)) / self.rows

    def derivatives(self, weights: Floats) -> tuple[float, Floats, Floats]:
        """Return the loss, its gradient (M,) and its Hessian (M, M)."""
        value, gradient, hessian = 0.0, np.zeros(self.members), np.zeros((self.members, self.members))
        for margins, losses, probabilities in self._pooled(weights):
            value += float(losses.sum())
            means = (margins * probabilities).sum(axis=1 + self.axis, keepdims=True)
            gradient += means.reshape(self.members, -1).sum(axis=1)
            # Centred before squaring: the difference of two sums may be negative where the softmax is saturated.
            spread = ((margins - means) * np.sqrt(probabilities)).reshape(self.members, -1)
            hessian += spread @ spread.T
        return value / self.rows, gradient / self.rows, hessian / self.rows

    def _pooled(self, weights: Floats) -> Iterator[tuple[Floats, Floats, Floats]]:
        """Yield margins (M, C, n), losses (1, n), probabilities (C, n) of a block; with many classes n comes first."""
        for margins in self.blocks:
            pooled = (weights @ margins.reshape(self.members, -1)).reshape(margins.shape[1:])
            largest = pooled.max(axis=self.axis, keepdims=True)
            exponentials = np.exp(pooled - largest)
            sums = exponentials.sum(axis=self.axis, keepdims=True)
            yield margins, np.log(sums) + largest, exponentials / sums


class LogLinearObjective(LogLinearLogLoss):
    """The objective of a fit: log-loss of a log-linear pool plus the prior on the sum of its weights."""

    def value(self, weights: Floats) -> float:
        """Return the mean log-loss plus the prior, in nats."""
        return super().value(weights) + scale_prior(float(weights.sum()), self.rows)[0]

    def derivatives(self, weights: Floats) -> tuple[float, Floats, Floats]:
        """Return log-loss plus prior, its gradient (M,) and its Hessian (M, M)."""
        value, gradient, hessian = super().derivatives(weights)
        prior, slope, curvature = scale_prior(float(weights.sum()), self.rows)
        return value + prior, gradient + slope, hessian + curvature


def fit_linear(
    p_true: NDArray[Any], *, strength: float = 0.0, start: Floats | None = None, tolerance: float = TOLERANCE
) -> Solution:
    """Fit the weights (M,) of the mixture of least log-loss.

    `p_true` (M, N) is each member's probability of the true class, which is clipped at 1e-12; for the other parameters
    see `minimise`.
    """
    return minimise(LinearLogLoss(p_true), strength=strength, start=start, tolerance=tolerance)


def fit_linear_brier(
    probabilities: NDArray[Any],
    labels: NDArray[Any],
    *,
    strength: float = 0.0,
    start: Floats | None = None,
    tolerance: float = TOLERANCE,
) -> Solution:
    """Fit the weights of the mixture of least Brier score to probabilities (M, N, C), labels (N,); see `minimise`."""
    return minimise(LinearBrier(probabilities, labels), strength=strength, start=start, tolerance=tolerance)


def fit_log_linear(
    scores: NDArray[Any],
    labels: NDArray[Any],
    *,
    strength: float = 0.0,
    start: Floats | None = None,
    sum_bounds: tuple[float, float] = SUM_BOUNDS,
    tolerance: float = TOLERANCE,
) -> Solution:
    """Fit the weights (M,) of the log-linear pool of least log-loss plus prior (`scale_prior`).

    Scores (M, N, C) are logits, or log-probabilities that the caller has clipped; labels (N,). `sum_bounds` bounds the
    sum of the weights, which is the inverse of the pool's temperature; for the other parameters see `minimise`.
    """
    loss = LogLinearObjective(scores, labels)
    return minimise(loss, strength=strength, start=start, sum_bounds=sum_bounds, tolerance=tolerance)


def scale_prior(total: float, rows: int) -> tuple[float, float, float]:
    """Return value, slope and curvature of the prior (s - ln s - 1) / N at the sum s of the weights of a fit on N rows.

    It is the negative logarithm of a Gamma(2, 1) density, 0 at its mode s = 1. Below the lower bound of the sum the
    logarithm is continued by its tangent, so that an optimiser may try a sum of 0.
    """
    least = SUM_BOUNDS[0]
    if total < least:
        value, slope, _ = scale_prior(least, rows)
        return value + slope * (total - least), slope, 0.0
    return (total - math.log(total) - 1) / rows, (1 - 1 / total) / rows, 1 / (rows * total**2)


def _margins(scores: NDArray[Any], labels: NDArray[Any], axis: int) -> Floats:
    """Return scores (M, n, C) minus that of the true class, as (M, C, n) for `axis` 0, else as (M, n, C)."""
    values = np.asarray(scores, dtype=np.float64)
    differences = values - values[:, np.arange(len(labels)), labels][:, :, None]
    return differences if axis else np.ascontiguousarray(differences.transpose(0, 2, 1))


def first_duplicates(blocks: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Return for each member the index (M,) of the first member with the same values in all blocks (M, ...)."""
    duplicate_of = np.arange(len(blocks[0]))
    heads = blocks[0].reshape(len(duplicate_of), -1)[:, :16]  # a few values suffice to reject most pairs
    for member in duplicate_of[1:]:
        for earlier in np.flatnonzero((heads[:member] == heads[member]).all(axis=1)):
            if all(np.array_equal(block[earlier], block[member]) for block in blocks):
                duplicate_of[member] = earlier
                break
    return duplicate_of
