"""Opinion pools with optimal weights: convex fits of members' probabilities, each with its duality gap.

A linear pool is a mixture of probabilities with non-negative weights that sum to 1. A log-linear pool is the softmax of
the weighted sum of log-probabilities; its weights are non-negative too, and their free sum is an inverse temperature.
The log-loss of both and the Brier score of the mixture are convex in the weights. Newton's method minimises each; an
active set method solves its quadratic subproblems exactly (Nocedal and Wright 2006, chapters 16 and 18).

The free sum s of log-linear weights has a Gamma(2, 1) prior: (s - ln s) / N is added to the mean log-loss of N rows.
Without it rows that are all predicted correctly have no finite optimum, and the pool would claim certainty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from utils.numeric.metrics import SMALLEST_PROBABILITY

SUM_BOUNDS = (0.05, 20.0)
"""Bounds of the sum of log-linear weights, whatever the scale of the scores."""
TOLERANCE = 1e-9
MAX_STEPS = 200
BLOCK = 4096  # numbers per member that are processed at a time, so that they stay in the cache
MIN_BLOCK_ROWS = 16  # of thousands of classes: a step of Python for each row would take longer than its numbers
VALUE_ROUNDING = 1e-13  # relative to a value: smaller differences are noise, as is 1e-15 of any loss
RIDGE = 1e-11  # relative to the curvature: no steps along flat directions
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Solution:
    """Weights with their loss and its optimality gap."""

    weights: Floats
    """(M,)"""
    value: float
    """Loss plus penalty at these weights."""
    gap: float
    """Duality gap (Jaggi 2013): no feasible weights have a value below `value - gap`."""
    steps: int
    """Number of Newton steps."""


class ConvexLoss(Protocol):
    """A convex function of the weights (M,) of M members."""

    members: int
    duplicate_of: NDArray[np.int64]
    """(M,): index of the first member with the same outputs; such members get the same weight."""

    def value(self, weights: Floats) -> float:
        """Return the loss."""

    def derivatives(self, weights: Floats) -> tuple[float, Floats, Floats]:
        """Return the loss, its gradient (M,) and its Hessian (M, M)."""


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
        length = max(MIN_BLOCK_ROWS, BLOCK // classes)
        self.blocks = [
            _margins(scores[:, start : start + length], labels[start : start + length])
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
            means = (margins * probabilities).sum(axis=1)
            gradient += means.sum(axis=1)
            # Centred first: the difference of two sums may be negative where the softmax is saturated.
            spread = ((margins - means[:, None]) * np.sqrt(probabilities)).reshape(self.members, -1)
            hessian += spread @ spread.T
        return value / self.rows, gradient / self.rows, hessian / self.rows

    def _pooled(self, weights: Floats) -> Iterator[tuple[Floats, Floats, Floats]]:
        """Yield margins (M, C, n), losses (n,) and probabilities (C, n) of each block."""
        for margins in self.blocks:
            pooled = (weights @ margins.reshape(self.members, -1)).reshape(margins.shape[1:])
            largest = pooled.max(axis=0)
            exponentials = np.exp(pooled - largest)
            sums = exponentials.sum(axis=0)
            yield margins, np.log(sums) + largest, exponentials / sums


class LogLinearObjective(LogLinearLogLoss):
    """Log-loss of a log-linear pool with the prior on the sum of its weights: what a fit minimises."""

    def value(self, weights: Floats) -> float:
        """Return the mean log-loss plus the prior, in nats."""
        return super().value(weights) + scale_prior(float(weights.sum()), self.rows)[0]

    def derivatives(self, weights: Floats) -> tuple[float, Floats, Floats]:
        """Return log-loss plus prior, its gradient (M,) and its Hessian (M, M)."""
        value, gradient, hessian = super().derivatives(weights)
        prior, slope, curvature = scale_prior(float(weights.sum()), self.rows)
        return value + prior, gradient + slope, hessian + curvature


class _CommonWeight:
    """A loss as a function of the sum of equal weights."""

    members = 1
    duplicate_of = np.zeros(1, dtype=np.int64)

    def __init__(self, loss: ConvexLoss) -> None:
        self.loss = loss

    def value(self, weights: Floats) -> float:
        return self.loss.value(np.full(self.loss.members, weights[0] / self.loss.members))

    def derivatives(self, weights: Floats) -> tuple[float, Floats, Floats]:
        equal = np.full(self.loss.members, weights[0] / self.loss.members)
        value, gradient, hessian = self.loss.derivatives(equal)
        return value, gradient.mean(keepdims=True), hessian.mean(keepdims=True)


def fit_linear(
    p_true: NDArray[Any], *, strength: float = 0.0, start: Floats | None = None, tolerance: float = TOLERANCE
) -> Solution:
    """Fit the weights of the mixture of least log-loss.

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
    """Fit the weights of the log-linear pool of least log-loss and prior (`scale_prior`).

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


def minimise(
    loss: ConvexLoss,
    *,
    strength: float = 0.0,
    start: Floats | None = None,
    sum_bounds: tuple[float, float] = (1.0, 1.0),
    tolerance: float = TOLERANCE,
) -> Solution:
    """Return non-negative weights (M,) of least loss + strength * |w - mean(w)|^2 whose sum is within `sum_bounds`.

    The penalty shrinks the weights towards their mean and leaves their sum free; infinite strength gives equal weights.
    The search starts from `start` (M,), scaled into `sum_bounds`, or from equal weights. It ends when the duality gap
    is at most `tolerance`, or when rounding allows no further descent; the solution has the gap.
    """
    if np.isinf(strength):
        common = minimise(_CommonWeight(loss), sum_bounds=sum_bounds, tolerance=tolerance)
        return Solution(np.full(loss.members, common.weights[0] / loss.members), common.value, common.gap, common.steps)
    if loss.members == 1:
        return _minimise_alone(loss, 1.0 if start is None else float(start[0]), sum_bounds, tolerance)
    weights = _feasible(
        average_duplicates(np.ones(loss.members) if start is None else start, loss.duplicate_of), sum_bounds
    )
    step = n_unchecked = 0
    while True:
        value, gradient, hessian = _penalised(loss, weights, strength)
        gap = duality_gap(weights, gradient, sum_bounds)
        if gap <= tolerance or step == MAX_STEPS or n_unchecked == 2:
            break
        direction = average_duplicates(_quadratic_step(hessian, gradient, weights, sum_bounds), loss.duplicate_of)
        slope = float(gradient @ direction)
        if -slope <= VALUE_ROUNDING * (abs(value) + 0.01):  # differences of values are noise: trust the slope
            n_unchecked += 1
            candidate: Floats | None = weights + direction
        else:
            candidate = _line_search(loss, weights, direction, value, slope, strength)
        if candidate is None:
            break
        weights = _feasible(candidate, sum_bounds)
        step += 1
    return Solution(weights, value, gap, step)


def _minimise_alone(loss: ConvexLoss, start: float, bounds: tuple[float, float], tolerance: float) -> Solution:
    """Return the weight of least loss of one member within `bounds`, as `minimise` does.

    Newton's method on the derivative. The bounds close in on its root, and a step beyond them halves the distance
    instead; thousands of temperatures are fitted in a nested search.
    """
    lower, upper = bounds
    weight, step = min(max(start, lower), upper), 0
    while True:
        value, gradient, hessian = loss.derivatives(np.array([weight]))
        slope, curvature = float(gradient[0]), float(hessian[0, 0])
        gap = max(0.0, weight * slope - min(bounds[0] * slope, bounds[1] * slope))
        if gap <= tolerance or step == MAX_STEPS:
            break
        if slope > 0:
            upper = weight
        else:
            lower = weight
        candidate = weight - slope / curvature if curvature > 0 else (lower if slope > 0 else upper)
        if candidate <= lower:
            candidate = lower if lower == bounds[0] else (lower + upper) / 2
        elif candidate >= upper:
            candidate = upper if upper == bounds[1] else (lower + upper) / 2
        if candidate == weight:
            break
        weight, step = candidate, step + 1
    return Solution(np.array([weight]), value, gap, step)


def duality_gap(weights: Floats, gradient: Floats, sum_bounds: tuple[float, float]) -> float:
    """Return an upper bound of a convex function's value at `weights` (M,) less its minimum, from its gradient (M,)."""
    least = float(gradient.min())
    return max(0.0, float(weights @ gradient) - min(sum_bounds[0] * least, sum_bounds[1] * least))


