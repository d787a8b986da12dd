"""Greedy selection with replacement: again and again the member whose addition helps the pool most; numpy alone.

Caruana et al. 2004, "Ensemble selection from libraries of models" (ICML), and Caruana, Munson and Niculescu-Mizil 2006,
"Getting the most out of ensemble selection" (ICDM) for bags. A pool is the mean of its members' probabilities, each
counted as often as it was taken. Of candidates whose losses are equal (`candidates.TIE`) the first wins, so members
come sorted by name. What the metrics are and why scoring is fast stands in `utils.numeric.candidate_losses`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.core.errors import UserError
from utils.numeric.candidate_losses import TIE_TOLERANCE, Floats, Scorer, make_scorer, weighted_sum

Members = tuple[int, ...]


@dataclass(frozen=True)
class SelectionPath:
    """How one bag was chosen."""

    members: Members
    """Members in the order in which they were taken."""
    losses: tuple[float, ...]
    """Loss of the pool after each, the lower the better: log-loss, Brier score, 1 - accuracy or 1 - macro F1."""
    kept: int
    """How many of them from the front make the pool: as few as have the lowest loss."""


@dataclass(frozen=True)
class Selection:
    """The members chosen and how."""

    counts: Floats
    """(M,): how often each member is in the pool, all bags together; whole numbers unless the start was not."""
    paths: tuple[SelectionPath, ...]
    """One per bag; one in all without bags."""

    @property
    def weights(self) -> Floats:
        """Shares (M,) of the members in the pool, sum 1."""
        return self.counts / self.counts.sum()

    def weights_by_size(self) -> Floats:
        """Shares (S, M) when each bag keeps its first 1, 2, ... S members and there was no start."""
        taken = np.array([path.members for path in self.paths])
        counts = np.stack([(taken == member).sum(axis=0) for member in range(len(self.counts))], axis=1)
        return counts.cumsum(axis=0) / (len(taken) * np.arange(1, taken.shape[1] + 1)[:, None])


def select_members(
    probabilities: NDArray[Any],
    labels: NDArray[Any],
    *,
    metric: str,
    steps: int = 25,
    sorted_start: bool = False,
    start: NDArray[Any] | None = None,
    bags: int = 0,
    bag_share: float = 0.5,
    tie_breaker: str | None = None,
    tries: int = 1,
    seed: int = 0,
) -> Selection:
    """Choose members for the least loss of their mean on probabilities (M, N, C) and labels (N,).

    At most `steps` are taken, and as few of them kept as have the lowest loss. The pool is empty at first; with
    `sorted_start` it is the best members, as many as have the least loss together; with `start` it is that sum of
    members, counts or weights (M,), which the path does not list and which may stay as it is. `bags` pools are chosen
    from a share of the members each, drawn by the seed, and put together. `tie_breaker` is a second metric for
    candidates that the first finds equal; with more `tries`, the later ones draw among equals by the seed, and the
    first path of least loss is taken. Metrics are log_loss, brier, accuracy and f1_macro. Probabilities may be
    memory-mapped: beside (M, N) numbers for log-loss, memory does not grow with M. UserError for what cannot be scored.
    """
    scorers = [make_scorer(probabilities, labels, name) for name in (metric, tie_breaker) if name]
    count = len(probabilities)
    begun = np.zeros(count) if start is None else np.asarray(start, dtype=np.float64)
    _check_start(begun, count)
    total = weighted_sum(probabilities, begun) if begun.any() else None
    return select_with_scorers(
        scorers,
        count,
        begun=begun,
        total=total,
        steps=steps,
        sorted_start=sorted_start,
        bags=bags,
        bag_share=bag_share,
        tries=tries,
        seed=seed,
    )


def select_with_scorers(
    scorers: list[Scorer],
    count: int,
    *,
    begun: Floats | None = None,
    total: Floats | None = None,
    steps: int = 25,
    sorted_start: bool = False,
    bags: int = 0,
    bag_share: float = 0.5,
    tries: int = 1,
    seed: int = 0,
) -> Selection:
    """As `select` of `count` members, by scorers that are made already: of the metric, and perhaps of the tie-breaker.

    `begun` are counts or weights (M,) of the start and `total` (N, C) is their sum of members.
    """
    _check(steps=steps, bags=bags, bag_share=bag_share, tries=tries)
    begun = np.zeros(count) if begun is None else begun
    pools = _Pools(scorers, total, float(begun.sum()))
    alone = scorers[0].losses(all_exact=True) if sorted_start and total is None else None
    counts, paths = np.zeros(count), []
    for bag in range(max(1, bags)):
        allowed = np.ones(count, dtype=bool)
        if bags:
            drawn = np.random.default_rng([seed, bag]).permutation(count)[max(1, round(bag_share * count)) :]
            allowed[drawn] = False
        first = () if alone is None else _best_together(pools, np.where(allowed, alone, np.inf), steps)
        path = _walk(pools, allowed, steps, first, None)
        for number in range(1, tries):
            other = _walk(pools, allowed, steps, first, np.random.default_rng([seed, bag, number]))
            if min(other.losses) < min(path.losses) - TIE_TOLERANCE:
                path = other
        paths.append(path)
        counts += begun + np.bincount(path.members[: path.kept], minlength=count)
    return Selection(counts, tuple(paths))


def _check(*, steps: int, bags: int, bag_share: float, tries: int) -> None:
    if steps < 1 or bags < 0 or not 0 < bag_share <= 1 or tries < 1:
        raise UserError(
            f"selection: found steps {steps}, bags {bags}, bag_share {bag_share}, tries {tries}; expected at least 1 "
            "step, at least 0 bags, a share above 0, at most 1, and at least 1 try"
        )


def _check_start(start: Floats, count: int) -> None:
    if start.shape != (count,) or not np.isfinite(start).all() or start.min() < 0:
        raise UserError(f"start of the selection: expected {count} finite numbers, none below 0; found {start}")


class _Pools:
    """Losses of the pools that a start and the members taken since make; each pool is scored once."""

    def __init__(self, scorers: list[Scorer], total: Floats | None, size: float) -> None:
        self.scorers, self.total, self.size = scorers, total, size
        self._stand: list[Members | None] = [None] * len(scorers)
        self._known: dict[Members, Floats] = {}

    def at(self, members: Members, which: int = 0) -> Scorer:
        """A scorer, standing at the pool."""
        found, stands = self.scorers[which], self._stand[which]
        if stands is None or members[: len(stands)] != stands:
            found.begin(self.total, self.size)
            stands = ()
        for member in members[len(stands) :]:
            found.add(member)
        self._stand[which] = members
        return found

    def losses(self, members: Members) -> Floats:
        """Losses (M,) with each member added."""
        if members not in self._known:
            self._known[members] = self.at(members).losses()
        return self._known[members]

    def best(self, members: Members, losses: Floats, random: np.random.Generator | None) -> int:
        """The candidate of least loss; of equals that of the tie-breaker, and of those the first, or one drawn."""
        equal = np.flatnonzero(losses <= losses.min() + TIE_TOLERANCE)
        if len(equal) > 1 and len(self.scorers) > 1:
            second = self.at(members, 1).losses(all_exact=True)[equal]
            equal = equal[second <= second.min() + TIE_TOLERANCE]
        return int(equal[0] if random is None else random.choice(equal))


def _walk(
    pools: _Pools, allowed: NDArray[np.bool_], steps: int, first: Members, random: np.random.Generator | None
) -> SelectionPath:
    """What is taken of the allowed members (M,) from the start; the first of them are known."""
    members: Members = ()
    losses: list[float] = []
    lowest, kept = pools.at(()).loss() if pools.size else np.inf, 0
    while len(members) < steps:
        if len(members) < len(first):
            members = first[: len(members) + 1]
            losses.append(pools.at(members).loss())
        else:
            found = np.where(allowed, pools.losses(members), np.inf)
            best = pools.best(members, found, random)
            members = (*members, best)
            losses.append(float(found[best]))
        if losses[-1] < lowest - TIE_TOLERANCE:
            lowest, kept = losses[-1], len(losses)
    return SelectionPath(members, tuple(losses), kept)


def _best_together(pools: _Pools, alone: Floats, most: int) -> Members:
    """The members of least loss alone (M,), as many as have the least loss together; those of infinite loss are out."""
    left = alone.copy()
    members: Members = ()
    kept, lowest = 0, np.inf
    for _ in range(min(most, np.isfinite(alone).sum())):
        members = (*members, int(np.flatnonzero(left <= left.min() + TIE_TOLERANCE)[0]))
        left[members[-1]] = np.inf
        loss = pools.at(members).loss()
        if loss < lowest - TIE_TOLERANCE:
            lowest, kept = loss, len(members)
    return members[:kept]
