"""How differently members err, by pairs and by rows: four measures of each pair, and one of each row.

Kuncheva and Whitaker (2003), "Measures of diversity in classifier ensembles and their relationship with the ensemble
accuracy", Machine Learning 51, compares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from utils.numeric.metrics import SMALLEST_PROBABILITY

BLOCK_ROWS = 2**16  # at a time; sums of so many are exact in float32
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Diversity:
    """Of each pair of M members, symmetric (M, M) float64."""

    disagreement: Floats
    """Share of the rows that exactly one of the two gets right (Skalak 1996)."""
    double_fault: Floats
    """Share of the rows that both get wrong (Giacinto and Roli 2001)."""
    q_statistic: Floats
    """Yule's Q (1900): 1 where they are right on the same rows, 0 where independent, -1 where on opposite ones."""
    error_correlation: Floats
    """Pearson's correlation of the two, each being 1 on rows that it gets wrong and 0 on others."""

    def mean_among(self, members: Sequence[int]) -> dict[str, float] | None:
        """{measure: its mean over the pairs of these members}; None for fewer than two."""
        first, second = np.triu_indices(len(members), k=1)
        if not len(first):
            return None
        chosen = np.asarray(members)
        pairs = chosen[first], chosen[second]
        return {field.name: float(getattr(self, field.name)[pairs].mean()) for field in fields(self)}


def pairwise_diversity(hits: NDArray[np.bool_]) -> Diversity:
    """Diversity of members that get rows right as `hits` (M, N) says.

    Where Q or the correlation has nothing to divide by, as for a member that is right on all rows, it is 1 for members
    that are right on the same rows and 0 for others.
    """
    members, rows = hits.shape
    both = np.zeros((members, members))
    for start in range(0, rows, BLOCK_ROWS):
        block = hits[:, start : start + BLOCK_ROWS].astype(np.float32)
        both += block @ block.T
    right = np.diag(both)
    only_first = right[:, None] - both
    only_second = only_first.T
    neither = rows - both - only_first - only_second
    agreeing, opposing = both * neither, only_first * only_second
    equal = only_first + only_second == 0
    spread = np.sqrt(right * (rows - right))
    return Diversity(
        disagreement=(only_first + only_second) / rows,
        double_fault=neither / rows,
        q_statistic=_ratio(agreeing - opposing, agreeing + opposing, equal),
        error_correlation=_ratio(agreeing - opposing, spread[:, None] * spread, equal),
    )


def mutual_information(parts: Iterable[NDArray[np.floating]]) -> Floats:
    """Between a row's class and the member that answers, in nats (N,), from each member's probabilities (N, C).

    Entropy of the members' mean less the mean of their entropies: 0 where they agree, log(M) at most (Houlsby et al.
    2011, "Bayesian active learning for classification and preference learning"). At least one member is needed.
    """
    total: Floats | float = 0.0
    entropies: Floats | float = 0.0
    count = 0
    for part in parts:
        own = np.asarray(part, dtype=np.float64)
        total, entropies, count = total + own, entropies + _entropy(own), count + 1
    found: Floats = np.maximum(_entropy(np.asarray(total) / count) - np.asarray(entropies) / count, 0.0)
    return found


def _entropy(probabilities: NDArray[np.floating]) -> Floats:
    found: Floats = -(probabilities * np.log(np.clip(probabilities, SMALLEST_PROBABILITY, 1))).sum(axis=1)
    return found


def _ratio(part: Floats, whole: Floats, equal: NDArray[np.bool_]) -> Floats:
    found = np.where(equal, 1.0, 0.0)
    np.divide(part, whole, out=found, where=(whole > 0) & ~equal)
    return found
