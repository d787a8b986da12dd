"""Selection of the lowest loss among candidates: its unseen score, and the cheapest candidate near the lowest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from utils.numeric.means import is_within_one_standard_error, standard_error, unit_indices

FOLDS = 5
REPLICATES = 300
"""Bootstrap samples of the selection."""
Key = tuple[str, str]
"""(split, sample id)"""


@dataclass(frozen=True)
class RowUnits:
    """Cross-fitting folds and groups of rows; what is not listed is a group of its own."""

    fold_of: Mapping[Key, int]
    group_of: Mapping[Key, int]
    """Empty where rows are independent"""

    def groups_of(self, keys: Sequence[Key]) -> np.ndarray | None:
        """Group index (N,); None where all rows are independent."""
        if not self.group_of:
            return None
        alone = max(self.group_of.values()) + 1
        return np.array([self.group_of.get(key, alone + row) for row, key in enumerate(keys)])

    def folds_of(self, keys: Sequence[Key]) -> np.ndarray:
        """Fold (N,) of each row; where not all are in two folds at least, groups in their order, dealt out in turn."""
        folds = np.array([self.fold_of.get(key, -1) for key in keys])
        if folds.min() >= 0 and len(np.unique(folds)) > 1:
            return folds
        groups = self.groups_of(keys)
        units = np.arange(len(keys)) if groups is None else np.unique(groups, return_inverse=True)[1]
        return np.asarray(units % FOLDS)


def after_selection(losses: np.ndarray, hits: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses (N,) and hits (N,) of selecting the lowest mean: in each fold those of the lowest on the other folds.

    `losses` and `hits` (K, N) are the candidates', `folds` (N,) the rows'. With one fold these are the scores of the
    lowest itself.
    """
    chosen = np.empty(len(folds), dtype=np.int64)
    for fold in np.unique(folds):
        inside = folds == fold
        others = ~inside if not inside.all() else inside
        chosen[inside] = losses[:, others].mean(axis=1).argmin()
    rows = np.arange(len(folds))
    return losses[chosen, rows], hits[chosen, rows]


def selection_widening(losses: np.ndarray, folds: np.ndarray, groups: np.ndarray | None) -> float:
    """By how much selection widens the interval of the score of `after_selection`, at least 1.

    Folds select by rows that they share, so that near-equal candidates raise the variance of the mean above that of
    independent rows. It is measured by repeating the selection on bootstrap samples of rows or groups (N,); half of the
    excess counts, since differences of candidates vary twice as much in a sample of a sample.
    """
    units = unit_indices(len(folds), groups)
    chosen, _ = after_selection(losses, np.zeros(losses.shape, dtype=bool), folds)
    plain = standard_error(chosen, groups)
    if plain <= 0 or len(np.unique(folds)) < 2:
        return 1.0
    n_units = int(units.max()) + 1
    random = np.random.default_rng(0)
    sums, counts = [], []
    drawn = random.multinomial(n_units, np.full(n_units, 1 / n_units), REPLICATES)
    for fold in np.unique(folds):
        inside = folds == fold
        weights = drawn[:, units[inside]].astype(np.float64)
        sums.append(weights @ losses[:, inside].T)
        counts.append(weights.sum(axis=1))
    of_fold, rows = np.stack(sums, axis=1), np.stack(counts, axis=1)
    lowest = (of_fold.sum(axis=1, keepdims=True) - of_fold).argmin(axis=2)
    scores = np.take_along_axis(of_fold, lowest[:, :, None], axis=2).sum(axis=(1, 2)) / rows.sum(axis=1)
    return float(np.sqrt(1 + max(0.0, (scores.std() / plain) ** 2 - 1) / 2))


def nearest_by_cost(
    losses: np.ndarray, lowest: int, costs: Sequence[float | None], groups: np.ndarray | None
) -> int | None:
    """Index of the cheapest candidate within one paired standard error of the one at `lowest`, of losses (K, N).

    Candidates without a cost are left out. None where no such candidate has one. Of equal costs the lowest loss wins.
    """
    near = [
        (cost, float(losses[index].mean()), index)
        for index, cost in enumerate(costs)
        if cost is not None and is_within_one_standard_error(losses[index], losses[lowest], groups)
    ]
    return min(near)[2] if near else None
