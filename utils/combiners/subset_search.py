"""Searches for subsets of members whose plain mean is good, within limits on latency and size.

Members come sorted by name. Better means the metric; of equals (`candidates.TIE`) the lower log-loss, then the first.
Each search returns subsets from small to large, at most `target_size` members each and all of them within the limits.
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

ROUNDING = 1e-9  # of a limit, by which a sum of costs may exceed it
Floats = NDArray[np.float64]


class BudgetError(UserError):
    """The limits leave no member."""


@dataclass(frozen=True)
class CostLimit:
    """A limit on the cost of the selected members together."""

    unit: str
    config_key: str
    """Key in the configuration."""
    maximum: float
    """Infinity where there is no limit."""
    costs: Floats
    """(M,); NaN where unknown, which counts as nothing"""

    def total(self, members: Sequence[int]) -> float:
        """The sum over these members, as far as it is known."""
        return float(np.nansum(self.costs[list(members)]))

    def known_total(self, members: Sequence[int]) -> float | None:
        """The sum over these members; None where one of them is unknown."""
        total = float(self.costs[list(members)].sum())
        return None if np.isnan(total) else total

    def allows(self, spent: Floats | float) -> NDArray[np.bool_]:
        """Whether so much may be spent."""
        return np.asarray(spent <= self.maximum * (1 + ROUNDING))

    def excess(self, spent: float) -> str:
        """`130 ms > 100 ms`."""
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
        """The metric and, where it is another, the tie-breaker."""
        return tuple(dict.fromkeys((self.metric, "log_loss")))

    @cached_property
    def affordable(self) -> NDArray[np.bool_]:
        """Which members (M,) are within the limits by themselves. Raises BudgetError where none is."""
        mask = self.affordable_with(())
        if not mask.any():
            raise BudgetError(self._cheapest())
        return mask

    def affordable_with(self, members: Sequence[int]) -> NDArray[np.bool_]:
        """Which members (M,) can be added to these within the limits."""
        mask = np.ones(len(self.names), dtype=bool)
        for limit in self.limits:
            mask &= limit.allows(limit.total(members) + np.nan_to_num(limit.costs))
        mask[list(members)] = False
        return mask

    def within_limits(self, members: Sequence[int]) -> bool:
        """Whether the limits allow these together."""
        return all(limit.allows(limit.total(members)) for limit in self.limits)

    @cached_property
    def hits(self) -> NDArray[np.bool_]:
        """(M, N): the member is right."""
        hits: NDArray[np.bool_] = self.probabilities.argmax(axis=2) == self.labels
        return hits

    @cached_property
    def diversity(self) -> Diversity:
        """Of each pair of members."""
        return diversity.pairwise_diversity(self.hits)

    def scorers(self) -> list[Scorer]:
        """Of the metric and of the tie-breaker."""
        return [make_scorer(self.probabilities, self.labels, metric) for metric in self.metrics]

    def mean(self, members: Sequence[int]) -> Floats:
        """Plain mean (N, C) of members' probabilities."""
        weights = np.bincount(members, minlength=len(self.names))
        return weighted_sum(self.probabilities, weights) / len(members)

    def of_rows(self, rows: NDArray[np.bool_]) -> SubsetProblem:
        """The same on some of the rows."""
        return SubsetProblem(
            self.names, self.probabilities[:, rows], self.labels[rows], self.metric, self.target_size, self.limits
        )

    def _cheapest(self) -> str:
        """Words for limits that no member is within: the one that exceeds them by the smallest factor."""
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
    """In the order in which they were taken."""
    reasons: dict[int, str] = field(default_factory=dict)
    """{member: why it was not taken}, as far as the search tells."""


def greedy_forward(problem: SubsetProblem) -> list[Subset]:
    """Start empty, add the best, again and again."""
    scorers = problem.scorers()
    chosen: list[int] = []
    subsets: list[Subset] = []
    allowed = problem.affordable
    while allowed.any() and len(chosen) < problem.target_size:
        chosen.append(_best([each.losses(all_exact=True) for each in scorers], allowed))
        for each in scorers:
            each.add(chosen[-1])
        subsets.append(Subset(tuple(chosen)))
        allowed = problem.affordable_with(chosen)
    return subsets


