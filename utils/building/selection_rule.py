"""Selection of the lowest loss among candidates: its cross-validated score, and the cheapest near-best candidate."""

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
    """Cross-fitting folds and groups of rows; a row without a listed group is independent of all others."""

    fold_of: Mapping[Key, int]
    group_of: Mapping[Key, int]
    """Empty if all rows are independent"""

    def groups_of(self, keys: Sequence[Key]) -> np.ndarray | None:
        """Return the group index (N,) of each row; None if all rows are independent."""
        if not self.group_of:
            return None
        first_new = max(self.group_of.values()) + 1
        return np.array([self.group_of.get(key, first_new + row) for row, key in enumerate(keys)])

    def folds_of(self, keys: Sequence[Key]) -> np.ndarray:
        """Return the fold (N,) of each row.

        If a row has no fold, or all rows are in one fold, groups are assigned to `FOLDS` folds in turn.
        """
        folds = [self.fold_of.get(key) for key in keys]
        if None not in folds and len(set(folds)) > 1:
            return np.array(folds)
        groups = self.groups_of(keys)
        units = np.arange(len(keys)) if groups is None else np.unique(groups, return_inverse=True)[1]
        return np.asarray(units % FOLDS)


def after_selection(losses: np.ndarray, hits: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return cross-validated losses (N,) and hits (N,) of selecting the candidate with the lowest mean loss.

    On each fold they are those of the best candidate on the other folds. `losses` and `hits` (K, N) are those of the
    candidates, `folds` (N,) those of the rows. With a single fold they are those of the best candidate.
    """
    selected = np.empty(len(folds), dtype=np.int64)
    for fold in np.unique(folds):
        inside = folds == fold
        others = ~inside if not inside.all() else inside
        selected[inside] = losses[:, others].mean(axis=1).argmin()
    rows = np.arange(len(folds))
    return losses[selected, rows], hits[selected, rows]


def selection_widening(losses: np.ndarray, folds: np.ndarray, groups: np.ndarray | None) -> float:
    """Return the factor, at least 1, by which selection widens the interval of the score of `after_selection`.

    The selections of the folds share rows, so that near-equal candidates raise the variance of the mean above that of
    independent rows. The factor is estimated by repeating the selection on bootstrap samples of rows or groups (N,) for
    losses (K, N) and folds (N,); half of the excess variance counts, since differences of candidates vary twice as much
    in a resampled sample.
    """
    units = unit_indices(len(folds), groups)
    selected, _ = after_selection(losses, np.zeros(losses.shape, dtype=bool), folds)
    plain = standard_error(selected, groups)
    if plain <= 0 or len(np.unique(folds)) < 2:
        return 1.0
    n_units = int(units.max()) + 1
    random = np.random.default_rng(0)
    sums, counts = [], []
    draws = random.multinomial(n_units, np.full(n_units, 1 / n_units), REPLICATES)
    for fold in np.unique(folds):
        inside = folds == fold
        weights = draws[:, units[inside]].astype(np.float64)
        sums.append(weights @ losses[:, inside].T)
        counts.append(weights.sum(axis=1))
    fold_sums, rows = np.stack(sums, axis=1), np.stack(counts, axis=1)
    lowest = (fold_sums.sum(axis=1, keepdims=True) - fold_sums).argmin(axis=2)
    scores = np.take_along_axis(fold_sums, lowest[:, :, None], axis=2).sum(axis=(1, 2)) / rows.sum(axis=1)
    return float(np.sqrt(1 + max(0.0, (scores.std() / plain) ** 2 - 1) / 2))


def nearest_by_cost(
    losses: np.ndarray, lowest: int, costs: Sequence[float | None], groups: np.ndarray | None
) -> int | None:
    """Return the index of the cheapest candidate within one paired standard error of the one at index `lowest`.

    Takes losses (K, N). Candidates without a cost are left out. Ties go to the lowest loss. None if no candidate within
    one standard error has a cost.
    """
    near = [
        (cost, float(losses[index].mean()), index)
        for index, cost in enumerate(costs)
        if cost is not None and is_within_one_standard_error(losses[index], losses[lowest], groups)
    ]
    return min(near)[2] if near else None
