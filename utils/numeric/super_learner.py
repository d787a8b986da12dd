"""The super learner (van der Laan, Polley and Hubbard 2007): a log-linear pool that is shrunk to its best input.

Inputs are predictions of ensembles on rows that they were not fitted on. Non-negative weights w minimise

    log-loss of softmax(sum_i w_i log p_i) + prior of s + strength * (s - w_best),    s = sum_i w_i,

which is convex. The last term is a lasso on the weights of all inputs but the best: at a high strength only the best
input has weight, which acts as a temperature, and at lower strengths a few others join it. The prior on the sum is that
of every log-linear pool (`pools.scale_prior`). Folds of the rows select the strength.

Newton's method runs on the inputs of positive weight only, and the gradient of all inputs decides which join them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.numeric import pools, weight_search
from utils.numeric.metrics import log_loss_per_row, softmax
from utils.numeric.weight_search import Floats

STRENGTHS = (np.inf, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001, 0.0)
"""In nats per unit of weight, the strongest first: the strongest wins a tie."""
TUNING_TOLERANCE = 1e-6  # of weights that only select a strength
JOINING = 3  # inputs that join the active set at a time
Integers = NDArray[np.integer]


@dataclass(frozen=True)
class SuperLearner:
    """Fitted weights and the selected strength."""

    weights: Floats
    """(I,)"""
    best: int
    """The input that the weights are shrunk to: that of least loss after its temperature is fitted."""
    strength: float
    gap: float
    """Duality gap: no weights have a loss with prior and penalty that is lower by more than this."""
    held_out_losses: Floats
    """(S,): log-loss on held-out folds for each of `STRENGTHS`; NaN with a single fold"""


def fit(scores: NDArray[np.floating], labels: Integers, folds: Integers) -> SuperLearner:
    """Fit weights to clipped log-probabilities (I, N, C), labels (N,) and folds (N,).

    Each fit that evaluates the strengths determines its own best input. With a single fold only the best input has
    weight. Of inputs with equal predictions, the first gets all the weight.
    """
    weights = np.zeros(len(scores))
    distinct = np.unique(pools.first_duplicates([scores]))
    values: Floats = np.asarray(scores[distinct], dtype=np.float64)
    fold_names = np.unique(folds)
    losses = np.full((len(STRENGTHS), len(labels)), np.nan)
    for name in fold_names if len(fold_names) > 1 else ():
        inside = folds == name
        path = _path(values[:, ~inside], labels[~inside])
        for index, fold_weights in enumerate(path):
            probabilities = softmax(np.tensordot(fold_weights, values[:, inside], axes=1))
            losses[index, inside] = log_loss_per_row(probabilities, labels[inside])
    means = losses.mean(axis=1)
    best_index = 0 if len(fold_names) == 1 else int(np.flatnonzero(means <= means.min() * (1 + 1e-9))[0])
    best, best_solution = _best_alone(values, labels)
    solution = best_solution
    if STRENGTHS[best_index] < np.inf:
        solution = fit_weights(values, labels, best, STRENGTHS[best_index], start=best_solution.weights)
    weights[distinct] = solution.weights
    return SuperLearner(weights, int(distinct[best]), STRENGTHS[best_index], solution.gap, means)


def fit_weights(
    scores: Floats,
    labels: Integers,
    best: int,
    strength: float,
    *,
    start: Floats,
    tolerance: float = weight_search.TOLERANCE,
) -> weight_search.Solution:
    """Return the weights (I,) of least loss plus prior and penalty of a finite strength, starting from `start` (I,)."""
    penalties = np.full(len(scores), strength)
    penalties[best] = 0.0
    weights, active, steps, is_minimal = start, np.flatnonzero(start), 0, False
    while True:
        gradient = _gradient(scores, labels, weights) + penalties
        gap = weight_search.duality_gap(weights, gradient, pools.SUM_BOUNDS)
        descending = np.setdiff1d(np.flatnonzero(gradient < 0), active)
        objective = _Penalised(scores[active], labels, penalties[active])
        if gap <= tolerance or (is_minimal and not len(descending)):
            return weight_search.Solution(weights, objective.value(weights[active]), gap, steps)
        active = np.union1d(active, descending[np.argsort(gradient[descending], kind="stable")[:JOINING]])
        objective = _Penalised(scores[active], labels, penalties[active])
        solution = weight_search.minimise(
            objective, sum_bounds=pools.SUM_BOUNDS, start=weights[active], tolerance=tolerance / 2
        )
        weights, steps, is_minimal = np.zeros(len(scores)), steps + solution.steps, True
        weights[active] = solution.weights


class _Penalised:
    """Loss plus prior of a log-linear pool, plus a penalty (I,) per unit of each weight."""

    def __init__(self, scores: Floats, labels: Integers, penalties: Floats) -> None:
        self.objective, self.penalties = pools.LogLinearObjective(scores, labels), penalties
        self.members = len(scores)
        self.duplicate_of = np.arange(len(scores))

    def value(self, weights: Floats) -> float:
        return self.objective.value(weights) + float(self.penalties @ weights)

    def derivatives(self, weights: Floats) -> tuple[float, Floats, Floats]:
        value, gradient, hessian = self.objective.derivatives(weights)
        return value + float(self.penalties @ weights), gradient + self.penalties, hessian


def _path(scores: Floats, labels: Integers) -> list[Floats]:
    """Return weights (I,) for each of `STRENGTHS`; each search starts from those of the next stronger one."""
    best, alone = _best_alone(scores, labels)
    path = [alone.weights]
    for strength in STRENGTHS[1:]:
        solution = fit_weights(scores, labels, best, strength, start=path[-1], tolerance=TUNING_TOLERANCE)
        path.append(solution.weights)
    return path


def _best_alone(scores: Floats, labels: Integers) -> tuple[int, weight_search.Solution]:
    """Return the input of least loss after its temperature is fitted, the first on ties, and its solution over (I,)."""
    solutions = [pools.fit_log_linear(scores[[index]], labels) for index in range(len(scores))]
    best = int(np.argmin([solution.value for solution in solutions]))
    weights = np.zeros(len(scores))
    weights[best] = solutions[best].weights[0]
    return best, weight_search.Solution(weights, solutions[best].value, solutions[best].gap, solutions[best].steps)


def _gradient(scores: Floats, labels: Integers, weights: Floats) -> Floats:
    """Return the gradient (I,) of the loss plus prior."""
    active = np.flatnonzero(weights)
    errors = softmax(np.tensordot(weights[active], scores[active], axes=1))
    errors[np.arange(len(labels)), labels] -= 1
    slope = pools.scale_prior(float(weights.sum()), len(labels))[1]
    gradient: Floats = scores.reshape(len(scores), -1) @ errors.ravel() / len(labels) + slope
    return gradient