def greedy_backward(problem: SubsetProblem) -> list[Subset]:
    """Start with all that are within the limits by themselves, leave out the one that is missed least, and again.

    Of equals the last by name is left out.
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
        worst = _best([each.losses() for each in removers], inside, last=True)
        for each in removers:
            each.remove(worst)
        inside[worst] = False


def diversity_max(problem: SubsetProblem) -> list[Subset]:
    """Start with the best, add the one whose mean disagreement with those taken is the largest.

    Two members disagree on a row that exactly one of them gets right. Disagreement alone would take the worst members:
    none is taken whose accuracy is not at least half-way from guessing the most frequent class to the best member, and
    none with which the mean is right on fewer rows by more than one paired standard error. Where none is left, the
    subsets end. Of members that disagree equally the better comes first.
    """
    scorers = problem.scorers()
    accuracy = problem.hits.mean(axis=1)
    chosen = [_best([each.losses(all_exact=True) for each in scorers], problem.affordable)]
    guessing = np.bincount(problem.labels).max() / len(problem.labels)
    least = min(accuracy[chosen[0]], (accuracy[chosen[0]] + guessing) / 2)
    reasons = {
        int(member): f"hopeless: accuracy {accuracy[member]:.4f}, half-way from guessing to the best is {least:.4f}"
        for member in np.flatnonzero(accuracy < least)
    }
    subsets = [Subset(tuple(chosen), reasons)]
    total = problem.mean(chosen)
    while len(chosen) < problem.target_size:
        for each in scorers:
            each.add(chosen[-1])
        allowed = problem.affordable_with(chosen) & (accuracy >= least)
        order = [-problem.diversity.disagreement[:, chosen].mean(axis=1)]
        order += [each.losses(all_exact=True) for each in scorers]
        before = row_losses(total / len(chosen), problem.labels, "accuracy")
        while allowed.any():
            member = _best(order, allowed)
            allowed[member] = False
            after = (total + problem.probabilities[member]) / (len(chosen) + 1)
            if is_within_one_standard_error(row_losses(after, problem.labels, "accuracy"), before):
                break
        else:
            return subsets
        chosen.append(member)
        total += problem.probabilities[member]
        subsets.append(Subset(tuple(chosen), reasons))
    return subsets


def clustering(problem: SubsetProblem) -> list[Subset]:
    """Group members that err on the same rows, keep the best of each group.

    Hierarchical clustering, average linkage on 1 - error correlation. Groups come in the order of their best members;
    where the best of a group exceeds the limits, its next best is taken, and none where none is within them.
    """
    members = np.flatnonzero(problem.affordable)
    ranks = _ranks(problem)
    subsets = []
    for labels in _groups(problem, members)[: problem.target_size]:
        groups = [members[labels == label] for label in np.unique(labels)]
        groups = [group[np.argsort(ranks[group])] for group in groups]
        chosen: list[int] = []
        reasons: dict[int, str] = {}
        for group in sorted(groups, key=lambda group: ranks[group[0]]):
            fitting = group[problem.affordable_with(chosen)[group]]
            if len(fitting):
                chosen.append(int(fitting[0]))
                reasons |= {
                    int(member): f"represented by {problem.names[chosen[-1]]} (error correlation "
                    f"{problem.diversity.error_correlation[member, chosen[-1]]:.2f})"
                    for member in fitting
                }
        subsets.append(Subset(tuple(chosen), reasons))
    return subsets


def _best(losses: Sequence[Floats], allowed: NDArray[np.bool_], *, last: bool = False) -> int:
    """The first, or last, of the allowed members (M,) with the least loss; of equals that of the next losses."""
    best = np.flatnonzero(allowed)
    for values in losses:
        best = best[values[best] <= values[best].min() + TIE_TOLERANCE]
    return int(best[-1 if last else 0])


def _ranks(problem: SubsetProblem) -> NDArray[np.intp]:
    """Place (M,) of each member when they are sorted from the best to the worst."""
    losses = [each.losses(all_exact=True) for each in problem.scorers()]
    ranks = np.full(len(problem.names), -1)
    for rank in range(len(ranks)):
        ranks[_best(losses, ranks < 0)] = rank
    return ranks


def _groups(problem: SubsetProblem, members: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Labels of the members' groups, for one group, for two, and so on to one for each member."""
    if len(members) == 1:
        return [np.zeros(1, dtype=np.intp)]
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    # Of equal distances scipy joins the first; turned round, the first by name stay groups of their own longest.
    turned = members[::-1]
    distances = 1 - problem.diversity.error_correlation[np.ix_(turned, turned)]
    tree = linkage(squareform(distances, checks=False), method="average")
    return [labels[::-1] for labels in cut_tree(tree).T[::-1]]


SEARCHES: dict[str, Callable[[SubsetProblem], list[Subset]]] = {
    "greedy_forward": greedy_forward,
    "greedy_backward": greedy_backward,
    "diversity_max": diversity_max,
    "clustering": clustering,
}
