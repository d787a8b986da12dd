"""Accuracy and macro F1 of a pool with one member added, computed from the classes that can win in each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.numeric.member_blocks import MemberBlocks, are_probabilities, check_probabilities
from utils.numeric.metrics import macro_mean

FEW = 16  # classes: rows with at most so many are processed together, others with those of at most four times as many
CHUNK = 2**18  # pairs of a row and a class that are processed at a time, so that they stay in a core's cache
MARGIN = 1e-6  # a class whose probability is lower by more in every member loses in every pool
SLACK = 1e-9  # relative to the pool's size: more than the rounding of float64 sums
Floats = NDArray[np.float64]
Counts = NDArray[np.intp]


@dataclass(frozen=True)
class _OpenRows:
    """Rows in which several classes can win: n rows with up to K such classes, which ascend along the first axis."""

    truth: Counts
    """(n,): true classes"""
    classes: NDArray[Any]
    """(K, n)"""
    columns: Counts
    """(K, n): where the pair of row and class is among a member's flat probabilities"""
    lowest: NDArray[np.float32]
    """(K, n): lowest probability over the members"""
    highest: NDArray[np.float32]
    """(K, n)"""
    empty: Floats
    """(K, n): the sum of no member: 0, or -inf beyond a row's classes"""
    total: Floats
    """(K, n): the sum of the pool, which changes; -inf beyond a row's classes, so that they never win"""


