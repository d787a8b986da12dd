"""Newton's method for convex functions of non-negative weights whose sum is bounded, with its duality gap.

An active set method solves the quadratic subproblems exactly (Nocedal and Wright 2006, chapters 16 and 18).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 1e-9
MAX_STEPS = 200
VALUE_ROUNDING = 1e-13  # relative to a value; smaller differences are rounding errors, as is 1e-15 of any loss
RIDGE = 1e-11  # relative to the curvature; prevents steps along flat directions
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Solution:
    """Weights with their loss and duality gap."""

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


class _CommonWeight:
    """A loss as a function of the sum of M equal weights."""

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
    is at most `tolerance`, or when rounding allows no further descent; the solution states its gap.
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
        if -slope <= VALUE_ROUNDING * (abs(value) + 0.01):  # differences of values are rounding errors: take the step
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
    """Return the weight of least loss of one member within `bounds`, as `minimise` does."""
    lower, upper = (np.array([bound]) for bound in bounds)
    weights, step = np.clip([start], *bounds), 0
    while True:
        value, gradient, hessian = loss.derivatives(weights)
        gap = duality_gap(weights, gradient, bounds)
        if gap <= tolerance or step == MAX_STEPS:
            break
        candidates, lower, upper = newton_candidates(weights, gradient, hessian[0], lower, upper, bounds)
        if candidates == weights:
            break
        weights, step = candidates, step + 1
    return Solution(weights, value, gap, step)


def newton_candidates(
    weights: Floats,
    slopes: Floats,
    curvatures: Floats,
    lower: Floats,
    upper: Floats,
    bounds: tuple[float, float],
) -> tuple[Floats, Floats, Floats]:
    """Return the next weights (F,) of F convex functions of one weight, and narrower brackets (F,) of their minima.

    Newton's method on the derivative, safeguarded by bisection: `lower` and `upper` bracket its root within `bounds`,
    and a step beyond a bracket that is no bound is replaced by the midpoint.
    """
    is_rising = slopes > 0
    lower, upper = np.where(is_rising, lower, weights), np.where(is_rising, weights, upper)
    steps = np.divide(slopes, curvatures, out=np.where(is_rising, np.inf, -np.inf), where=curvatures > 0)
    candidates, midpoints = weights - steps, (lower + upper) / 2
    below, above = candidates <= lower, candidates >= upper
    candidates = np.where(above, np.where(upper == bounds[1], upper, midpoints), candidates)
    return np.where(below, np.where(lower == bounds[0], lower, midpoints), candidates), lower, upper


def duality_gap(weights: Floats, gradient: Floats, sum_bounds: tuple[float, float]) -> float:
    """Return an upper bound of a convex function at `weights` (M,) minus its minimum, from its gradient (M,)."""
    least = float(gradient.min())
    return max(0.0, float(weights @ gradient) - min(sum_bounds[0] * least, sum_bounds[1] * least))


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
    """Return the weights after the first of a full, half, quarter, ... step with sufficient decrease, or None.

    Sufficient is half the decrease of a quadratic (Armijo 1966); a weaker condition lets the search oscillate across a
    narrow valley.
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

    Primal active set method (Nocedal and Wright 2006, algorithm 16.3): the constraints of members at 0 and of a sum at
    its bound stay active until their multiplier shows that releasing them lowers the value.
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
    """Return the free members' step to the minimum, of constant sum if `is_bound`, and the multiplier of the sum."""
    sides = np.stack([-slope, np.ones_like(slope)], axis=1)
    unconstrained, along = np.linalg.solve(curved, sides).T
    multiplier = -float(unconstrained.sum() / along.sum()) if is_bound else 0.0
    return unconstrained + multiplier * along, multiplier


def _first_block(
    weights: Floats, step: Floats, total: float, sum_bounds: tuple[float, float], is_bound: bool
) -> tuple[float, int | None]:
    """Return the feasible fraction of a step, at most 1, and what limits it: a member's index, M for the sum, None."""
    is_shrinking = step < 0
    lengths = np.full(len(weights) + 1, np.inf)
    lengths[:-1][is_shrinking] = weights[is_shrinking] / -step[is_shrinking]
    growth = float(step.sum())
    if not is_bound and growth != 0:
        lengths[-1] = ((sum_bounds[1] if growth > 0 else sum_bounds[0]) - total) / growth
    first = int(lengths.argmin())
    return (1.0, None) if lengths[first] >= 1 else (max(0.0, float(lengths[first])), first)


def _sum_descent(multiplier: float, total: float, sum_bounds: tuple[float, float]) -> float:
    """Return the decrease of the value per unit by which a released sum moves into its bounds; 0 for equal bounds."""
    if sum_bounds[0] == sum_bounds[1]:
        return 0.0
    return max(0.0, multiplier if total >= sum_bounds[1] else -multiplier)
