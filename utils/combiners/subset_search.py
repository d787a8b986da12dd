"""Searches for subsets of members with a good unweighted mean, within limits on latency and size.

Members are sorted by name. Members are compared by the metric; ties (`candidate_losses.TIE_TOLERANCE`) go to the lower
log-loss, then to the first. Each search returns subsets from small to large, of at most `target_size` members each and
all within the limits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from utils.core.errors import UserError
from utils.numeric import diversity
from utils.numeric.candidate_losses import TIE_TOLERANCE, Scorer, make_scorer, weighted_sum
from utils.numeric.diversity import Diversity
from utils.numeric.means import is_within_one_standard_error
from utils.numeric.metrics import row_losses
from utils.numeric.removal_losses import make_removal_scorer

ROUNDING = 1e-9  # relative excess of a sum of costs over a limit that counts as rounding
Floats = NDArray[np.float64]


class BudgetError(UserError):
    """Raised where no member is within the limits."""


@dataclass(frozen=True)
class CostLimit:
    """A limit on the cost of the selected members together."""

    unit: str
    config_key: str
    """Key in the configuration."""
    maximum: float
    """Infinity where there is no limit."""
    costs: Floats
    """(M,); NaN where unknown, which counts as 0"""

    def total(self, members: Sequence[int]) -> float:
        """Return the sum of the known costs of these members."""
        return float(np.nansum(self.costs[list(members)]))

    def known_total(self, members: Sequence[int]) -> float | None:
        """Return the sum of the costs of these members; None if one of them is unknown."""
        total = float(self.costs[list(members)].sum())
        return None if np.isnan(total) else total

    def allows(self, spent: Floats | float) -> NDArray[np.bool_]:
        """Return whether the cost `spent` is within the limit, elementwise."""
        return np.asarray(spent <= self.maximum * (1 + ROUNDING))

    def excess(self, spent: float) -> str:
        """Return text such as `130 ms > 100 ms`."""
        return f"{spent:.4g} {self.unit} > {self.maximum:.4g} {self.unit}"


@dataclass(frozen=True)
class SubsetProblem:
    """Members' predictions on rows, and the requirements of a subset."""

    names: tuple[str, ...]
    """(M,), sorted"""
    probabilities: NDArray[np.float32]
    """(M, N, C)"""
    labels: NDArray[np.int64]
    """(N,)"""
    metric: str
    """f1_macro, accuracy, log_loss or brier"""
    target_size: int
    """The most members to keep."""
    limits: tuple[CostLimit, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metric and, if it is different, the tie-breaker."""
        return tuple(dict.fromkeys((self.metric, "log_loss")))

    @cached_property
    def affordable(self) -> NDArray[np.bool_]:
        """Which members (M,) are within the limits on their own. Raises BudgetError if none is."""
        mask = self.affordable_with(())
        if not mask.any():
            raise BudgetError(self._cheapest())
        return mask

    def affordable_with(self, members: Sequence[int]) -> NDArray[np.bool_]:
        """Return which members (M,) can be added to these within the limits."""
        mask = np.ones(len(self.names), dtype=bool)
        for limit in self.limits:
            mask &= limit.allows(limit.total(members) + np.nan_to_num(limit.costs))
        mask[list(members)] = False
        return mask

    def within_limits(self, members: Sequence[int]) -> bool:
        """Return whether these members together are within the limits."""
        return all(limit.allows(limit.total(members)) for limit in self.limits)

    @cached_property
    def hits(self) -> NDArray[np.bool_]:
        """(M, N): whether the member classifies the row correctly."""
        hits: NDArray[np.bool_] = self.probabilities.argmax(axis=2) == self.labels
        return hits

    @cached_property
    def diversity(self) -> Diversity:
        """Diversity of each pair of members."""
        return diversity.pairwise_diversity(self.hits)

    def scorers(self) -> list[Scorer]:
        """Return the scorers of the metric and of the tie-breaker."""
        return [make_scorer(self.probabilities, self.labels, metric) for metric in self.metrics]

    def mean(self, members: Sequence[int]) -> Floats:
        """Return the unweighted mean (N, C) of these members' probabilities."""
        weights = np.bincount(members, minlength=len(self.names))
        return weighted_sum(self.probabilities, weights) / len(members)

    def of_rows(self, rows: NDArray[np.bool_]) -> SubsetProblem:
        """Return the same problem on some of the rows, bool (N,)."""
        return SubsetProblem(
            self.names, self.probabilities[:, rows], self.labels[rows], self.metric, self.target_size, self.limits
        )

    def _cheapest(self) -> str:
        """Return the error text for limits that no member is within; it names the one with the smallest excess."""
        factors = np.max([np.nan_to_num(limit.costs) / limit.maximum for limit in self.limits], axis=0)
        nearest = int(factors.argmin())
        broken = [limit for limit in self.limits if not limit.allows(limit.total([nearest]))]
        values = " and ".join(f"{limit.excess(limit.total([nearest]))} ({limit.config_key})" for limit in broken)
        return (
            f"no member is within the budget; the cheapest possible is {self.names[nearest]} alone: {values}. Raise "
            "the limit, or set it to null"
        )


@dataclass(frozen=True)
class Subset:
    """A subset of the members."""

    members: tuple[int, ...]
    """In the order of selection."""
    reasons: dict[int, str] = field(default_factory=dict)
    """{member: why it was not selected}, where the search gives a reason."""


def greedy_forward(problem: SubsetProblem) -> list[Subset]:
    """Start empty and add the best member repeatedly."""
    scorers = problem.scorers()
    selected: list[int] = []
    subsets: list[Subset] = []
    allowed = problem.affordable
    while allowed.any() and len(selected) < problem.target_size:
        selected.append(_best([scorer.losses(all_exact=True) for scorer in scorers], allowed))
        for scorer in scorers:
            scorer.add(selected[-1])
        subsets.append(Subset(tuple(selected)))
        allowed = problem.affordable_with(selected)
    return subsets


def greedy_backward(problem: SubsetProblem) -> list[Subset]:
    """Start with all members that are within the limits on their own and remove the least useful one repeatedly.

    Of equally useful members, the last by name is removed.
    """
    inside = problem.affordable.copy()
    removers = [
        make_removal_scorer(problem.probabilities, problem.labels, inside, metric) for metric in problem.metrics
    ]
    subsets: list[Subset] = []
    while True:
        remaining = np.flatnonzero(inside).tolist()
        if len(remaining) <= problem.target_size and problem.within_limits(remaining):
            subsets.append(Subset(tuple(remaining)))
        if len(remaining) == 1:
            return subsets[::-1]
        worst = _best([remover.losses() for remover in removers], inside, last=True)
        for remover in removers:
            remover.remove(worst)
        inside[worst] = False


def diversity_max(problem: SubsetProblem) -> list[Subset]:
    """Start with the best member and repeatedly add the one with the largest mean disagreement with those selected.

    Two members disagree on a row that exactly one of them classifies correctly. Disagreement alone would select the
    worst members. A member is therefore not added if its accuracy is below the midpoint between that of the most
    frequent class and that of the best member, or if it lowers the accuracy of the mean by more than one paired
    standard error. The search ends when no member is left. Of members that disagree equally, the better is added first.
    """
    scorers = problem.scorers()
    accuracy = problem.hits.mean(axis=1)
    selected = [_best([scorer.losses(all_exact=True) for scorer in scorers], problem.affordable)]
    majority_accuracy = np.bincount(problem.labels).max() / len(problem.labels)
    least = min(accuracy[selected[0]], (accuracy[selected[0]] + majority_accuracy) / 2)
    reasons = {
        int(member): f"hopeless: accuracy {accuracy[member]:.4f}, half-way from guessing to the best is {least:.4f}"
        for member in np.flatnonzero(accuracy < least)
    }
    subsets = [Subset(tuple(selected), reasons)]
    total = problem.mean(selected)
    while len(selected) < problem.target_size:
        for scorer in scorers:
            scorer.add(selected[-1])
        allowed = problem.affordable_with(selected) & (accuracy >= least)
        order = [-problem.diversity.disagreement[:, selected].mean(axis=1)]
        order += [scorer.losses(all_exact=True) for scorer in scorers]
        before = row_losses(total / len(selected), problem.labels, "accuracy")
        while allowed.any():
            member = _best(order, allowed)
            allowed[member] = False
            after = (total + problem.probabilities[member]) / (len(selected) + 1)
            if is_within_one_standard_error(row_losses(after, problem.labels, "accuracy"), before):
                break
        else:
            return subsets
        selected.append(member)
        total += problem.probabilities[member]
        subsets.append(Subset(tuple(selected), reasons))
    return subsets


def clustering(problem: SubsetProblem) -> list[Subset]:
    """Group members with errors on the same rows and select the best of each group.

    Hierarchical clustering with average linkage on 1 - error correlation. Groups are in the order of their best
    members. If the best member of a group exceeds the limits, the next best within them is selected, or none.
    """
    members = np.flatnonzero(problem.affordable)
    ranks = _ranks(problem)
    subsets = []
    for labels in _groups(problem, members)[: problem.target_size]:
        groups = [members[labels == label] for label in np.unique(labels)]
        groups = [group[np.argsort(ranks[group])] for group in groups]
        selected: list[int] = []
        reasons: dict[int, str] = {}
        for group in sorted(groups, key=lambda group: ranks[group[0]]):
            fitting = group[problem.affordable_with(selected)[group]]
            if len(fitting):
                selected.append(int(fitting[0]))
                reasons |= {
                    int(member): f"represented by {problem.names[selected[-1]]} (error correlation "
                    f"{problem.diversity.error_correlation[member, selected[-1]]:.2f})"
                    for member in fitting
                }
        subsets.append(Subset(tuple(selected), reasons))
    return subsets


def _best(losses: Sequence[Floats], allowed: NDArray[np.bool_], *, last: bool = False) -> int:
    """Return the first, or last, of the allowed members, bool (M,), with the least loss.

    `losses` are arrays (M,); each breaks the ties of those before it.
    """
    best = np.flatnonzero(allowed)
    for values in losses:
        best = best[values[best] <= values[best].min() + TIE_TOLERANCE]
    return int(best[-1 if last else 0])


def _ranks(problem: SubsetProblem) -> NDArray[np.intp]:
    """Return the rank (M,) of each member, 0 for the best."""
    losses = [scorer.losses(all_exact=True) for scorer in problem.scorers()]
    ranks = np.full(len(problem.names), -1)
    for rank in range(len(ranks)):
        ranks[_best(losses, ranks < 0)] = rank
    return ranks


def _groups(problem: SubsetProblem, members: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Return the group labels (m,) of m members, for one group, two groups, and so on up to one group per member."""
    if len(members) == 1:
        return [np.zeros(1, dtype=np.intp)]
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    # On ties scipy merges the first pair; in reversed order, the first members by name stay separate longest.
    reversed_members = members[::-1]
    distances = 1 - problem.diversity.error_correlation[np.ix_(reversed_members, reversed_members)]
    tree = linkage(squareform(distances, checks=False), method="average")
    return [labels[::-1] for labels in cut_tree(tree).T[::-1]]


SEARCHES: dict[str, Callable[[SubsetProblem], list[Subset]]] = {
    "greedy_forward": greedy_forward,
    "greedy_backward": greedy_backward,
    "diversity_max": diversity_max,
    "clustering": clustering,
}
