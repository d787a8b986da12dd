"""Greedy ensemble selection with replacement, with optional bagging and several tries.

Caruana et al. (2004), "Ensemble selection from libraries of models" (ICML), and for bags Caruana, Munson and
Niculescu-Mizil (2006), "Getting the most out of ensemble selection" (ICDM). A pool is the mean of its members'
probabilities, each counted as often as it was selected. The first of candidates with equal losses
(`candidate_losses.TIE_TOLERANCE`) is selected, so pass members sorted by name. `utils.numeric.candidate_losses`
documents the metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.core.errors import UserError
from utils.numeric.candidate_losses import TIE_TOLERANCE, Floats, Scorer, make_scorer, weighted_sum

MemberIndices = tuple[int, ...]


@dataclass(frozen=True)
class SelectionPath:
    """The selection of one bag."""

    members: MemberIndices
    """Members in order of selection."""
    losses: tuple[float, ...]
    """Loss of the pool after each selection: log-loss, Brier score, 1 - accuracy or 1 - macro F1."""
    size: int
    """Length of the shortest prefix of `members` with the lowest loss, which is the pool."""


@dataclass(frozen=True)
class Selection:
    """Selected members and the path of each bag."""

    counts: Floats
    """(M,): how often each member is in the pools of all bags; integers if the start weights are."""
    paths: tuple[SelectionPath, ...]
    """One path per bag; a single path without bags."""

    @property
    def weights(self) -> Floats:
        """Weights (M,) of the members in the pool, which sum to 1."""
        return self.counts / self.counts.sum()

    def weights_by_size(self) -> Floats:
        """Return weights (S, M) of pools with the first 1, 2, ... S members of each bag, without start weights."""
        members = np.array([path.members for path in self.paths])
        counts = np.stack([(members == member).sum(axis=0) for member in range(len(self.counts))], axis=1)
        return counts.cumsum(axis=0) / (len(members) * np.arange(1, members.shape[1] + 1)[:, None])


def select_members(
    probabilities: NDArray[Any],
    labels: NDArray[Any],
    *,
    metric: str,
    steps: int = 25,
    sorted_start: bool = False,
    start: NDArray[Any] | None = None,
    bags: int = 0,
    bag_fraction: float = 0.5,
    tie_breaker: str | None = None,
    n_tries: int = 1,
    seed: int = 0,
) -> Selection:
    """Select members whose mean has the least loss on probabilities (M, N, C) and labels (N,).

    At most `steps` members are selected; the pool is the shortest prefix of them with the lowest loss. It starts empty;
    with `sorted_start`, from the prefix of the members sorted by loss whose pool has the least loss; with `start`, from
    the sum of members with these counts or weights (M,), which is not part of the path and may remain the result. Each
    of the `bags` selects from a `bag_fraction` of the members, drawn by the seed, and the result combines their pools.
    `tie_breaker` is a second metric for candidates with equal losses. With `n_tries` above 1, further tries draw among
    equal candidates by the seed, and the first path of least loss wins. Metrics are log_loss, brier, accuracy and
    f1_macro. Probabilities may be memory-mapped: except for (M, N) numbers for log-loss, memory does not grow with M.
    Raises UserError for invalid parameters, shapes and probabilities.
    """
    scorers = [make_scorer(probabilities, labels, name) for name in (metric, tie_breaker) if name]
    count = len(probabilities)
    start_weights = np.zeros(count) if start is None else np.asarray(start, dtype=np.float64)
    _check_start(start_weights, count)
    total = weighted_sum(probabilities, start_weights) if start_weights.any() else None
    return select_with_scorers(
        scorers,
        count,
        start_weights=start_weights,
        total=total,
        steps=steps,
        sorted_start=sorted_start,
        bags=bags,
        bag_fraction=bag_fraction,
        n_tries=n_tries,
        seed=seed,
    )


def select_with_scorers(
    scorers: list[Scorer],
    count: int,
    *,
    start_weights: Floats | None = None,
    total: Floats | None = None,
    steps: int = 25,
    sorted_start: bool = False,
    bags: int = 0,
    bag_fraction: float = 0.5,
    n_tries: int = 1,
    seed: int = 0,
) -> Selection:
    """Select from `count` members as `select_members` does, with existing scorers of the metric and the tie-breaker.

    `start_weights` (M,) are the weights of the start, and `total` (N, C) is the sum of members with these weights.
    """
    _check(steps=steps, bags=bags, bag_fraction=bag_fraction, n_tries=n_tries)
    start_weights = np.zeros(count) if start_weights is None else start_weights
    pools = _Pools(scorers, total, float(start_weights.sum()))
    single_losses = scorers[0].losses(all_exact=True) if sorted_start and total is None else None
    counts, paths = np.zeros(count), []
    for bag in range(max(1, bags)):
        allowed = np.ones(count, dtype=bool)
        if bags:
            left_out = np.random.default_rng([seed, bag]).permutation(count)[max(1, round(bag_fraction * count)) :]
            allowed[left_out] = False
        first: MemberIndices = ()
        if single_losses is not None:
            first = _best_together(pools, np.where(allowed, single_losses, np.inf), steps)
        path = _greedy_path(pools, allowed, steps, first, None)
        for index in range(1, n_tries):
            candidate = _greedy_path(pools, allowed, steps, first, np.random.default_rng([seed, bag, index]))
            if min(candidate.losses) < min(path.losses) - TIE_TOLERANCE:
                path = candidate
        paths.append(path)
        counts += start_weights + np.bincount(path.members[: path.size], minlength=count)
    return Selection(counts, tuple(paths))


def _check(*, steps: int, bags: int, bag_fraction: float, n_tries: int) -> None:
    if steps < 1 or bags < 0 or not 0 < bag_fraction <= 1 or n_tries < 1:
        raise UserError(
            f"selection: found steps {steps}, bags {bags}, bag_fraction {bag_fraction}, n_tries {n_tries}; expected "
            "at least 1 step, at least 0 bags, a fraction above 0, at most 1, and at least 1 try"
        )


def _check_start(start: Floats, count: int) -> None:
    if start.shape != (count,) or not np.isfinite(start).all() or start.min() < 0:
        raise UserError(f"start of the selection: found {start}; expected {count} finite numbers, none below 0")


class _Pools:
    """Losses of pools that extend the start by selected members; each pool is scored once."""

    def __init__(self, scorers: list[Scorer], total: Floats | None, size: float) -> None:
        self.scorers, self.total, self.size = scorers, total, size
        self._current: list[MemberIndices | None] = [None] * len(scorers)
        self._losses: dict[MemberIndices, Floats] = {}
        self._own_losses: dict[MemberIndices, float] = {}

    def scorer(self, members: MemberIndices, index: int = 0) -> Scorer:
        """Return the scorer at `index` with the pool of the start and these members."""
        scorer, current = self.scorers[index], self._current[index]
        if current is None or members[: len(current)] != current:
            scorer.reset(self.total, self.size)
            current = ()
        for member in members[len(current) :]:
            scorer.add(member)
        self._current[index] = members
        return scorer

    def loss(self, members: MemberIndices) -> float:
        """Return the loss of the pool of the start and these members."""
        if members not in self._own_losses:
            self._own_losses[members] = self.scorer(members).loss()
        return self._own_losses[members]

    def losses(self, members: MemberIndices) -> Floats:
        """Return losses (M,) with each member added to the pool."""
        if members not in self._losses:
            self._losses[members] = self.scorer(members).losses()
        return self._losses[members]

    def best(self, members: MemberIndices, losses: Floats, random: np.random.Generator | None) -> int:
        """Return the candidate of least loss, then of least tie-breaker loss, then the first or a random one."""
        equal = np.flatnonzero(losses <= losses.min() + TIE_TOLERANCE)
        if len(equal) > 1 and len(self.scorers) > 1:
            second = self.scorer(members, 1).losses(all_exact=True)[equal]
            equal = equal[second <= second.min() + TIE_TOLERANCE]
        return int(equal[0] if random is None else random.choice(equal))


def _greedy_path(
    pools: _Pools, allowed: NDArray[np.bool_], steps: int, first: MemberIndices, random: np.random.Generator | None
) -> SelectionPath:
    """Select from the allowed members, bool (M,), beginning with the members in `first`."""
    members: MemberIndices = ()
    losses: list[float] = []
    lowest, size = pools.loss(()) if pools.size else np.inf, 0
    while len(members) < steps:
        if len(members) < len(first):
            members = first[: len(members) + 1]
            losses.append(pools.loss(members))
        else:
            candidate_losses = np.where(allowed, pools.losses(members), np.inf)
            best = pools.best(members, candidate_losses, random)
            members = (*members, best)
            losses.append(float(candidate_losses[best]))
        if losses[-1] < lowest - TIE_TOLERANCE:
            lowest, size = losses[-1], len(losses)
    return SelectionPath(members, tuple(losses), size)


def _best_together(pools: _Pools, single_losses: Floats, max_size: int) -> MemberIndices:
    """Return the prefix of the members sorted by finite single losses (M,) whose pool has the least loss."""
    remaining = single_losses.copy()
    members: MemberIndices = ()
    size, lowest = 0, np.inf
    for _ in range(min(max_size, np.isfinite(single_losses).sum())):
        members = (*members, int(np.flatnonzero(remaining <= remaining.min() + TIE_TOLERANCE)[0]))
        remaining[members[-1]] = np.inf
        loss = pools.loss(members)
        if loss < lowest - TIE_TOLERANCE:
            lowest, size = loss, len(members)
    return members[:size]
