"""Losses of a pool with one member added, for all candidate members at once.

Member m added to a pool makes the mixture (total + p_m) / (size + 1). Lower losses are better: log-loss, Brier score,
1 - accuracy and 1 - macro F1 as `utils.numeric.metrics` defines them; the predicted class is the first of the most
probable ones. Probabilities are read as float32, sums are float64. Since the last digits of a sum depend on its order,
losses that differ by at most `TIE_TOLERANCE` count as equal.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from utils.core.errors import UserError
from utils.numeric.metrics import SIGN_TOLERANCE, SMALLEST_PROBABILITY, SUM_TOLERANCE, macro_mean

TIE_TOLERANCE = 1e-12
BLOCK = 2**15  # numbers that are processed at a time, so that they stay in a core's cache
VOTE_ROWS = 2**14  # rows whose votes are counted at a time, for the same reason
MAX_MAPPED_BYTES = 2**28  # of a memory map that may stay in memory
Floats = NDArray[np.float64]


class Scorer(Protocol):
    """One metric on M members' probabilities (M, N, C), which it does not modify, and labels (N,)."""

    def reset(self, total: NDArray[Any] | None, size: float) -> None:
        """Set the pool to the weighted sum `total` (N, C) of weight `size`; None and 0 empty it, the initial state."""

    def add(self, member: int) -> None:
        """Add this member to the pool, which may already hold it."""

    def loss(self) -> float:
        """Return the loss of the current pool, which must not be empty."""

    def losses(self, *, all_exact: bool = False) -> Floats:
        """Return losses (M,) with each member added: exact to rounding within 1e-6 of the lowest loss, others to 1e-6.

        With `all_exact`, all are exact to rounding.
        """


def make_scorer(probabilities: NDArray[Any], labels: NDArray[Any], metric: str) -> Scorer:
    """Return the scorer of candidates by `metric`: log_loss, brier, accuracy or f1_macro.

    Probabilities (M, N, C) may be memory-mapped: blocks of members are read in turn and released. Labels (N,) are in
    0..C-1. Raises UserError for shapes that do not match and values that are not probabilities.
    """
    if probabilities.ndim != 3 or 0 in probabilities.shape:
        raise UserError(f"probabilities: found shape {probabilities.shape}; expected (members, rows, classes)")
    rows, classes = probabilities.shape[1:]
    if labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise UserError(f"labels: found {labels.dtype} of shape {labels.shape}; expected integers of shape ({rows},)")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"labels: found {labels.min()}..{labels.max()}; expected 0..{classes - 1}")
    if metric not in SCORERS:
        raise UserError(f"metric: found {metric}; expected one of {', '.join(SCORERS)}")
    return SCORERS[metric](MemberBlocks(probabilities), labels.astype(np.intp))


def candidate_losses(
    current: NDArray[Any], candidates: NDArray[Any], labels: NDArray[Any], *, weight: float, metric: str
) -> Floats:
    """Return losses (M,) of (1 - weight) * current + weight * candidate, for current (N, C), candidates (M, N, C).

    `labels` are (N,). Weight 1 scores the candidates alone. To add several candidates one after another, `make_scorer`
    is faster. Raises UserError for a weight outside [1e-9, 1].
    """
    if not 1e-9 <= weight <= 1:
        raise UserError(f"weight of a candidate: found {weight}; expected a number from 1e-9 to 1")
    scorer = make_scorer(candidates, labels, metric)
    size = (1 - weight) / weight
    scorer.reset(np.asarray(current, dtype=np.float64) * size, size)
    return scorer.losses(all_exact=True)


def weighted_sum(probabilities: NDArray[Any], weights: NDArray[Any]) -> Floats:
    """Return the sum (N, C) of members' probabilities (M, N, C), read as float32, times their weights (M,)."""
    members = MemberBlocks(probabilities)
    total = np.zeros(probabilities.shape[1:])
    for member in np.flatnonzero(weights).tolist():
        total += weights[member] * members.member(member).astype(np.float64)
    return total