class VoteScorer:
    """Accuracy and macro F1, which read only the rows whose predicted class depends on the candidate; exact.

    A class whose highest probability over all members is below the lowest of another class wins in no pool. Each row
    keeps the other classes, so that time grows with their number and not with that of all classes; a row with a single
    one is settled for good. For a given pool, a class can win only if total + highest reaches the largest total +
    lowest; the more members a pool has, the fewer classes do, because one candidate cannot overturn a lead above 1. A
    row with a single such class is settled for all candidates at once; of others only those classes are read.
    """

    def __init__(self, members: MemberBlocks, labels: Counts, *, count_loss: Callable[..., Floats]) -> None:
        self.members, self.labels, self.count_loss = members, labels, count_loss
        count, _, self.classes = members.shape
        highest = members.member(0).copy()
        lowest = highest.copy()
        for member in range(count):
            values = members.member(member)
            np.maximum(highest, values, out=highest)
            np.minimum(lowest, values, out=lowest)
        if not are_probabilities(lowest.min(), highest.max()):
            for member in range(count):
                check_probabilities(members.member(member)[None], member)
        self.lowest, self.highest = lowest, highest
        self.leaders = lowest.argmax(axis=1)
        self.support = np.bincount(labels, minlength=self.classes)
        self.class_dtype = np.int16 if self.classes < 2**15 else np.int32  # the smaller type is faster
        self.without_start = self._divided(self._can_lead(0))
        self.reset(None, 0)

    def reset(self, total: NDArray[Any] | None, size: float) -> None:
        self.size = float(size)
        if total is None:
            self.chunks, self.hits, self.predicted = self.without_start
        else:  # it may include probabilities of other members
            leading = np.take_along_axis(total, self.leaders[:, None], axis=1)
            self.chunks, self.hits, self.predicted = self._divided(self._can_lead(self.size) | (total >= leading))
        for chunk in self.chunks:
            chunk.total[:] = chunk.empty
            if total is not None:
                chunk.total[:] += total.ravel()[chunk.columns]

    def _can_lead(self, size: float) -> NDArray[np.bool_]:
        """Return whether each class (N, C) wins in some sum of the members that is added to a tie."""
        least = np.take_along_axis(self.lowest, self.leaders[:, None], axis=1) - np.float32(MARGIN + SLACK * size)
        return self.highest >= least

    def _divided(self, can_win: NDArray[np.bool_]) -> tuple[list[_OpenRows], Counts, Counts]:
        """Return the open rows and, of the settled ones, hits (C,) and predictions (C,), given what can win (N, C)."""
        counts = can_win.sum(axis=1)
        is_settled = counts == 1
        settled = self.leaders[is_settled]
        hits = np.bincount(settled[settled == self.labels[is_settled]], minlength=self.classes)
        chunks, fewer, most = [], 1, FEW
        while fewer < counts.max():
            rows = np.flatnonzero((counts > fewer) & (counts <= most))
            step = max(1, CHUNK // min(most, self.classes))
            for first in range(0, len(rows), step):
                part = rows[first : first + step]
                chunks.append(self._open(part, can_win[part], counts[part]))
            fewer, most = most, 4 * most
        return chunks, hits, np.bincount(settled, minlength=self.classes)

    def _open(self, rows: Counts, can_win: NDArray[np.bool_], counts: Counts) -> _OpenRows:
        within = np.arange(counts.max())[None] < counts[:, None]
        classes = np.zeros(within.shape, dtype=self.class_dtype)
        classes[within] = np.nonzero(can_win)[1]
        columns = rows[:, None] * self.classes + classes
        return _OpenRows(
            truth=self.labels[rows],
            classes=np.ascontiguousarray(classes.T),
            columns=np.ascontiguousarray(columns.T),
            lowest=self.lowest.ravel()[columns.T],
            highest=self.highest.ravel()[columns.T],
            empty=np.ascontiguousarray(np.where(within, 0.0, -np.inf).T),
            total=np.empty(within.shape[::-1]),
        )

    def add(self, member: int) -> None:
        values = self.members.member(member).ravel()
        for chunk in self.chunks:
            np.add(chunk.total, np.take(values, chunk.columns), out=chunk.total)
        self.size += 1

    def loss(self) -> float:
        hits, predicted = self.hits.copy(), self.predicted.copy()
        for chunk in self.chunks:
            winners = np.take_along_axis(chunk.classes, chunk.total.argmax(axis=0)[None], axis=0)[0]
            predicted += np.bincount(winners, minlength=self.classes)
            hits += np.bincount(winners[winners == chunk.truth], minlength=self.classes)
        return float(self.count_loss(hits, predicted, self.support))

    def losses(self, *, all_exact: bool = False) -> Floats:
        hits, predicted = (np.tile(table, (self.members.shape[0], 1)) for table in (self.hits, self.predicted))
        for chunk in self.chunks:
            self._count(chunk, hits, predicted)
        return self.count_loss(hits, predicted, self.support)

    def _count(self, chunk: _OpenRows, hits: Counts, predicted: Counts) -> None:
        """Add the hits and predictions (M, C) on open rows, with each member added."""
        guaranteed = (chunk.total + chunk.lowest).max(axis=0) - SLACK * (self.size + 1)
        can_win = chunk.total + chunk.highest >= guaranteed
        counts = can_win.sum(axis=0, dtype=self.class_dtype)
        is_settled = counts == 1
        winners = np.take_along_axis(chunk.classes, can_win.argmax(axis=0)[None], axis=0)[0]
        predicted += np.bincount(winners[is_settled], minlength=self.classes)
        hits += np.bincount(winners[is_settled & (winners == chunk.truth)], minlength=self.classes)
        rows = np.flatnonzero(~is_settled)
        rows = rows[np.argsort(-counts[rows], kind="stable")]
        truth = chunk.truth[rows]
        slots = []
        for places in _slots(can_win[:, rows].T, counts[rows]):
            pairs = places, rows[: len(places)]
            slots.append((chunk.classes[pairs], chunk.columns[pairs], chunk.total[pairs]))
        for block, values in self.members.blocks(len(rows)):
            winners = np.zeros((len(values), len(rows)), dtype=self.class_dtype)
            best = np.full(winners.shape, -np.inf)
            for classes, columns, total in slots:
                reached = np.take(values, columns, axis=1) + total
                slot_best, slot_winners = best[:, : len(classes)], winners[:, : len(classes)]
                # Classes ascend: the winner is the last class that exceeds all classes before it.
                np.maximum(slot_winners, (reached > slot_best) * classes, out=slot_winners)
                np.maximum(slot_best, reached, out=slot_best)
            bins = winners + np.arange(len(winners))[:, None] * self.classes
            for table, entries in ((predicted, bins.ravel()), (hits, bins[winners == truth])):
                table[block] += np.bincount(entries, minlength=len(winners) * self.classes).reshape(-1, self.classes)


def _slots(can_win: NDArray[np.bool_], counts: NDArray[Any]) -> list[Counts]:
    """Return one array per slot k: where the k-th class that can win is, for each row with at least k such classes.

    `can_win` (n, K) and `counts` (n,), its sums over classes, are sorted by falling count.
    """
    places = np.nonzero(can_win)[1]
    counts = counts.astype(np.intp)
    starts = np.cumsum(counts) - counts
    return [places[starts[counts > slot] + slot] for slot in range(counts[0] if len(counts) else 0)]


def accuracy_loss(hits: NDArray[np.intp], predicted: NDArray[np.intp], support: NDArray[np.intp]) -> Floats:
    """Return 1 - accuracy (...,) from hits and predictions (..., C) and the rows (C,) per class."""
    losses: Floats = 1 - hits.sum(axis=-1) / support.sum()
    return losses


def f1_loss(hits: NDArray[np.intp], predicted: NDArray[np.intp], support: NDArray[np.intp]) -> Floats:
    """Return 1 - macro F1 (...,) from the same counts, over the classes that have rows."""
    losses: Floats = 1 - macro_mean(2 * hits / np.maximum(predicted + support, 1), support)
    return losses
