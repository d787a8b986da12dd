"""Sparse combiners, which need only some members for each image.

A sparse combiner determines for each row which members to run next, from the logits of those that have run, and
predicts once no further member is needed. The caller runs the members grouped by member, so that each network is loaded
once per round.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from utils.combiners.protocol import Combiner

Run = Callable[[int, np.ndarray], np.ndarray]
"""(index of a member, indices of rows int64 (n,)) -> the member's logits (n, C)"""


@dataclass
class SparseCombiner(Combiner):
    """A combiner whose `predict_proba` reads, of each row, only the members that `route` has requested."""

    @abstractmethod
    def route(self, logits: np.ndarray, ran: np.ndarray) -> np.ndarray:
        """Return the members that rows need next, bool (M, N), given logits (M, N, C) of those that `ran`, bool (M, N).

        Logits of members that have not run are ignored. A row that needs no further member is complete.
        """


def run_sparse(combiner: SparseCombiner, run: Run, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Predict N rows by running only the members that each row needs, given `shape` (M, N, C) of all logits.

    Returns probabilities float64 (N, C) and which members ran, bool (M, N). Each round calls `run` at most once per
    member, in the order of the members, with all rows that need it.
    """
    logits, ran = np.zeros(shape, dtype=np.float32), np.zeros(shape[:2], dtype=bool)
    while (requested := combiner.route(logits, ran) & ~ran).any():
        for member in np.flatnonzero(requested.any(axis=1)).tolist():
            rows = np.flatnonzero(requested[member])
            logits[member, rows] = run(member, rows)
        ran |= requested
    return combiner.predict_proba(logits), ran


def routed_members(combiner: SparseCombiner, logits: np.ndarray) -> np.ndarray:
    """Return which members would run for each row, bool (M, N), given the logits (M, N, C) of all members."""
    return run_sparse(combiner, lambda member, rows: logits[member, rows], logits.shape)[1]