class MemberBlocks:
    """Probabilities (M, N, C) that are read as float32 (M, N * C), one block of members at a time."""

    def __init__(self, probabilities: NDArray[Any]) -> None:
        self.shape = probabilities.shape
        self._flat = probabilities.reshape(len(probabilities), -1)
        self._map = _map_of(probabilities)
        self._n_read = 0

    def blocks(self, columns: int) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Yield (slice of members, their probabilities (b, N * C)) so that b * `columns` numbers fit the cache."""
        step = max(1, BLOCK // max(1, columns))
        for first in range(0, self.shape[0], step):
            block = slice(first, min(first + step, self.shape[0]))
            yield block, self._read(block)

    def member(self, index: int) -> NDArray[np.float32]:
        """Return the probabilities (N, C) of a member."""
        return self._read(slice(index, index + 1)).reshape(self.shape[1:])

    def _read(self, block: slice) -> NDArray[np.float32]:
        probabilities = self._flat[block]
        self._n_read += probabilities.nbytes
        if self._map is not None and self._n_read > MAX_MAPPED_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._n_read = probabilities.nbytes
        return np.asarray(probabilities, dtype=np.float32)


def _map_of(array: NDArray[Any]) -> mmap.mmap | None:
    """Return the read-only memory map that backs an array, if its pages can be released."""
    is_read_only = False
    base: Any = array
    while isinstance(base, np.ndarray):
        is_read_only = is_read_only or (isinstance(base, np.memmap) and base.mode == "r")
        base = base.base
    return base if is_read_only and isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") else None


def _check(values: NDArray[Any], first: int = 0) -> None:
    """Raise UserError unless the values (b, ...) of members `first`, `first + 1`, ... are probabilities."""
    if _are_probabilities(values.min(), values.max()):
        return
    for member, member_values in enumerate(values, start=first):
        lowest, highest = member_values.min(), member_values.max()
        if not _are_probabilities(lowest, highest):
            raise UserError(
                f"probabilities: those of member {member} range from {lowest} to {highest}; expected numbers from "
                "0 to 1, such as the softmax of logits"
            )


def _are_probabilities(lowest: Any, highest: Any) -> bool:
    return bool(lowest >= -SIGN_TOLERANCE and highest <= 1 + SUM_TOLERANCE)  # false for NaN


class LogLossScorer:
    """Log-loss, which needs each member's probability of the true class only: (M, N) instead of (M, N, C).

    The sum of logarithms is the logarithm of a product: the values of 24 rows are multiplied before the logarithm,
    three of them in float32. Probabilities of at least 1e-12 keep such products within the types' range.
    """

    N_FACTORS = 24

    def __init__(self, members: MemberBlocks, labels: NDArray[np.intp]) -> None:
        count, self.rows, classes = members.shape
        self.columns = -(-self.rows // self.N_FACTORS) * self.N_FACTORS
        self.true_columns = np.arange(self.rows) * classes + labels
        # Columns beyond the rows hold probability 1, whose logarithm is 0.
        self.p_true = np.ones((count, self.columns), dtype=np.float32)
        lowest = 1.0
        for block, values in members.blocks(self.rows):
            p_true = np.take(values, self.true_columns, axis=1)
            lowest = min(lowest, float(p_true.min()))
            _check(p_true, block.start)
            self.p_true[block, : self.rows] = p_true
        self.needs_clipping = lowest < SMALLEST_PROBABILITY
        self.reset(None, 0)

    def reset(self, total: NDArray[Any] | None, size: float) -> None:
        self.size = float(size)
        self.total = np.full(self.columns, self.size)
        self.total[: self.rows] = 0 if total is None else total.ravel()[self.true_columns]

    def add(self, member: int) -> None:
        self.total += self.p_true[member]
        self.size += 1

    def loss(self) -> float:
        mixture = np.maximum(self.total[: self.rows] / self.size, SMALLEST_PROBABILITY)
        return float(-np.log(mixture).mean())

    def losses(self, *, all_exact: bool = False) -> Floats:
        all_members = slice(0, len(self.p_true))
        if all_exact:
            return self._losses(all_members, np.float64)
        losses = self._losses(all_members, np.float32)
        near_best = np.flatnonzero(losses <= losses.min() + 1e-6)
        losses[near_best] = self._losses(near_best, np.float64)
        return losses

    def _losses(self, members: Any, dtype: type[np.floating[Any]]) -> Floats:
        p_true = self.p_true[members]
        total = self.total.astype(dtype)
        sums = np.empty(len(p_true))
        step = max(1, BLOCK // self.columns)
        for first in range(0, len(p_true), step):
            values = np.add(p_true[first : first + step], total, dtype=dtype)
            if self.needs_clipping:
                np.maximum(values, (self.size + 1) * SMALLEST_PROBABILITY, out=values)
            factors = values.reshape(len(values), self.N_FACTORS, -1)
            triples = factors[:, :8] * factors[:, 8:16]
            triples *= factors[:, 16:]
            product = triples.astype(np.float64)
            for half in (4, 2, 1):
                product = product[:, :half] * product[:, half:]
            sums[first : first + step] = np.log(product).sum(axis=(1, 2))
        return np.log(self.size + 1) * self.columns / self.rows - sums / self.rows


class BrierScorer:
    """Brier score, quadratic in the mixture: it needs the members' dot products, one pass over them per new member."""

    def __init__(self, members: MemberBlocks, labels: NDArray[np.intp]) -> None:
        count, self.rows, classes = members.shape
        self.members = members
        self.true_columns = np.arange(self.rows) * classes + labels
        self.squares, self.p_true_sums = np.empty(count), np.empty(count)
        for member in range(count):
            values = members.member(member)
            _check(values[None], member)
            flat = values.ravel().astype(np.float64)
            self.squares[member] = flat @ flat
            self.p_true_sums[member] = flat[self.true_columns].sum()
        self.products: dict[int, Floats] = {}
        self.reset(None, 0)

    def reset(self, total: NDArray[Any] | None, size: float) -> None:
        self.size = float(size)
        self.square, self.p_true_sum, self.with_total = 0.0, 0.0, np.zeros(len(self.squares))
        if total is not None:
            flat = np.asarray(total, dtype=np.float64).ravel()
            self.square, self.p_true_sum = float(flat @ flat), float(flat[self.true_columns].sum())
            self.with_total = self._products(flat)

    def _products(self, flat: Floats) -> Floats:
        return np.array(
            [self.members.member(member).ravel().astype(np.float64) @ flat for member in range(len(self.squares))]
        )

    def add(self, member: int) -> None:
        if member not in self.products:
            self.products[member] = self._products(self.members.member(member).ravel().astype(np.float64))
        self.square += 2 * self.with_total[member] + self.squares[member]
        self.p_true_sum += self.p_true_sums[member]
        self.with_total = self.with_total + self.products[member]
        self.size += 1

    def loss(self) -> float:
        return float(self._loss(self.square, self.p_true_sum, self.size))

    def _loss(self, squares: Any, p_true_sums: Any, size: float) -> Any:
        return (squares / size**2 - 2 * p_true_sums / size) / self.rows + 1

    def losses(self, *, all_exact: bool = False) -> Floats:
        squares = self.square + 2 * self.with_total + self.squares
        return self._loss(squares, self.p_true_sum + self.p_true_sums, self.size + 1)


