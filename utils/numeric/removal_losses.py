"""Losses of a pool with one member removed, for all members at once.

The counterpart of `utils.numeric.candidate_losses`, with the same losses. A pool is the unweighted mean of distinct
members.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from utils.numeric import pools
from utils.numeric.metrics import SMALLEST_PROBABILITY
from utils.numeric.vote_losses import accuracy_loss, f1_loss

N_FACTORS = 16  # probabilities multiplied before each logarithm; the product of the smallest ones does not underflow
BLOCK = 2**18  # numbers that are processed at a time
SLACK = 1e-9  # relative to the pool's size: more than the rounding error of sums
Floats = NDArray[np.float64]


class RemovalScorer(Protocol):
    """One metric on a pool of at most M members."""

    def remove(self, member: int) -> None:
        """Remove this member from the pool."""

    def losses(self) -> Floats:
        """Return losses (M,) without each member; infinite for removed members and for the last one."""


def make_removal_scorer(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], inside: NDArray[np.bool_], metric: str
) -> RemovalScorer:
    """Return the scorer of removals by `metric`, for a pool of the members in `inside`, bool (M,).

    Takes probabilities (M, N, C) and labels (N,), unchecked; `metric` is log_loss, brier, accuracy or f1_macro.
    """
    return REMOVAL_SCORERS[metric](probabilities, labels, inside)


class LogLossRemovalScorer:
    """Log-loss, which needs each member's probability of the true class only."""

    def __init__(
        self, probabilities: NDArray[np.float32], labels: NDArray[np.int64], inside: NDArray[np.bool_]
    ) -> None:
        self.inside, self.rows = inside.copy(), len(labels)
        columns = -(-self.rows // N_FACTORS) * N_FACTORS
        # Columns beyond the rows hold probability 1, whose logarithm is 0.
        self.p_true = np.ones((len(probabilities), columns))
        self.p_true[:, : self.rows] = probabilities[:, np.arange(self.rows), labels]
        self.total = self.p_true[inside].sum(axis=0)

    def remove(self, member: int) -> None:
        self.inside[member] = False
        self.total -= self.p_true[member]

    def losses(self) -> Floats:
        losses = np.full(len(self.inside), np.inf)
        members = np.flatnonzero(self.inside)
        n_others = len(members) - 1
        step = max(1, BLOCK // len(self.total))
        for start in range(0, len(members) if n_others else 0, step):
            block = members[start : start + step]
            values = (self.total - self.p_true[block]) / n_others
            values.clip(SMALLEST_PROBABILITY, out=values)
            products = values.reshape(len(block), -1, N_FACTORS).prod(axis=2)
            losses[block] = -np.log(products).sum(axis=1) / self.rows
        return losses


class BrierRemovalScorer:
    """Brier score, the mean product of the members' residuals; the matrix (M, M) of products is computed once."""

    def __init__(
        self, probabilities: NDArray[np.float32], labels: NDArray[np.int64], inside: NDArray[np.bool_]
    ) -> None:
        self.inside = inside.copy()
        self.products = pools.LinearBrier(probabilities, labels).products

    def remove(self, member: int) -> None:
        self.inside[member] = False

    def losses(self) -> Floats:
        losses = np.full(len(self.inside), np.inf)
        members = np.flatnonzero(self.inside)
        if len(members) > 1:
            products = self.products[np.ix_(members, members)]
            remaining = products.sum() - 2 * products.sum(axis=1) + np.diag(products)
            losses[members] = remaining / (len(members) - 1) ** 2
        return losses


class VoteRemovalScorer:
    """Accuracy and macro F1; a row whose largest sum leads by more than 1 is decided, whichever member is removed."""

    def __init__(
        self,
        probabilities: NDArray[np.float32],
        labels: NDArray[np.int64],
        inside: NDArray[np.bool_],
        *,
        count_loss: Callable[..., Floats],
    ) -> None:
        self.probabilities, self.labels, self.inside, self.count_loss = (
            probabilities,
            labels,
            inside.copy(),
            count_loss,
        )
        self.total = probabilities[inside].sum(axis=0, dtype=np.float64)
        self.support = np.bincount(labels, minlength=self.total.shape[1])

    def remove(self, member: int) -> None:
        self.inside[member] = False
        self.total -= self.probabilities[member]

    def losses(self) -> Floats:
        losses = np.full(len(self.inside), np.inf)
        members = np.flatnonzero(self.inside)
        if len(members) == 1:
            return losses
        winners = self.total.argmax(axis=1)
        lead = self.total[np.arange(len(winners)), winners, None] - self.total
        can_win = lead <= 1 + SLACK * len(members)
        is_open = can_win.sum(axis=1) > 1
        decided = winners[~is_open]
        hits = self._per_class(decided[decided == self.labels[~is_open]])
        predicted = self._per_class(decided)
        rows = np.flatnonzero(is_open)
        truth, total = self.labels[rows], self.total[rows]
        step = max(1, BLOCK // max(1, total.size))
        for start in range(0, len(members), step):
            block = members[start : start + step]
            open_winners = (total - self.probabilities[block[:, None], rows]).argmax(axis=2)
            bins = open_winners + np.arange(len(block))[:, None] * len(self.support)
            counts = [self._per_class(part, len(block)) for part in (bins[open_winners == truth], bins.ravel())]
            losses[block] = self.count_loss(hits + counts[0], predicted + counts[1], self.support)
        return losses

    def _per_class(self, bins: NDArray[Any], members: int = 1) -> NDArray[np.intp]:
        """Return the number of occurrences of each class, (members, C), from bins member * C + class."""
        classes = len(self.support)
        return np.bincount(bins, minlength=members * classes).reshape(members, classes)


REMOVAL_SCORERS: dict[str, Callable[..., RemovalScorer]] = {
    "log_loss": LogLossRemovalScorer,
    "brier": BrierRemovalScorer,
    "accuracy": partial(VoteRemovalScorer, count_loss=accuracy_loss),
    "f1_macro": partial(VoteRemovalScorer, count_loss=f1_loss),
}