def _margins(scores: NDArray[Any], labels: NDArray[Any]) -> Floats:
    """Return scores (M, n, C) less that of the true class, as (M, C, n), so that sums over classes run along rows."""
    values = np.asarray(scores, dtype=np.float64)
    differences = values - values[:, np.arange(len(labels)), labels][:, :, None]
    return np.ascontiguousarray(differences.transpose(0, 2, 1))


def first_duplicates(blocks: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Return the index (M,) of the first member with the same values as each member, in blocks (M, ...)."""
    duplicate_of = np.arange(len(blocks[0]))
    heads = blocks[0].reshape(len(duplicate_of), -1)[:, :16]  # a few values suffice to reject most pairs
    for member in duplicate_of[1:]:
        for earlier in np.flatnonzero((heads[:member] == heads[member]).all(axis=1)):
            if all(np.array_equal(block[earlier], block[member]) for block in blocks):
                duplicate_of[member] = earlier
                break
    return duplicate_of


def average_duplicates(values: NDArray[Any], duplicate_of: NDArray[np.int64]) -> Floats:
    """Return values (M,) with those of duplicate members replaced by their mean."""
    counts = np.bincount(duplicate_of, minlength=len(duplicate_of))[duplicate_of]
    means: Floats = np.bincount(duplicate_of, weights=values, minlength=len(duplicate_of))[duplicate_of] / counts
    return means


def _feasible(weights: Floats, sum_bounds: tuple[float, float]) -> Floats:
    positive = np.maximum(np.asarray(weights, dtype=np.float64), 0.0)
    if not positive.any():
        positive = np.ones_like(positive)
    total = positive.sum()
    return positive * (min(max(total, sum_bounds[0]), sum_bounds[1]) / total)


def _penalised(loss: ConvexLoss, weights: Floats, strength: float) -> tuple[float, Floats, Floats]:
    value, gradient, hessian = loss.derivatives(weights)
    deviations = weights - weights.mean()
    curvature = 2 * strength * (np.eye(loss.members) - 1 / loss.members)
    penalty = strength * float(deviations @ deviations)
    return value + penalty, gradient + 2 * strength * deviations, hessian + curvature


def _line_search(
    loss: ConvexLoss, weights: Floats, direction: Floats, value: float, slope: float, strength: float
) -> Floats | None:
    """Return the first of a full, half, quarter, ... step with half the descent of a quadratic (Armijo 1966), or None.

    With a weaker condition the search oscillates across a narrow valley.
    """
    length = 1.0
    while length > 1e-9:
        candidate = weights + length * direction
        deviations = candidate - candidate.mean()
        penalty = strength * float(deviations @ deviations)
        if loss.value(np.maximum(candidate, 0)) + penalty <= value + 0.25 * length * slope:
            return candidate
        length /= 2
    return None


def _quadratic_step(hessian: Floats, gradient: Floats, weights: Floats, sum_bounds: tuple[float, float]) -> Floats:
    """Return the step d (M,) of least gradient @ d + d @ hessian @ d / 2 that keeps the weights feasible.

    Primal active set method (Nocedal and Wright 2006, algorithm 16.3): members at 0 and a sum at its bound stay active
    until their multiplier shows that releasing them lowers the value.
    """
    members = len(weights)
    curved = hessian + np.diag(RIDGE * (np.diag(hessian) + 1e-6))
    step, is_free, total = np.zeros(members), weights > 0, float(weights.sum())
    is_bound = total <= sum_bounds[0] or total >= sum_bounds[1] or sum_bounds[0] == sum_bounds[1]
    for _ in range(10 * members + 10):
        slope = gradient + curved @ step
        free = np.flatnonzero(is_free)
        free_step, multiplier = _free_step(curved[np.ix_(free, free)], slope[free], is_bound)
        length, blocking = _first_block(weights[free] + step[free], free_step, total, sum_bounds, is_bound)
        step[free] += length * free_step
        total += 0.0 if is_bound else length * float(free_step.sum())
        if blocking is not None:
            if blocking == len(free):
                is_bound, total = True, min(max(total, sum_bounds[0]), sum_bounds[1])
            else:
                step[free[blocking]] = -weights[free[blocking]]
                is_free[free[blocking]] = False
            continue
        slope = gradient + curved @ step - multiplier
        active_slope = np.where(is_free, np.inf, slope)
        steepest = int(active_slope.argmin())
        sum_descent = _sum_descent(multiplier, total, sum_bounds) if is_bound else 0.0
        negligible = 1e-13 * (1 + np.abs(gradient).max())
        if max(-active_slope[steepest], sum_descent) <= negligible:
            break
        if sum_descent >= -active_slope[steepest]:
            is_bound = False
        else:
            is_free[steepest] = True
    return step


def _free_step(curved: Floats, slope: Floats, is_bound: bool) -> tuple[Floats, float]:
    """Return the free members' step to the minimum, which keeps a bound sum, and the multiplier of the sum."""
    sides = np.stack([-slope, np.ones_like(slope)], axis=1)
    unconstrained, along = np.linalg.solve(curved, sides).T
    multiplier = -float(unconstrained.sum() / along.sum()) if is_bound else 0.0
    return unconstrained + multiplier * along, multiplier


def _first_block(
    weights: Floats, step: Floats, total: float, sum_bounds: tuple[float, float], is_bound: bool
) -> tuple[float, int | None]:
    """Return the feasible fraction of a step, at most 1, and what blocks it: a member's index, or M for the sum."""
    is_shrinking = step < 0
    lengths = np.full(len(weights) + 1, np.inf)
    lengths[:-1][is_shrinking] = weights[is_shrinking] / -step[is_shrinking]
    growth = float(step.sum())
    if not is_bound and growth != 0:
        lengths[-1] = ((sum_bounds[1] if growth > 0 else sum_bounds[0]) - total) / growth
    first = int(lengths.argmin())
    return (1.0, None) if lengths[first] >= 1 else (max(0.0, float(lengths[first])), first)


def _sum_descent(multiplier: float, total: float, sum_bounds: tuple[float, float]) -> float:
    """Return the descent of the value per unit of a released sum that moves into its bounds; 0 if they are equal."""
    if sum_bounds[0] == sum_bounds[1]:
        return 0.0
    return max(0.0, multiplier if total >= sum_bounds[1] else -multiplier)