class VoteScorer:
    """Accuracy and macro F1, which read only the rows whose predicted class depends on the candidate; exact.

    With `lowest` and `highest` over all members, a class of a row can win only if total + highest reaches the largest
    total + lowest. A row with a single such class is settled for all candidates at once; for other rows only those
    classes are read. This skips rows on which all members agree and classes that another class dominates, and more of
    them with each added member, because a single member cannot overturn a lead above 1. Rows where the lowest value of
    one class is above the highest values of all others are settled for good.
    """

    SLACK = 1e-9  # relative to the pool's size: more than the rounding of float64 sums

    def __init__(self, members: MemberBlocks, labels: NDArray[np.intp], *, count_loss: Callable[..., Floats]) -> None:
        self.members, self.labels, self.count_loss = members, labels, count_loss
        count, self.rows, self.classes = members.shape
        highest = members.member(0).copy()
        lowest = highest.copy()
        for member in range(count):
            values = members.member(member)
            np.maximum(highest, values, out=highest)
            np.minimum(lowest, values, out=lowest)
        if not _are_probabilities(lowest.min(), highest.max()):
            for member in range(count):
                _check(members.member(member)[None], member)
        self.bounds = (lowest.T.copy(order="C"), highest.T.copy(order="C"))
        all_rows = np.arange(self.rows)
        self.leaders = lowest.argmax(axis=1)
        highest[all_rows, self.leaders] = -np.inf
        self.leads = lowest[all_rows, self.leaders] - highest.max(axis=1)
        self.support = np.bincount(labels, minlength=self.classes)
        self.class_dtype = np.int16 if self.classes < 2**15 else np.int32  # the smaller type is faster
        self.reset(None, 0)

    def reset(self, total: NDArray[Any] | None, size: float) -> None:
        self.size = float(size)
        is_settled = self.leads > 1e-6 + self.SLACK * self.size
        if total is not None:  # which may include probabilities of other members
            is_settled &= total[np.arange(self.rows), self.leaders] >= total.max(axis=1)
        self.open_rows = np.flatnonzero(~is_settled)
        self.truth = self.labels[self.open_rows]
        self.lowest, self.highest = (np.take(bound, self.open_rows, axis=1) for bound in self.bounds)
        self.total = np.zeros((self.classes, len(self.open_rows)))
        if total is not None:
            self.total += total[self.open_rows].T
        self.predicted = np.bincount(self.leaders[is_settled], minlength=self.classes)
        self.hits = np.bincount(self.labels[is_settled & (self.leaders == self.labels)], minlength=self.classes)

    def add(self, member: int) -> None:
        self.total += self.members.member(member)[self.open_rows].T
        self.size += 1

    def loss(self) -> float:
        winners = self.total.argmax(axis=0)
        correct = winners[winners == self.truth]
        hits, predicted = (np.bincount(classes, minlength=self.classes) for classes in (correct, winners))
        return float(self.count_loss(self.hits + hits, self.predicted + predicted, self.support))

    def losses(self, *, all_exact: bool = False) -> Floats:
        hits, predicted = (np.tile(table, (self.members.shape[0], 1)) for table in (self.hits, self.predicted))
        for first in range(0, len(self.open_rows), VOTE_ROWS):
            self._count(slice(first, first + VOTE_ROWS), hits, predicted)
        return self.count_loss(hits, predicted, self.support)

    def _count(self, part: slice, hits: NDArray[np.intp], predicted: NDArray[np.intp]) -> None:
        """Add the hits and predictions (M, C) on some of the open rows, with each member added."""
        total, truth = self.total[:, part], self.truth[part]
        guaranteed = (total + self.lowest[:, part]).max(axis=0) - self.SLACK * (self.size + 1)
        can_win = total + self.highest[:, part] >= guaranteed
        counts = can_win.sum(axis=0, dtype=self.class_dtype)
        is_settled = counts == 1
        predicted += np.count_nonzero(can_win & is_settled, axis=1)
        hits += np.bincount(truth[is_settled & can_win[truth, np.arange(len(truth))]], minlength=self.classes)
        rows = np.flatnonzero(~is_settled)
        rows = rows[np.argsort(-counts[rows], kind="stable")]
        slots = _slots(can_win[:, rows].T, counts[rows])
        columns = [self.open_rows[part][rows[: len(classes)]] * self.classes + classes for classes in slots]
        totals = [total[classes, rows[: len(classes)]] for classes in slots]
        for block, values in self.members.blocks(len(rows)):
            winners = np.zeros((len(values), len(rows)), dtype=self.class_dtype)
            best = np.full(winners.shape, -np.inf)
            for classes, slot_columns, slot_total in zip(slots, columns, totals, strict=True):
                reached = np.take(values, slot_columns, axis=1) + slot_total
                slot_best, slot_winners = best[:, : len(classes)], winners[:, : len(classes)]
                # Classes ascend: the winner is the last class that exceeds all classes before it.
                np.maximum(slot_winners, (reached > slot_best) * classes, out=slot_winners)
                np.maximum(slot_best, reached, out=slot_best)
            bins = winners + np.arange(len(winners))[:, None] * self.classes
            for table, entries in ((predicted, bins.ravel()), (hits, bins[winners == truth[rows]])):
                table[block] += np.bincount(entries, minlength=len(winners) * self.classes).reshape(-1, self.classes)


