"""Combiners that need only some members for each image: which are to run next, and how to run no others.

A sparse combiner tells for each row which members it needs, from the logits of those that have run; once it needs none,
it answers. Whoever runs the members groups the rows by member, so that each network is in memory once per round.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from utils.combiners.protocol import Combiner

Run = Callable[[int, np.ndarray], np.ndarray]
"""(member, its rows int64 (n,)) -> its logits (n, C)"""


@dataclass
class SparseCombiner(Combiner):
    """A combiner whose `predict_proba` reads, of each row, only the members that `route` has requested."""

    @abstractmethod
    def route(self, logits: np.ndarray, ran: np.ndarray) -> np.ndarray:
        """Members that rows need next, bool (M, N), given logits (M, N, C) of those that `ran`, bool (M, N).

        Logits of members that have not run are not looked at. A row that needs none is answered.
        """


def run_sparse(combiner: SparseCombiner, run: Run, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Answer N rows of M members and C classes by running only what is needed, given `shape` (M, N, C).

    Gives probabilities float64 (N, C) and who ran, bool (M, N). Each round calls `run` once per member, for all the
    rows that need it, members in their order.
    """
    logits, ran = np.zeros(shape, dtype=np.float32), np.zeros(shape[:2], dtype=bool)
    while (requested := combiner.route(logits, ran) & ~ran).any():
        for member in np.flatnonzero(requested.any(axis=1)).tolist():
            rows = np.flatnonzero(requested[member])
            logits[member, rows] = run(member, rows)
        ran |= requested
    return combiner.predict_proba(logits), ran


def routed_members(combiner: SparseCombiner, logits: np.ndarray) -> np.ndarray:
    """Which members rows would have run, bool (M, N), where all their logits (M, N, C) are known."""
    return run_sparse(combiner, lambda member, rows: logits[member, rows], logits.shape)[1]
