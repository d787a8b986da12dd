"""Pruned ensembles: the unweighted mean of a subset of members, within limits on latency and size.

Kuncheva and Whitaker (2003) on diversity, Caruana et al. (2004) on greedy selection, Giacinto and Roli (2001) on
clusters of members with correlated errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from utils.combiners.pooled_members import PooledMembers
from utils.combiners.pooling import PIECEWISE_CONSTANT, calibrated
from utils.combiners.protocol import Combiner, MemberFacts, unsaved
from utils.combiners.subset_search import SEARCHES, CostLimit, Subset, SubsetProblem
from utils.core.config import Config
from utils.core.config_sections import CostBudget
from utils.core.display_text import first_names
from utils.numeric import temperature
from utils.numeric.candidate_losses import TIE_TOLERANCE, candidate_losses
from utils.numeric.means import is_within_one_standard_error
from utils.numeric.metrics import METRICS, SMALLEST_PROBABILITY, row_losses
from utils.numeric.pareto import pareto_front

SHOWN = 3  # most names in a reason
LABELS = {"f1_macro": "F1 macro", "accuracy": "accuracy", "log_loss": "log-loss", "brier": "Brier score"}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ScoredSubset:
    """A subset that the search visits, its scores and its cost."""

    subset: Subset
    divisor: float
    """Temperature of the mean."""
    crossfit: Floats
    """Cross-fitted log-probabilities (N, C); with one fold those of the subset itself."""
    losses: Floats
    """(N,): losses of the metric, from the cross-fitted probabilities"""
    score: float
    """The metric of the cross-fitted probabilities."""
    log_loss: float
    latency_ms: float | None
    """Of the members run one after the other; None if one was not measured."""
    size_mb: float | None

    @property
    def cost(self) -> tuple[float, float, int]:
        """Latency, size and number of members; an unknown cost counts as 0."""
        return self.latency_ms or 0.0, self.size_mb or 0.0, len(self.subset.members)


@dataclass(kw_only=True)
class Pruned(PooledMembers):
    """Unweighted mean of the members that a search of `subset_search` selects, with a temperature.

    The search returns subsets from small to large on the rows of the fit. Each is scored on every fold by the subset at
    the same position of the search without this fold. By these scores, `pick` selects one:

    - best: the best score; ties go to the lower log-loss, then to the smaller subset;
    - fastest: the least latency (ties: size, then number of members) among subsets whose score is within one paired
      standard error of the best;
    - knee: the largest score minus latency, both scaled to 0..1 (Satopaa et al. 2011), with numbers of members if no
      latency is known; the best if no subset lies above the line from the cheapest to the best.

    `fit` raises BudgetError if no member is within the budget.
    """

    settings: ClassVar[tuple[str, ...]] = (
        *("pruning.target_size", "pruning.pick", "pruning.cost_budget", "device"),
        *(f"runs.score_ensemble.{key}" for key in ("optimization_metric", "temperature", "fit_rows")),
    )
    search: ClassVar[str]

    members: MemberFacts | None = unsaved()
    target_size: int = unsaved(7)
    pick: str = unsaved("best")
    budget: CostBudget = unsaved(factory=CostBudget)
    points: tuple[ScoredSubset, ...] = unsaved(())
    """Subsets from small to large."""

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """Return an unfitted combiner with the settings of `pruning` and `runs.score_ensemble`."""
        shared, pruning = config.runs.score_ensemble, config.pruning
        return cls(
            members=members,
            metric=shared.optimization_metric,
            calibration=shared.temperature,
            target_size=pruning.target_size,
            pick=pruning.pick,
            budget=pruning.cost_budget,
        )

    @property
    def limits(self) -> tuple[CostLimit, ...]:
        """The budget, and the costs of the members."""
        assert self.members is not None, "a restored ensemble is not fitted again"
        section, unlimited = "pruning.cost_budget", float("inf")
        return (
            CostLimit(
                "ms", f"{section}.max_latency_ms", self.budget.max_latency_ms or unlimited, self.members.latency_ms
            ),
            CostLimit("MB", f"{section}.max_size_mb", self.budget.max_size_mb or unlimited, self.members.size_mb),
        )

    def _fit(self, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> None:
        """Fit on logits (M, N, C), labels (N,) and folds (N,).

        With one fold or one class nothing can be held out: subsets are scored on the rows that selected them.
        """
        testable = bool(np.ptp(folds)) and bool(np.ptp(labels))
        calibrate = testable and self.calibration != "off"
        self.member_temperatures = np.ones(len(logits))
        if calibrate and self.calibration == "per_member":
            self.member_temperatures = temperature.select_member_temperatures(logits, labels, folds)
        problem = self._problem(logits, labels)
        subsets = SEARCHES[self.search](problem)
        if testable:
            crossfit = _of_folds(problem, subsets, folds, self.search)
        else:
            crossfit = np.stack([problem.mean(subset.members) for subset in subsets])
        # A temperature changes no predicted class: if the metric reads only these, only the picked subset gets one.
        early = calibrate and self.metric not in PIECEWISE_CONSTANT
        log_probabilities = np.log(crossfit.clip(SMALLEST_PROBABILITY))
        self.points = self._points(subsets, log_probabilities, labels, folds, calibrate=early)
        picked = self.points[PICKS[self.pick](self.points)]
        if calibrate and not early:
            [picked] = self._points([picked.subset], picked.crossfit[None], labels, folds, calibrate=True)
        self.weights = np.bincount(picked.subset.members, minlength=len(logits)) / len(picked.subset.members)
        self.temperature = picked.divisor
        notes = (
            [] if testable else ["one fold or one class only: scores are those of the rows that chose, no temperature"]
        )
        compared = self._compared(np.exp(picked.crossfit) if testable else None, logits, labels, notes)
        self.facts = self._found(problem) | compared

    def _problem(self, logits: np.ndarray, labels: np.ndarray) -> SubsetProblem:
        assert self.members is not None, "a restored ensemble is not fitted again"
        probabilities = np.exp(self._scores(logits)).astype(np.float32)
        return SubsetProblem(self.members.names, probabilities, labels, self.metric, self.target_size, self.limits)

    def _points(
        self,
        subsets: Sequence[Subset],
        log_probabilities: Floats,
        labels: np.ndarray,
        folds: np.ndarray,
        *,
        calibrate: bool,
    ) -> tuple[ScoredSubset, ...]:
        """Score K subsets by cross-fitted log-probabilities (K, N, C), at temperatures with `calibrate`."""
        scored = calibrated(log_probabilities, labels, folds, calibrate=calibrate)
        return tuple(self._point(subset, *each, labels) for subset, each in zip(subsets, scored, strict=True))

    def _point(self, subset: Subset, divisor: float, crossfit: Floats, labels: np.ndarray) -> ScoredSubset:
        probabilities = np.exp(crossfit)
        return ScoredSubset(
            subset,
            divisor,
            crossfit,
            row_losses(probabilities, labels, self.metric),
            METRICS[self.metric].function(probabilities, labels),
            METRICS["log_loss"].function(probabilities, labels),
            *(limit.known_total(subset.members) for limit in self.limits),
        )

    def _found(self, problem: SubsetProblem) -> dict[str, Any]:
        """Return facts about the search, for `ensemble.json`."""
        names, front = problem.names, _front(self.points)
        picked_index, best = PICKS[self.pick](self.points), PICKS["best"](self.points)
        picked = self.points[picked_index]
        reasons = _reasons(problem, picked, self.points[best], self.pick)
        return {
            "pick": self.pick,
            "target_size": self.target_size,
            "cost_budget": self.budget.model_dump(),
            "latency_ms": picked.latency_ms,
            "size_mb": picked.size_mb,
            "path": [names[member] for member in picked.subset.members],
            "dropped": {names[member]: reason for member, reason in reasons.items()},
            "diversity": problem.diversity.mean_among(picked.subset.members),
            "subsets": [
                {
                    "members": [names[member] for member in point.subset.members],
                    self.metric: point.score,
                    "log_loss": point.log_loss,
                    "latency_ms": point.latency_ms,
                    "size_mb": point.size_mb,
                    "on_pareto_front": index in front,
                    "picked": index == picked_index,
                }
                for index, point in enumerate(self.points)
            ],
        }


def _of_folds(problem: SubsetProblem, subsets: Sequence[Subset], folds: np.ndarray, search: str) -> NDArray[np.float32]:
    """Return probabilities (K, N, C) of each row by the K subsets of the search without its fold.

    If a search returns fewer subsets, its last one is repeated.
    """
    probabilities = np.empty((len(subsets), *problem.probabilities.shape[1:]), dtype=np.float32)
    for number in np.unique(folds):
        inside = folds == number
        others = SEARCHES[search](problem.of_rows(~inside))
        held_out = problem.of_rows(inside)
        means = [held_out.mean(subset.members) for subset in others[: len(subsets)]]
        for index in range(len(subsets)):
            probabilities[index, inside] = means[min(index, len(means) - 1)]
    return probabilities


def _front(points: Sequence[ScoredSubset]) -> list[int]:
    """Return the indices of the points on the Pareto front of score, latency and size."""
    costs = [[point.losses.mean(), *point.cost[:2]] for point in points]
    return np.flatnonzero(pareto_front(costs, tolerance=TIE_TOLERANCE)).tolist()


def _best(points: Sequence[ScoredSubset]) -> int:
    lowest = min(point.losses.mean() for point in points)
    near = [index for index, point in enumerate(points) if point.losses.mean() <= lowest + TIE_TOLERANCE]
    least = min(points[index].log_loss for index in near)
    return next(index for index in near if points[index].log_loss <= least + TIE_TOLERANCE)


def _fastest(points: Sequence[ScoredSubset]) -> int:
    best = _best(points)
    near = [
        index
        for index, point in enumerate(points)
        if index == best or is_within_one_standard_error(point.losses, points[best].losses)
    ]
    return min(near, key=lambda index: (points[index].cost, index))


def _knee(points: Sequence[ScoredSubset]) -> int:
    is_timed = any(point.latency_ms for point in points)
    costs = np.array([point.cost[0 if is_timed else 2] for point in points])
    losses = np.array([point.losses.mean() for point in points])
    if np.ptp(costs) == 0 or np.ptp(losses) <= TIE_TOLERANCE:
        return _best(points)
    above = (losses.max() - losses) / np.ptp(losses) - (costs - costs.min()) / np.ptp(costs)
    return int(np.argmax(above)) if above.max() > TIE_TOLERANCE else _best(points)


PICKS = {"best": _best, "knee": _knee, "fastest": _fastest}


def _reasons(problem: SubsetProblem, picked: ScoredSubset, best: ScoredSubset, pick: str) -> dict[int, str]:
    """Return {member: why it is dropped} for all other members; `best` is the subset of the best score."""
    members = picked.subset.members
    others = first_names([problem.names[member] for member in members], SHOWN)
    changes = _changes(problem, members)
    not_worth = f"not worth its cost (pick: {pick})"
    reasons = {}
    for member in sorted(set(range(len(problem.names))) - set(members)):
        gains, change = changes[member]
        if excess := _excess(problem, [member]):
            reasons[member] = f"over the budget: {excess}"
        elif member in best.subset.members:
            reasons[member] = f"{not_worth}: {_step(picked, best, problem.metric)}"
        elif member in picked.subset.reasons:
            reasons[member] = picked.subset.reasons[member]
        elif excess := _excess(problem, [*members, member]):
            reasons[member] = f"no room in the budget beside {others}: {excess}"
        elif not gains:
            reasons[member] = f"adds nothing beyond {others}: {change}"
        elif len(members) == problem.target_size:
            reasons[member] = f"beyond the target size of {problem.target_size}: {change}"
        elif pick == "best":
            reasons[member] = f"a gain on these rows, but larger subsets score no better: {change}"
        else:
            reasons[member] = f"{not_worth}: {change}"
    return reasons


def _step(picked: ScoredSubset, best: ScoredSubset, metric: str) -> str:
    more = len(best.subset.members) - len(picked.subset.members)
    words = f"{LABELS[metric]} {picked.score:.4f} -> {best.score:.4f} with {more} more"
    if picked.latency_ms is not None and best.latency_ms is not None:
        words += f", {picked.latency_ms:.4g} ms -> {best.latency_ms:.4g} ms"
    return words


def _excess(problem: SubsetProblem, members: Sequence[int]) -> str:
    """Return text about the limits that these members exceed together; "" if they exceed none."""
    totals = [(limit, limit.total(members)) for limit in problem.limits]
    return " and ".join(limit.excess(total) for limit, total in totals if not limit.allows(total))


def _changes(problem: SubsetProblem, picked: Sequence[int]) -> list[tuple[bool, str]]:
    """Return for each of the M members whether it improves the mean of the picked ones, and the metrics' change."""
    mean, weight = problem.mean(picked), 1 / (len(picked) + 1)
    gains = np.zeros(len(problem.names), dtype=int)  # sign of the change of the first metric that changes
    words: list[list[str]] = [[] for _ in problem.names]
    for metric in problem.metrics:
        measure = METRICS[metric]
        before = measure.function(mean, problem.labels)
        losses = candidate_losses(mean, problem.probabilities, problem.labels, weight=weight, metric=metric)
        afters = 1 - losses if measure.higher_is_better else losses
        change = afters - before if measure.higher_is_better else before - afters
        gains = np.where((gains == 0) & (np.abs(change) > TIE_TOLERANCE), np.sign(change).astype(int), gains)
        for parts, after in zip(words, afters, strict=True):
            parts.append(f"{LABELS[metric]} {before:.4f} -> {after:.4f}")
    return [(bool(gain > 0), ", ".join(parts)) for gain, parts in zip(gains, words, strict=True)]


@dataclass(kw_only=True)
class GreedyForward(Pruned):
    """Start empty and add the best member repeatedly."""

    search: ClassVar[str] = "greedy_forward"


@dataclass(kw_only=True)
class GreedyBackward(Pruned):
    """Start with all members and remove the least useful one repeatedly."""

    search: ClassVar[str] = "greedy_backward"


@dataclass(kw_only=True)
class DiversityMax(Pruned):
    """Start with the best member and add the one that disagrees most with the selected ones repeatedly."""

    search: ClassVar[str] = "diversity_max"


@dataclass(kw_only=True)
class Clustering(Pruned):
    """Select the best member of each group of members with correlated errors."""

    search: ClassVar[str] = "clustering"


COMBINERS: dict[str, type[Combiner]] = {
    f"pruned_{combiner.search}": combiner for combiner in (GreedyForward, GreedyBackward, DiversityMax, Clustering)
}