def _slots(can_win: NDArray[np.bool_], counts: NDArray[Any]) -> list[NDArray[Any]]:
    """Return one array per slot k: the k-th class that can win of each row with at least k such classes.

    `can_win` (n, C) and `counts` (n,), its sums over classes, are sorted by falling count.
    """
    classes = np.nonzero(can_win)[1].astype(counts.dtype)
    starts = np.cumsum(counts) - counts
    return [classes[starts[counts > slot] + slot] for slot in range(counts[0] if len(counts) else 0)]


def accuracy_loss(hits: NDArray[np.intp], predicted: NDArray[np.intp], support: NDArray[np.intp]) -> Floats:
    """Return 1 - accuracy (...,) from hits and predictions (..., C) and the rows (C,) per class."""
    losses: Floats = 1 - hits.sum(axis=-1) / support.sum()
    return losses


def f1_loss(hits: NDArray[np.intp], predicted: NDArray[np.intp], support: NDArray[np.intp]) -> Floats:
    """Return 1 - macro F1 (...,) from the same counts, over the classes that have rows."""
    losses: Floats = 1 - macro_mean(2 * hits / np.maximum(predicted + support, 1), support)
    return losses


SCORERS: dict[str, Callable[[MemberBlocks, NDArray[np.intp]], Scorer]] = {
    "log_loss": LogLossScorer,
    "brier": BrierScorer,
    "accuracy": partial(VoteScorer, count_loss=accuracy_loss),
    "f1_macro": partial(VoteScorer, count_loss=f1_loss),
}
