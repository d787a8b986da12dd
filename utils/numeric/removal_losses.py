"""How good would the pool be without this member? Losses for all members at once; numpy alone.

The counterpart of `utils.numeric.candidate_losses`, with its losses: a pool is the plain mean of members, each in it
once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from utils.numeric import pools
from utils.numeric.candidate_losses import accuracy_loss, f1_loss
from utils.numeric.metrics import SMALLEST_PROBABILITY

FACTORS = 16  # probabilities multiplied before a logarithm is taken; so many of the smallest are still a number
BLOCK = 2**18  # numbers handled at a time
SLACK = 1e-9  # of the pool's size: more than what sums are rounded by
Floats = NDArray[np.float64]


class RemovalScorer(Protocol):
    """One metric on a pool of M members at first."""

    def remove(self, member: int) -> None:
        """Take this member out of the pool for good."""

    def losses(self) -> Floats:
        """Losses (M,) without each member; infinite for those that are out, and where no other would be left."""


def make_removal_scorer(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], inside: NDArray[np.bool_], metric: str
) -> RemovalScorer:
    """What scores removals by `metric`, from the pool of the members that are `inside` (M,).

    Probabilities (M, N, C), labels (N,); log_loss, brier, accuracy or f1_macro.
    """
    return REMOVAL_SCORERS[metric](probabilities, labels, inside)


class LogLossRemovalScorer:
    """Needs each member's probability of the true class alone."""

    def __init__(
        self, probabilities: NDArray[np.float32], labels: NDArray[np.int64], inside: NDArray[np.bool_]
    ) -> None:
        self.inside, self.rows = inside.copy(), len(labels)
        columns = -(-self.rows // FACTORS) * FACTORS
        # Columns beyond the rows hold probability 1, whose logarithm adds nothing.
        self.p_true = np.ones((len(probabilities), columns))
        self.p_true[:, : self.rows] = probabilities[:, np.arange(self.rows), labels]
        self.total = self.p_true[inside].sum(axis=0)

    def remove(self, member: int) -> None:
        self.inside[member] = False
        self.total -= self.p_true[member]

    def losses(self) -> Floats:
        found = np.full(len(self.inside), np.inf)
        members = np.flatnonzero(self.inside)
        others = len(members) - 1
        step = max(1, BLOCK // len(self.total))
        for start in range(0, len(members) if others else 0, step):
            block = members[start : start + step]
            values = (self.total - self.p_true[block]) / others
            values.clip(SMALLEST_PROBABILITY, out=values)
            products = values.reshape(len(block), -1, FACTORS).prod(axis=2)
            found[block] = -np.log(products).sum(axis=1) / self.rows
        return found


class BrierRemovalScorer:
    """The score of a mean is the mean product of its members' residuals, of which there is one table (M, M)."""

    def __init__(
        self, probabilities: NDArray[np.float32], labels: NDArray[np.int64], inside: NDArray[np.bool_]
    ) -> None:
        self.inside = inside.copy()
        self.products = pools.LinearBrier(probabilities, labels).products

    def remove(self, member: int) -> None:
        self.inside[member] = False

    def losses(self) -> Floats:
        found = np.full(len(self.inside), np.inf)
        members = np.flatnonzero(self.inside)
        if len(members) > 1:
            products = self.products[np.ix_(members, members)]
            left = products.sum() - 2 * products.sum(axis=1) + np.diag(products)
            found[members] = left / (len(members) - 1) ** 2
        return found


class VoteRemovalScorer:
    """Accuracy and macro F1: a row whose largest sum leads by more than 1 is decided, whoever is taken out."""

    def __init__(
        self,
        probabilities: NDArray[np.float32],
        labels: NDArray[np.int64],
        inside: NDArray[np.bool_],
        *,
        of_counts: Callable[..., Floats],
    ) -> None:
        self.probabilities, self.labels, self.inside, self.of_counts = probabilities, labels, inside.copy(), of_counts
        self.total = probabilities[inside].sum(axis=0, dtype=np.float64)
        self.support = np.bincount(labels, minlength=self.total.shape[1])

    def remove(self, member: int) -> None:
        self.inside[member] = False
        self.total -= self.probabilities[member]

    def losses(self) -> Floats:
        found = np.full(len(self.inside), np.inf)
        members = np.flatnonzero(self.inside)
        if len(members) == 1:
            return found
        winners = self.total.argmax(axis=1)
        lead = self.total[np.arange(len(winners)), winners, None] - self.total
        near = lead <= 1 + SLACK * len(members)
        is_open = near.sum(axis=1) > 1
        decided = winners[~is_open]
        hits = self._per_class(decided[decided == self.labels[~is_open]])
        predicted = self._per_class(decided)
        rows = np.flatnonzero(is_open)
        truth, total = self.labels[rows], self.total[rows]
        step = max(1, BLOCK // max(1, total.size))
        for start in range(0, len(members), step):
            block = members[start : start + step]
            voted = (total - self.probabilities[block[:, None], rows]).argmax(axis=2)
            numbered = voted + np.arange(len(block))[:, None] * len(self.support)
            counts = [self._per_class(part, len(block)) for part in (numbered[voted == truth], numbered.ravel())]
            found[block] = self.of_counts(hits + counts[0], predicted + counts[1], self.support)
        return found

    def _per_class(self, numbers: NDArray[Any], members: int = 1) -> NDArray[np.intp]:
        """How often each class occurs, (members, C)."""
        classes = len(self.support)
        return np.bincount(numbers, minlength=members * classes).reshape(members, classes)


REMOVAL_SCORERS: dict[str, Callable[..., RemovalScorer]] = {
    "log_loss": LogLossRemovalScorer,
    "brier": BrierRemovalScorer,
    "accuracy": partial(VoteRemovalScorer, of_counts=accuracy_loss),
    "f1_macro": partial(VoteRemovalScorer, of_counts=f1_loss),
}
