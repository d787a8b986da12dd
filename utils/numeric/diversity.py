"""Diversity of ensemble members: four measures for each pair of members and one for each row.

Kuncheva and Whitaker (2003), "Measures of diversity in classifier ensembles and their relationship with the ensemble
accuracy", Machine Learning 51, compare the pairwise measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from utils.numeric.metrics import SMALLEST_PROBABILITY

BLOCK_ROWS = 2**16  # at a time; counts up to this are exact in float32
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Diversity:
    """Pairwise measures of M members, symmetric float64 (M, M)."""

    disagreement: Floats
    """Fraction of the rows that exactly one of the two members classifies correctly (Skalak 1996)."""
    double_fault: Floats
    """Fraction of the rows that both misclassify (Giacinto and Roli 2001)."""
    q_statistic: Floats
    """Yule's Q (1900): 1 if both are correct on the same rows, 0 if independent, -1 if on opposite rows."""
    error_correlation: Floats
    """Pearson's correlation of the two members' errors, which are 1 on misclassified rows and 0 on others."""

    def mean_among(self, members: Sequence[int]) -> dict[str, float] | None:
        """Return {measure: its mean over the pairs of these members}; None for fewer than two members."""
        first, second = np.triu_indices(len(members), k=1)
        if not len(first):
            return None
        indices = np.asarray(members)
        pairs = indices[first], indices[second]
        return {field.name: float(getattr(self, field.name)[pairs].mean()) for field in fields(self)}


def pairwise_diversity(hits: NDArray[np.bool_]) -> Diversity:
    """Return the pairwise measures of M members whose correct rows are `hits` (M, N).

    If the denominator of Q or of the correlation is 0, as for a member that is correct on all rows, the value is 1 for
    members that are correct on the same rows and 0 for others.
    """
    members, rows = hits.shape
    both = np.zeros((members, members))
    for start in range(0, rows, BLOCK_ROWS):
        block = hits[:, start : start + BLOCK_ROWS].astype(np.float32)
        both += block @ block.T
    correct = np.diag(both)
    only_first = correct[:, None] - both
    only_second = only_first.T
    neither = rows - both - only_first - only_second
    agreeing, opposing = both * neither, only_first * only_second
    is_equal = only_first + only_second == 0
    spread = np.sqrt(correct * (rows - correct))
    return Diversity(
        disagreement=(only_first + only_second) / rows,
        double_fault=neither / rows,
        q_statistic=_ratio(agreeing - opposing, agreeing + opposing, is_equal),
        error_correlation=_ratio(agreeing - opposing, spread[:, None] * spread, is_equal),
    )


def mutual_information(parts: Iterable[NDArray[np.floating]]) -> Floats:
    """Return the mutual information (N,) of a row's class and the member that predicts it, in nats.

    `parts` are the probabilities (N, C) of at least one member. The value is the entropy of the members' mean minus the
    mean of their entropies: 0 if all agree, at most log(M) (Houlsby et al. 2011, "Bayesian active learning for
    classification and preference learning").
    """
    total: Floats | float = 0.0
    entropies: Floats | float = 0.0
    count = 0
    for part in parts:
        probabilities = np.asarray(part, dtype=np.float64)
        total, entropies, count = total + probabilities, entropies + _entropy(probabilities), count + 1
    information: Floats = np.maximum(_entropy(np.asarray(total) / count) - np.asarray(entropies) / count, 0.0)
    return information


def _entropy(probabilities: NDArray[np.floating]) -> Floats:
    entropy: Floats = -(probabilities * np.log(np.clip(probabilities, SMALLEST_PROBABILITY, 1))).sum(axis=1)
    return entropy


def _ratio(part: Floats, whole: Floats, is_equal: NDArray[np.bool_]) -> Floats:
    ratio = np.where(is_equal, 1.0, 0.0)
    np.divide(part, whole, out=ratio, where=(whole > 0) & ~is_equal)
    return ratio
