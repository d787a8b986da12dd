"""Losses of a pool with one member added, for all candidate members at once.

Member m added to a pool makes the mixture (total + p_m) / (size + 1). Lower losses are better: log-loss, Brier score,
1 - accuracy and 1 - macro F1 as `utils.numeric.metrics` defines them; the predicted class is the first of the most
probable ones. Probabilities are read as float32, sums are float64. Since the last digits of a sum depend on its order,
losses that differ by at most `TIE_TOLERANCE` count as equal.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from utils.core.errors import UserError
from utils.numeric.member_blocks import BLOCK, MemberBlocks, check_probabilities
from utils.numeric.metrics import SMALLEST_PROBABILITY
from utils.numeric.vote_losses import VoteScorer, accuracy_loss, f1_loss

TIE_TOLERANCE = 1e-12
Floats = NDArray[np.float64]


class Scorer(Protocol):
    """One metric on M members' probabilities (M, N, C), which it does not modify, and labels (N,)."""

    def reset(self, total: NDArray[Any] | None, size: float) -> None:
        """Set the pool to the weighted sum `total` (N, C) of weight `size`; None and 0 empty it, the initial state."""

    def add(self, member: int) -> None:
        """Add this member to the pool, which may already hold it."""

    def loss(self) -> float:
        """Return the loss of the current pool, which must not be empty."""

    def losses(self, *, all_exact: bool = False) -> Floats:
        """Return losses (M,) with each member added: exact to rounding within 1e-6 of the lowest loss, others to 1e-6.

        With `all_exact`, all are exact to rounding.
        """


def make_scorer(probabilities: NDArray[Any], labels: NDArray[Any], metric: str) -> Scorer:
    """Return the scorer of candidates by `metric`: log_loss, brier, accuracy or f1_macro.

    Probabilities (M, N, C) may be memory-mapped: blocks of members are read in turn and released. Labels (N,) are in
    0..C-1. Raises UserError for shapes that do not match and values that are not probabilities.
    """
    if probabilities.ndim != 3 or 0 in probabilities.shape:
        raise UserError(f"probabilities: found shape {probabilities.shape}; expected (members, rows, classes)")
    rows, classes = probabilities.shape[1:]
    if labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise UserError(f"labels: found {labels.dtype} of shape {labels.shape}; expected integers of shape ({rows},)")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"labels: found {labels.min()}..{labels.max()}; expected 0..{classes - 1}")
    if metric not in SCORERS:
        raise UserError(f"metric: found {metric}; expected one of {', '.join(SCORERS)}")
    return SCORERS[metric](MemberBlocks(probabilities), labels.astype(np.intp))


def candidate_losses(
    current: NDArray[Any], candidates: NDArray[Any], labels: NDArray[Any], *, weight: float, metric: str
) -> Floats:
    """Return losses (M,) of (1 - weight) * current + weight * candidate, for current (N, C), candidates (M, N, C).

    `labels` are (N,). Weight 1 scores the candidates alone. To add several candidates one after another, `make_scorer`
    is faster. Raises UserError for a weight outside [1e-9, 1].
    """
    if not 1e-9 <= weight <= 1:
        raise UserError(f"weight of a candidate: found {weight}; expected a number from 1e-9 to 1")
    scorer = make_scorer(candidates, labels, metric)
    size = (1 - weight) / weight
    scorer.reset(np.asarray(current, dtype=np.float64) * size, size)
    return scorer.losses(all_exact=True)


def weighted_sum(probabilities: NDArray[Any], weights: NDArray[Any]) -> Floats:
    """Return the sum (N, C) of members' probabilities (M, N, C), read as float32, times their weights (M,)."""
    members = MemberBlocks(probabilities)
    total = np.zeros(probabilities.shape[1:])
    for member in np.flatnonzero(weights).tolist():
        total += weights[member] * members.member(member).astype(np.float64)
    return total


