"""How good would the pool be with this member added? Losses of all candidates at once; numpy alone.

A pool is a sum of members' probabilities `total` (N, C) and the weight `size` of what was summed. Adding member m gives
the mixture (total + p_m) / (size + 1). Losses are the lower the better: log-loss in nats, Brier's 0 to 2, 1 - accuracy
and 1 - macro F1 as `utils.metrics` defines them, the predicted class being the first of the highest. Probabilities are
read as float32. Losses are sums in float64 whose last digits depend on the order of summation, so that two of them
count as equal when they differ by no more than `TIE`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError

TIE = 1e-12
BLOCK = 2**15  # numbers handled at a time, so that they stay in a core's cache
Floats = NDArray[np.float64]


class Scorer(Protocol):
    """One metric on M members' probabilities (M, N, C), which it never writes, and labels (N,)."""

    def begin(self, total: NDArray[Any] | None, size: float) -> None:
        """Start at the pool `total` (N, C) of weight `size`; None and 0 is the empty pool."""

    def add(self, member: int) -> None:
        """Take one more of this member into the pool."""

    def losses(self, *, all_exact: bool = False) -> Floats:
        """Losses (M,) with each member added; exact to rounding within 1e-6 of the lowest, elsewhere to 1e-6."""


def scorer(probabilities: NDArray[Any], labels: NDArray[Any], metric: str, *, smallest: float = 1e-12) -> Scorer:
    """What scores candidates by `metric`: log_loss, brier, accuracy or f1_macro.

    Probabilities (M, N, C), also memory-mapped: blocks of members are read one after the other and let go. Labels (N,)
    in 0..C-1. `smallest` is where log-loss clips. UserError for shapes that do not fit and numbers that are not finite.
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
    return SCORERS[metric](Members(probabilities), labels.astype(np.intp), smallest)


def candidate_losses(
    current: NDArray[Any], candidates: NDArray[Any], labels: NDArray[Any], *, weight: float, metric: str
) -> Floats:
    """Losses (M,) of (1 - weight) * current + weight * candidate, for current (N, C) and candidates (M, N, C).

    With weight 1 the candidates alone. Where one candidate after the other is added, `scorer` keeps what they share.
    """
    if not 0 < weight <= 1:
        raise UserError(f"weight of a candidate: found {weight}; expected a number above 0, at most 1")
    found = scorer(candidates, labels, metric)
    size = (1 - weight) / weight
    found.begin(np.asarray(current, dtype=np.float64) * size, size)
    return found.losses(all_exact=True)


class Members:
    """Probabilities (M, N, C) as float32 (M, N * C), read a block of members at a time."""

    def __init__(self, probabilities: NDArray[Any]) -> None:
        self.shape = probabilities.shape
        self._flat = probabilities.reshape(len(probabilities), -1)
        self._map = _map_of(probabilities)

    def blocks(self, columns: int) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """(which members, their probabilities (b, N * C)), b for `columns` numbers of interest per member."""
        step = max(1, BLOCK // max(1, columns))
        for first in range(0, self.shape[0], step):
            block = slice(first, min(first + step, self.shape[0]))
            yield block, self._read(block)

    def one(self, member: int) -> NDArray[np.float32]:
        """Probabilities (N, C) of a member."""
        return self._read(slice(member, member + 1)).reshape(self.shape[1:])

    def _read(self, block: slice) -> NDArray[np.float32]:
        if self._map is not None:  # what was read before need not stay in memory
            self._map.madvise(mmap.MADV_DONTNEED)
        return np.asarray(self._flat[block], dtype=np.float32)


def _map_of(array: NDArray[Any]) -> mmap.mmap | None:
    """The read-only memory map that an array lies in, where its pages can be let go."""
    readable = False
    found: Any = array
    while isinstance(found, np.ndarray):
        readable = readable or (isinstance(found, np.memmap) and found.mode == "r")
        found = found.base
    return found if readable and isinstance(found, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") else None


def _refuse_wrong(member: int, values: NDArray[Any]) -> None:
    wrong = ~(np.isfinite(values) & (values >= -1e-6) & (values <= 1 + 1e-3))
    if wrong.any():
        raise UserError(
            f"probabilities: member {member} has {int(wrong.sum())} values outside 0..1, the first is "
            f"{values[wrong][0]}; expected a soft-max of its logits"
        )


class LogLoss:
    """Needs each member's probability of the true class alone: (M, N) instead of (M, N, C).

    The sum of logarithms is the logarithm of a product: 24 rows are multiplied before one logarithm is taken, three of
    them in float32. Probabilities of at least 1e-12 keep such products inside the range of the numbers.
    """

    FACTORS = 24

    def __init__(self, members: Members, labels: NDArray[np.intp], smallest: float) -> None:
        count, self.rows, classes = members.shape
        self.columns = -(-self.rows // self.FACTORS) * self.FACTORS
        place = np.arange(self.rows) * classes + labels
        self.smallest = smallest
        self.place = place
        # Columns beyond the rows hold probability 1, whose logarithm adds nothing.
        self.of_truth = np.ones((count, self.columns), dtype=np.float32)
        lowest = 1.0
        for block, values in members.blocks(self.rows):
            found = np.take(values, place, axis=1)
            lowest = min(lowest, float(found.min()))
            if not (found.min() >= -1e-6 and found.max() <= 1 + 1e-3):  # NaN is caught, too
                for member, row in enumerate(found, start=block.start):
                    _refuse_wrong(member, row)
            self.of_truth[block, : self.rows] = found
        self.clips = lowest < smallest
        self.begin(None, 0)

    def begin(self, total: NDArray[Any] | None, size: float) -> None:
        self.size = float(size)
        self.total = np.full(self.columns, self.size)
        self.total[: self.rows] = 0 if total is None else np.asarray(total, dtype=np.float64).ravel()[self.place]

    def add(self, member: int) -> None:
        self.total += self.of_truth[member]
        self.size += 1

    def losses(self, *, all_exact: bool = False) -> Floats:
        if all_exact:
            return self._losses(np.arange(len(self.of_truth)), np.float64)
        found = self._losses(slice(0, len(self.of_truth)), np.float32)
        near = np.flatnonzero(found <= found.min() + 1e-6)
        found[near] = self._losses(near, np.float64)
        return found

    def _losses(self, chosen: Any, kind: type[np.floating[Any]]) -> Floats:
        of_truth = self.of_truth[chosen]
        total = self.total.astype(kind)
        sums = np.empty(len(of_truth))
        step = max(1, BLOCK // self.columns)
        for first in range(0, len(of_truth), step):
            values = np.add(of_truth[first : first + step], total, dtype=kind)
            if self.clips:
                np.maximum(values, (self.size + 1) * self.smallest, out=values)
            parts = values.reshape(len(values), self.FACTORS, -1)
            threes = parts[:, :8] * parts[:, 8:16]
            threes *= parts[:, 16:]
            product = threes.astype(np.float64)
            for half in (4, 2, 1):
                product = product[:, :half] * product[:, half:]
            sums[first : first + step] = np.log(product).sum(axis=(1, 2))
        return np.log(self.size + 1) * self.columns / self.rows - sums / self.rows


class Brier:
    """Quadratic in the mixture, so that scalar products of members are all it needs; one pass for each new one."""

    def __init__(self, members: Members, labels: NDArray[np.intp]) -> None:
        count, self.rows, classes = members.shape
        self.members = members
        self.place = np.arange(self.rows) * classes + labels
        self.squares, self.truths = np.empty(count), np.empty(count)
        for member in range(count):
            values = members.one(member)
            _refuse_wrong(member, values)
            wide = values.ravel().astype(np.float64)
            self.squares[member] = wide @ wide
            self.truths[member] = wide[self.place].sum()
        self.products: dict[int, Floats] = {}
        self.begin(None, 0)

    def begin(self, total: NDArray[Any] | None, size: float) -> None:
        self.size = float(size)
        wide = np.zeros(0) if total is None else np.asarray(total, dtype=np.float64).ravel()
        self.square, self.truth = float(wide @ wide), float(wide[self.place].sum()) if len(wide) else 0.0
        self.with_total = self._products(wide) if len(wide) else np.zeros(len(self.squares))

    def _products(self, wide: Floats) -> Floats:
        return np.array(
            [self.members.one(member).ravel().astype(np.float64) @ wide for member in range(len(self.squares))]
        )

    def add(self, member: int) -> None:
        if member not in self.products:
            self.products[member] = self._products(self.members.one(member).ravel().astype(np.float64))
        self.square += 2 * self.with_total[member] + self.squares[member]
        self.truth += self.truths[member]
        self.with_total = self.with_total + self.products[member]
        self.size += 1

    def losses(self, *, all_exact: bool = False) -> Floats:
        size = self.size + 1
        squares = (self.square + 2 * self.with_total + self.squares) / size**2
        return (squares - 2 * (self.truth + self.truths) / size) / self.rows + 1


class Votes:
    """Accuracy and macro F1: only rows whose predicted class depends on the candidate are looked at, exactly.

    With `lowest` and `highest` (C, N) over all members, a class of a row can win only if total + highest reaches the
    largest total + lowest. A row with one such class is settled for all candidates at once; of the others only those
    classes are read. This leaves out what all members agree on and what is dominated by another class, and more of it
    with every member that is added, because no single one can overturn a lead above 1.
    """

    SLACK = 1e-9  # beyond the rounding of sums in float64

    def __init__(self, members: Members, labels: NDArray[np.intp], *, of_counts: Callable[..., Floats]) -> None:
        self.members, self.labels, self.of_counts = members, labels, of_counts
        count, self.rows, self.classes = members.shape
        highest = members.one(0).copy()
        lowest = highest.copy()
        for member in range(count):
            values = members.one(member)
            np.maximum(highest, values, out=highest)
            np.minimum(lowest, values, out=lowest)
        if not (lowest.min() >= -1e-6 and highest.max() <= 1 + 1e-3):
            for member in range(count):
                _refuse_wrong(member, members.one(member))
        self.highest, self.lowest = np.ascontiguousarray(highest.T), np.ascontiguousarray(lowest.T)
        self.support = np.bincount(labels, minlength=self.classes)
        self.begin(None, 0)

    def begin(self, total: NDArray[Any] | None, size: float) -> None:
        shape = (self.classes, self.rows)
        self.total = np.zeros(shape) if total is None else np.array(np.asarray(total).T, dtype=np.float64, order="C")

    def add(self, member: int) -> None:
        self.total += self.members.one(member).T

    def losses(self, *, all_exact: bool = False) -> Floats:
        reach = (self.total + self.lowest).max(axis=0)
        live = self.total + self.highest >= reach - self.SLACK
        counts = live.sum(axis=0, dtype=np.int32)
        settled = counts == 1
        predicted = (live & settled).sum(axis=1)
        hits = np.bincount(self.labels[settled & live[self.labels, np.arange(self.rows)]], minlength=self.classes)
        found = np.empty(self.members.shape[0])
        rows = np.flatnonzero(~settled)
        rows = rows[np.argsort(-counts[rows], kind="stable")]
        slots = _slots(live[:, rows].T, counts[rows])
        truth = self.labels[rows]
        for block, values in self.members.blocks(len(rows)):
            winners = self._winners(values, rows, slots)
            offsets = np.arange(len(winners))[:, None] * self.classes
            shape = (len(winners), self.classes)
            size = len(winners) * self.classes
            of_block = np.bincount((winners + offsets).ravel(), minlength=size).reshape(shape)
            right = np.bincount((winners + offsets)[winners == truth], minlength=size).reshape(shape)
            found[block] = self.of_counts(hits + right, predicted + of_block, self.support)
        return found

    def _winners(
        self, values: NDArray[np.float32], rows: NDArray[np.intp], slots: list[NDArray[np.intp]]
    ) -> NDArray[np.intp]:
        """Predicted class (b, open rows) with each member of a block added."""
        winners = np.zeros((len(values), len(rows)), dtype=np.int32)
        best = np.full(winners.shape, -np.inf)
        for classes in slots:
            some = rows[: len(classes)]
            reached = np.take(values, some * self.classes + classes, axis=1) + self.total[classes, some]
            far = best[:, : len(some)]
            # Ascending classes and a strict comparison: the first of equals stays.
            winners[:, : len(some)] = np.where(reached > far, classes, winners[:, : len(some)])
            np.maximum(far, reached, out=far)
        return winners


def _slots(live: NDArray[np.bool_], counts: NDArray[Any]) -> list[NDArray[np.int32]]:
    """The first, second, ... live class of each row that has so many; rows (n, C) with most live classes first."""
    classes = np.nonzero(live)[1].astype(np.int32)
    starts = np.cumsum(counts) - counts
    return [classes[starts[counts > slot] + slot] for slot in range(counts[0] if len(counts) else 0)]


def _accuracy_loss(hits: NDArray[np.intp], predicted: NDArray[np.intp], support: NDArray[np.intp]) -> Floats:
    """1 - accuracy (...,) of hits and predictions (..., C) and rows (C,) per class."""
    found: Floats = 1 - hits.sum(axis=-1) / support.sum()
    return found


def _f1_loss(hits: NDArray[np.intp], predicted: NDArray[np.intp], support: NDArray[np.intp]) -> Floats:
    """1 - macro F1, to which a class that is neither labelled nor predicted gives 0."""
    found: Floats = 1 - (2 * hits / np.maximum(predicted + support, 1)).mean(axis=-1)
    return found


SCORERS: dict[str, Callable[[Members, NDArray[np.intp], float], Scorer]] = {
    "log_loss": LogLoss,
    "brier": lambda members, labels, smallest: Brier(members, labels),
    "accuracy": lambda members, labels, smallest: Votes(members, labels, of_counts=_accuracy_loss),
    "f1_macro": lambda members, labels, smallest: Votes(members, labels, of_counts=_f1_loss),
}
