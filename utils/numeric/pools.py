"""Convex pools: the weights of least loss for members' probabilities, each with a proof of how near the least it is.

A linear pool mixes probabilities by weights that are non-negative and sum to 1. A log-linear pool is the soft-max of
the weighted sum of log-probabilities; its weights are non-negative too, and their free sum is an inverse temperature.
The log-loss of both and the Brier score of the mixture are convex in the weights, so one method serves all: Newton's,
whose quadratic problem is solved exactly by an active set (Nocedal and Wright 2006, chapters 16 and 18).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from utils.numeric.metrics import SMALLEST_PROBABILITY

SUM_BOUNDS = (0.05, 20.0)
"""Bounds of the sum of log-linear weights: those of a temperature, so that separable rows have an optimum too."""
TOLERANCE = 1e-9
MAX_STEPS = 200
BLOCK = 4096  # numbers per member that are worked on at a time, so that they stay in the cache
ROUNDING = 1e-13  # of a value: smaller differences are noise, as is 1e-15 of any loss
RIDGE = 1e-11  # of the curvature: flat directions are not walked in
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Solution:
    """Weights and how good they are."""

    weights: Floats
    """(M,)"""
    value: float
    """Loss and penalty at these weights."""
    gap: float
    """No weights that are allowed have a value below `value - gap`: the duality gap of Jaggi (2013)."""
    steps: int
    """Newton steps taken."""


class ConvexLoss(Protocol):
    """A convex function of the weights (M,) of M members."""

    members: int
    duplicate_of: NDArray[np.int64]
    """(M,): the first member whose outputs are the same; such members get the same weight."""

    def value(self, weights: Floats) -> float:
        """The loss."""

    def derivatives(self, weights: Floats) -> tuple[float, Floats, Floats]:
        """The loss, its gradient (M,) and its Hessian (M, M)."""


class LinearLogLoss:
    """Log-loss of a mixture, by each member's probability of the true class, (M, N)."""

    def __init__(self, p_true: NDArray[Any]) -> None:
        self.p_true = np.maximum(np.asarray(p_true, dtype=np.float64), SMALLEST_PROBABILITY)
        self.members = len(self.p_true)
        self.duplicate_of = first_duplicates([self.p_true])

    def value(self, weights: Floats) -> float:
        """Mean of -log of the mixture, in nats."""
        return float(-np.log(weights @ self.p_true).mean())

    def derivatives(self, weights: Floats) -> tuple[float, Floats, Floats]:
        """As `Loss` says."""
        mixture = weights @ self.p_true
        shares = self.p_true / mixture
        return float(-np.log(mixture).mean()), -shares.mean(axis=1), shares @ shares.T / mixture.size