class LogLossScorer:
    """Log-loss, which needs each member's probability of the true class only: (M, N) instead of (M, N, C).

    The sum of logarithms is the logarithm of a product: the values of 24 rows are multiplied before the logarithm,
    three of them in float32. Probabilities of at least 1e-12 keep such products within the types' range.
    """

    N_FACTORS = 24

    def __init__(self, members: MemberBlocks, labels: NDArray[np.intp]) -> None:
        count, self.rows, classes = members.shape
        self.columns = -(-self.rows // self.N_FACTORS) * self.N_FACTORS
        self.true_columns = np.arange(self.rows) * classes + labels
        # Columns beyond the rows hold probability 1, whose logarithm is 0.
        self.p_true = np.ones((count, self.columns), dtype=np.float32)
        lowest = 1.0
        for block, values in members.blocks(self.rows):
            p_true = np.take(values, self.true_columns, axis=1)
            lowest = min(lowest, float(p_true.min()))
            check_probabilities(p_true, block.start)
            self.p_true[block, : self.rows] = p_true
        self.needs_clipping = lowest < SMALLEST_PROBABILITY
        self.reset(None, 0)

    def reset(self, total: NDArray[Any] | None, size: float) -> None:
        self.size = float(size)
        self.total = np.full(self.columns, self.size)
        self.total[: self.rows] = 0 if total is None else total.ravel()[self.true_columns]

    def add(self, member: int) -> None:
        self.total += self.p_true[member]
        self.size += 1

    def loss(self) -> float:
        mixture = np.maximum(self.total[: self.rows] / self.size, SMALLEST_PROBABILITY)
        return float(-np.log(mixture).mean())

    def losses(self, *, all_exact: bool = False) -> Floats:
        all_members = slice(0, len(self.p_true))
        if all_exact:
            return self._losses(all_members, np.float64)
        losses = self._losses(all_members, np.float32)
        near_best = np.flatnonzero(losses <= losses.min() + 1e-6)
        losses[near_best] = self._losses(near_best, np.float64)
        return losses

    def _losses(self, members: Any, dtype: type[np.floating[Any]]) -> Floats:
        p_true = self.p_true[members]
        total = self.total.astype(dtype)
        sums = np.empty(len(p_true))
        step = max(1, BLOCK // self.columns)
        for first in range(0, len(p_true), step):
            values = np.add(p_true[first : first + step], total, dtype=dtype)
            if self.needs_clipping:
                np.maximum(values, (self.size + 1) * SMALLEST_PROBABILITY, out=values)
            factors = values.reshape(len(values), self.N_FACTORS, -1)
            triples = factors[:, :8] * factors[:, 8:16]
            triples *= factors[:, 16:]
            product = triples.astype(np.float64)
            for half in (4, 2, 1):
                product = product[:, :half] * product[:, half:]
            sums[first : first + step] = np.log(product).sum(axis=(1, 2))
        return np.log(self.size + 1) * self.columns / self.rows - sums / self.rows


class BrierScorer:
    """Brier score, quadratic in the mixture: it needs the members' dot products, one pass over them per new member."""

    def __init__(self, members: MemberBlocks, labels: NDArray[np.intp]) -> None:
        count, self.rows, classes = members.shape
        self.members = members
        self.true_columns = np.arange(self.rows) * classes + labels
        self.squares, self.p_true_sums = np.empty(count), np.empty(count)
        for member in range(count):
            values = members.member(member)
            check_probabilities(values[None], member)
            flat = values.ravel().astype(np.float64)
            self.squares[member] = flat @ flat
            self.p_true_sums[member] = flat[self.true_columns].sum()
        self.products: dict[int, Floats] = {}
        self.reset(None, 0)

    def reset(self, total: NDArray[Any] | None, size: float) -> None:
        self.size = float(size)
        self.square, self.p_true_sum, self.with_total = 0.0, 0.0, np.zeros(len(self.squares))
        if total is not None:
            flat = np.asarray(total, dtype=np.float64).ravel()
            self.square, self.p_true_sum = float(flat @ flat), float(flat[self.true_columns].sum())
            self.with_total = self._products(flat)

    def _products(self, flat: Floats) -> Floats:
        return np.array(
            [self.members.member(member).ravel().astype(np.float64) @ flat for member in range(len(self.squares))]
        )

    def add(self, member: int) -> None:
        if member not in self.products:
            self.products[member] = self._products(self.members.member(member).ravel().astype(np.float64))
        self.square += 2 * self.with_total[member] + self.squares[member]
        self.p_true_sum += self.p_true_sums[member]
        self.with_total = self.with_total + self.products[member]
        self.size += 1

    def loss(self) -> float:
        return float(self._loss(self.square, self.p_true_sum, self.size))

    def _loss(self, squares: Any, p_true_sums: Any, size: float) -> Any:
        return (squares / size**2 - 2 * p_true_sums / size) / self.rows + 1

    def losses(self, *, all_exact: bool = False) -> Floats:
        squares = self.square + 2 * self.with_total + self.squares
        return self._loss(squares, self.p_true_sum + self.p_true_sums, self.size + 1)


SCORERS: dict[str, Callable[[MemberBlocks, NDArray[np.intp]], Scorer]] = {
    "log_loss": LogLossScorer,
    "brier": BrierScorer,
    "accuracy": partial(VoteScorer, count_loss=accuracy_loss),
    "f1_macro": partial(VoteScorer, count_loss=f1_loss),
}