class LinearBrier:
    """Brier score of a mixture of probabilities (M, N, C) with labels (N,): quadratic in weights that sum to 1."""

    def __init__(self, probabilities: NDArray[Any], labels: NDArray[Any]) -> None:
        self.members, rows, classes = probabilities.shape
        self.products = np.zeros((self.members, self.members))
        length = max(1, BLOCK // classes)
        for start in range(0, rows, length):
            residuals = probabilities[:, start : start + length].astype(np.float64)
            truth = labels[start : start + length]
            residuals[:, np.arange(len(truth)), truth] -= 1
            flat = residuals.reshape(self.members, -1)
            self.products += flat @ flat.T / rows
        self.duplicate_of = first_duplicates([probabilities])

    def value(self, weights: Floats) -> float:
        """Mean over rows of the squared distance to the one-hot truth, where the weights sum to 1."""
        return float(weights @ self.products @ weights)

    def derivatives(self, weights: Floats) -> tuple[float, Floats, Floats]:
        """As `Loss` says."""
        half = self.products @ weights
        return float(weights @ half), 2 * half, 2 * self.products


class LogLinearLogLoss:
    """Log-loss of the soft-max of the weighted sum of scores (M, N, C) with labels (N,).

    Scores are log-probabilities, clipped by the caller; a constant added to a row of a member changes nothing, so that
    logits serve as well.
    """

    def __init__(self, scores: NDArray[Any], labels: NDArray[Any]) -> None:
        self.members, self.rows, classes = scores.shape
        length = max(1, BLOCK // classes)
        self.blocks = [
            _margins(scores[:, start : start + length], labels[start : start + length])
            for start in range(0, self.rows, length)
        ]
        self.duplicate_of = first_duplicates(self.blocks)

    def value(self, weights: Floats) -> float:
        """Mean of -log of the pool's probability of the true class, in nats."""
        return sum(float(losses.sum()) for _, losses, _ in self._pooled(weights)) / self.rows

    def derivatives(self, weights: Floats) -> tuple[float, Floats, Floats]:
        """As `Loss` says."""
        value, gradient, hessian = 0.0, np.zeros(self.members), np.zeros((self.members, self.members))
        for margins, losses, probabilities in self._pooled(weights):
            value += float(losses.sum())
            means = (margins * probabilities).sum(axis=1)
            gradient += means.sum(axis=1)
            # Centred first: the difference of two sums may come out below 0 where the soft-max is saturated.
            spread = ((margins - means[:, None]) * np.sqrt(probabilities)).reshape(self.members, -1)
            hessian += spread @ spread.T
        return value / self.rows, gradient / self.rows, hessian / self.rows

    def _pooled(self, weights: Floats) -> Iterator[tuple[Floats, Floats, Floats]]:
        """Per block margins (M, C, n), losses (n,) and probabilities (C, n)."""
        for margins in self.blocks:
            pooled = (weights @ margins.reshape(self.members, -1)).reshape(margins.shape[1:])
            largest = pooled.max(axis=0)
            exponentials = np.exp(pooled - largest)
            sums = exponentials.sum(axis=0)
            yield margins, np.log(sums) + largest, exponentials / sums


class _CommonWeight:
    """A loss as a function of the one sum that all members share equally."""

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
    """Weights of the mixture of least log-loss.

    `p_true` (M, N) is each member's probability of the true class, clipped at 1e-12; `strength` and the rest as
    `minimise` says.
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
    """Weights of the mixture of least Brier score for probabilities (M, N, C) with labels (N,); see `minimise`."""
    return minimise(LinearBrier(probabilities, labels), strength=strength, start=start, tolerance=tolerance)


def fit_log_linear(
    scores: NDArray[Any],
    labels: NDArray[Any],
    *,
    strength: float = 0.0,
    start: Floats | None = None,
    sums: tuple[float, float] = SUM_BOUNDS,
    tolerance: float = TOLERANCE,
) -> Solution:
    """Weights of the log-linear pool of least log-loss.

    Scores (M, N, C) are log-probabilities that the caller has clipped, or logits; labels (N,). `sums` bounds the sum of
    the weights, which is the inverse of the pool's temperature; `strength` and the rest as `minimise` says.
    """
    loss = LogLinearLogLoss(scores, labels)
    return minimise(loss, strength=strength, start=start, sums=sums, tolerance=tolerance)


def minimise(
    loss: ConvexLoss,
    *,
    strength: float = 0.0,
    start: Floats | None = None,
    sums: tuple[float, float] = (1.0, 1.0),
    tolerance: float = TOLERANCE,
) -> Solution:
    """Non-negative weights (M,) of least loss + strength * |w - mean(w)|^2, their sum within `sums`.

    The penalty draws the weights together and leaves their sum free; infinite strength gives equal weights. `start`
    (M,), scaled into `sums`, is where the search begins (else equal weights); it ends when the duality gap is at most
    `tolerance`, or where rounding allows no further descent, which the gap of the solution tells.
    """
    if np.isinf(strength):
        common = minimise(_CommonWeight(loss), sums=sums, tolerance=tolerance)
        return Solution(np.full(loss.members, common.weights[0] / loss.members), common.value, common.gap, common.steps)
    weights = _feasible(average_duplicates(np.ones(loss.members) if start is None else start, loss.duplicate_of), sums)
    step = last = 0
    while True:
        value, gradient, hessian = _penalised(loss, weights, strength)
        gap = duality_gap(weights, gradient, sums)
        if gap <= tolerance or step == MAX_STEPS or last == 2:
            break
        direction = average_duplicates(_quadratic_step(hessian, gradient, weights, sums), loss.duplicate_of)
        slope = float(gradient @ direction)
        if -slope <= ROUNDING * (abs(value) + 0.01):  # values no longer tell better from worse: trust the slope
            last += 1
            moved: Floats | None = weights + direction
        else:
            moved = _descend(loss, weights, direction, value, slope, strength)
        if moved is None:
            break
        weights = _feasible(moved, sums)
        step += 1
    return Solution(weights, value, gap, step)


def duality_gap(weights: Floats, gradient: Floats, sums: tuple[float, float]) -> float:
    """Bound on how far a convex function at `weights` (M,) lies above its least value, by its gradient there (M,)."""
    least = float(gradient.min())
    return max(0.0, float(weights @ gradient) - min(sums[0] * least, sums[1] * least))


def _margins(scores: NDArray[Any], labels: NDArray[Any]) -> Floats:
    """Scores (M, n, C) less that of the true class, as (M, C, n): sums over classes then run along long rows."""
    exact = np.asarray(scores, dtype=np.float64)
    differences = exact - exact[:, np.arange(len(labels)), labels][:, :, None]
    return np.ascontiguousarray(differences.transpose(0, 2, 1))


def first_duplicates(blocks: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """For each member the first with equal numbers, (M,), in blocks (M, ...); few numbers tell most apart."""
    found = np.arange(len(blocks[0]))
    heads = blocks[0].reshape(len(found), -1)[:, :16]
    for member in found[1:]:
        for earlier in np.flatnonzero((heads[:member] == heads[member]).all(axis=1)):
            if all(np.array_equal(block[earlier], block[member]) for block in blocks):
                found[member] = earlier
                break
    return found


def average_duplicates(values: NDArray[Any], duplicate_of: NDArray[np.int64]) -> Floats:
    """Values (M,) with those of equal members replaced by their mean."""
    counts = np.bincount(duplicate_of, minlength=len(duplicate_of))[duplicate_of]
    means: Floats = np.bincount(duplicate_of, weights=values, minlength=len(duplicate_of))[duplicate_of] / counts
    return means


def _feasible(weights: Floats, sums: tuple[float, float]) -> Floats:
    positive = np.maximum(np.asarray(weights, dtype=np.float64), 0.0)
    if not positive.any():
        positive = np.ones_like(positive)
    total = positive.sum()
    return positive * (min(max(total, sums[0]), sums[1]) / total)


def _penalised(loss: ConvexLoss, weights: Floats, strength: float) -> tuple[float, Floats, Floats]:
    value, gradient, hessian = loss.derivatives(weights)
    apart = weights - weights.mean()
    curvature = 2 * strength * (np.eye(loss.members) - 1 / loss.members)
    return value + strength * float(apart @ apart), gradient + 2 * strength * apart, hessian + curvature


def _descend(
    loss: ConvexLoss, weights: Floats, direction: Floats, value: float, slope: float, strength: float
) -> Floats | None:
    """The first of full, half, quarter... steps with half the fall of a quadratic (Armijo 1966); None where none has.

    Asking for less lets the search swing from one side of a narrow valley to the other.
    """
    length = 1.0
    while length > 1e-9:
        moved = weights + length * direction
        apart = moved - moved.mean()
        if loss.value(np.maximum(moved, 0)) + strength * float(apart @ apart) <= value + 0.25 * length * slope:
            return moved
        length /= 2
    return None


def _quadratic_step(hessian: Floats, gradient: Floats, weights: Floats, sums: tuple[float, float]) -> Floats:
    """The step d (M,) of least gradient @ d + d @ hessian @ d / 2 that keeps the weights allowed.

    Primal active set (Nocedal and Wright 2006, algorithm 16.3): members at 0 and a sum at its bound are held until
    their multiplier says that letting go lowers the value.
    """
    members = len(weights)
    curved = hessian + np.diag(RIDGE * (np.diag(hessian) + 1e-6))
    step, free, total = np.zeros(members), weights > 0, float(weights.sum())
    tied = total <= sums[0] or total >= sums[1] or sums[0] == sums[1]
    for _ in range(10 * members + 10):
        slope = gradient + curved @ step
        chosen = np.flatnonzero(free)
        towards, common = _towards(curved[np.ix_(chosen, chosen)], slope[chosen], tied)
        length, blocking = _first_block(weights[chosen] + step[chosen], towards, total, sums, tied)
        step[chosen] += length * towards
        total += 0.0 if tied else length * float(towards.sum())
        if blocking is not None:
            if blocking == len(chosen):
                tied, total = True, min(max(total, sums[0]), sums[1])
            else:
                step[chosen[blocking]] = -weights[chosen[blocking]]
                free[chosen[blocking]] = False
            continue
        slope = gradient + curved @ step - common
        held = np.where(free, np.inf, slope)
        worst = int(held.argmin())
        of_sum = _pull(common, total, sums) if tied else 0.0
        least = 1e-13 * (1 + np.abs(gradient).max())
        if max(-held[worst], of_sum) <= least:
            break
        if of_sum >= -held[worst]:
            tied = False
        else:
            free[worst] = True
    return step


def _towards(curved: Floats, slope: Floats, tied: bool) -> tuple[Floats, float]:
    """The free members' step to the least value, their sum unchanged where it is tied; the slope they then share."""
    sides = np.stack([-slope, np.ones_like(slope)], axis=1)
    unbound, along = np.linalg.solve(curved, sides).T
    common = -float(unbound.sum() / along.sum()) if tied else 0.0
    return unbound + common * along, common


def _first_block(
    places: Floats, towards: Floats, total: float, sums: tuple[float, float], tied: bool
) -> tuple[float, int | None]:
    """How much of a step is allowed, at most 1, and which member stops it: its number, or M for the sum."""
    shrinking = towards < 0
    lengths = np.full(len(places) + 1, np.inf)
    lengths[:-1][shrinking] = places[shrinking] / -towards[shrinking]
    growth = float(towards.sum())
    if not tied and growth != 0:
        lengths[-1] = ((sums[1] if growth > 0 else sums[0]) - total) / growth
    first = int(lengths.argmin())
    return (1.0, None) if lengths[first] >= 1 else (max(0.0, float(lengths[first])), first)


def _pull(common: float, total: float, sums: tuple[float, float]) -> float:
    """How much the value falls per unit when a tied sum is let go into its bounds; 0 where it may not go."""
    if sums[0] == sums[1]:
        return 0.0
    return max(0.0, common if total >= sums[1] else -common)
