"""How good would the pool be with this member added? Losses of all candidates at once; numpy alone.

Member m added to a pool makes the mixture (total + p_m) / (size + 1). Losses are the lower the better: log-loss, Brier
score, 1 - accuracy and 1 - macro F1 as `utils.numeric.metrics` defines them; the predicted class is the first of the
highest.
Probabilities are read as float32, sums are float64. The last digits of a sum depend on its order, so that two losses
count as equal when they differ by no more than `TIE`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from utils.core.errors import UserError
from utils.numeric.metrics import SIGN_TOLERANCE, SMALLEST_PROBABILITY, SUM_TOLERANCE

TIE_TOLERANCE = 1e-12
BLOCK = 2**15  # numbers handled at a time, so that they stay in a core's cache
MAX_MAPPED_BYTES = 2**28  # of a memory map that may stay in memory
VOTE_ROWS = 2**14  # rows whose votes are counted at a time, for the same reason
Floats = NDArray[np.float64]


class Scorer(Protocol):
    """One metric on M members' probabilities (M, N, C), which it never writes, and labels (N,)."""

    def begin(self, total: NDArray[Any] | None, size: float) -> None:
        """Start anew at the pool `total` (N, C) of weight `size`; None and 0 is the empty one, where one is made."""

    def add(self, member: int) -> None:
        """Take one more of this member into the pool."""

    def loss(self) -> float:
        """Loss of the pool as it is, which is not empty."""

    def losses(self, *, all_exact: bool = False) -> Floats:
        """Losses (M,) with each member added; exact to rounding within 1e-6 of the lowest, elsewhere to 1e-6."""


def make_scorer(probabilities: NDArray[Any], labels: NDArray[Any], metric: str) -> Scorer:
    """What scores candidates by `metric`: log_loss, brier, accuracy or f1_macro.

    Probabilities (M, N, C), also memory-mapped: blocks of members are read one after the other and let go. Labels (N,)
    in 0..C-1. UserError for shapes that do not fit and numbers that are not finite.
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
    """Losses (M,) of (1 - weight) * current + weight * candidate, for current (N, C) and candidates (M, N, C).

    With weight 1 the candidates alone. Where one candidate after the other is added, `scorer` keeps what they share.
    """
    if not 1e-9 <= weight <= 1:
        raise UserError(f"weight of a candidate: found {weight}; expected a number from 1e-9 to 1")
    found = make_scorer(candidates, labels, metric)
    size = (1 - weight) / weight
    found.begin(np.asarray(current, dtype=np.float64) * size, size)
    return found.losses(all_exact=True)


def weighted_sum(probabilities: NDArray[Any], weights: NDArray[Any]) -> Floats:
    """Sum (N, C) of members' probabilities (M, N, C), each times its weight (M,), as the scorers read them."""
    members = MemberBlocks(probabilities)
    total = np.zeros(probabilities.shape[1:])
    for member in np.flatnonzero(weights):
        total += weights[member] * members.one(member).astype(np.float64)
    return total


class MemberBlocks:
    """Probabilities (M, N, C) as float32 (M, N * C), read a block of members at a time."""

    def __init__(self, probabilities: NDArray[Any]) -> None:
        self.shape = probabilities.shape
        self._flat = probabilities.reshape(len(probabilities), -1)
        self._map = _map_of(probabilities)
        self._seen = 0

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
        found = self._flat[block]
        self._seen += found.nbytes
        if self._map is not None and self._seen > MAX_MAPPED_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._seen = found.nbytes
        return np.asarray(found, dtype=np.float32)


def _map_of(array: NDArray[Any]) -> mmap.mmap | None:
    """The read-only memory map that an array lies in, where its pages can be let go."""
    readable = False
    found: Any = array
    while isinstance(found, np.ndarray):
        readable = readable or (isinstance(found, np.memmap) and found.mode == "r")
        found = found.base
    return found if readable and isinstance(found, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") else None


def _check(values: NDArray[Any], first: int = 0) -> None:
    """UserError where the probabilities (b, ...) of members `first`, `first + 1`, ... are none."""
    if _are_proper(values.min(), values.max()):
        return
    for member, own in enumerate(values, start=first):
        if not _are_proper(own.min(), own.max()):
            raise UserError(
                f"probabilities: those of member {member} reach from {own.min()} to {own.max()}; expected numbers from "
                "0 to 1, such as the soft-max of logits"
            )


def _are_proper(lowest: Any, highest: Any) -> bool:
    return bool(lowest >= -SIGN_TOLERANCE and highest <= 1 + SUM_TOLERANCE)  # NaN is neither


class LogLossScorer:
    """Needs each member's probability of the true class alone: (M, N) instead of (M, N, C).

    The sum of logarithms is the logarithm of a product: 24 rows are multiplied before one logarithm is taken, three of
    them in float32. Probabilities of at least 1e-12 keep such products inside the range of the numbers.
    """

    FACTORS = 24

    def __init__(self, members: MemberBlocks, labels: NDArray[np.intp]) -> None:
        count, self.rows, classes = members.shape
        self.columns = -(-self.rows // self.FACTORS) * self.FACTORS
        place = np.arange(self.rows) * classes + labels
        self.place = place
        # Columns beyond the rows hold probability 1, whose logarithm adds nothing.
        self.p_true = np.ones((count, self.columns), dtype=np.float32)
        lowest = 1.0
        for block, values in members.blocks(self.rows):
            found = np.take(values, place, axis=1)
            lowest = min(lowest, float(found.min()))
            _check(found, block.start)
            self.p_true[block, : self.rows] = found
        self.clips = lowest < SMALLEST_PROBABILITY
        self.begin(None, 0)

    def begin(self, total: NDArray[Any] | None, size: float) -> None:
        self.size = float(size)
        self.total = np.full(self.columns, self.size)
        self.total[: self.rows] = 0 if total is None else total.ravel()[self.place]

    def add(self, member: int) -> None:
        self.total += self.p_true[member]
        self.size += 1

    def loss(self) -> float:
        mixture = np.maximum(self.total[: self.rows] / self.size, SMALLEST_PROBABILITY)
        return float(-np.log(mixture).mean())

    def losses(self, *, all_exact: bool = False) -> Floats:
        everyone = slice(0, len(self.p_true))
        if all_exact:
            return self._losses(everyone, np.float64)
        found = self._losses(everyone, np.float32)
        near = np.flatnonzero(found <= found.min() + 1e-6)
        found[near] = self._losses(near, np.float64)
        return found

    def _losses(self, chosen: Any, kind: type[np.floating[Any]]) -> Floats:
        p_true = self.p_true[chosen]
        total = self.total.astype(kind)
        sums = np.empty(len(p_true))
        step = max(1, BLOCK // self.columns)
        for first in range(0, len(p_true), step):
            values = np.add(p_true[first : first + step], total, dtype=kind)
            if self.clips:
                np.maximum(values, (self.size + 1) * SMALLEST_PROBABILITY, out=values)
            parts = values.reshape(len(values), self.FACTORS, -1)
            threes = parts[:, :8] * parts[:, 8:16]
            threes *= parts[:, 16:]
            product = threes.astype(np.float64)
            for half in (4, 2, 1):
                product = product[:, :half] * product[:, half:]
            sums[first : first + step] = np.log(product).sum(axis=(1, 2))
        return np.log(self.size + 1) * self.columns / self.rows - sums / self.rows


class BrierScorer:
    """Quadratic in the mixture, so that scalar products of members are all it needs; one pass for each new one."""

    def __init__(self, members: MemberBlocks, labels: NDArray[np.intp]) -> None:
        count, self.rows, classes = members.shape
        self.members = members
        self.place = np.arange(self.rows) * classes + labels
        self.squares, self.truths = np.empty(count), np.empty(count)
        for member in range(count):
            values = members.one(member)
            _check(values[None], member)
            wide = values.ravel().astype(np.float64)
            self.squares[member] = wide @ wide
            self.truths[member] = wide[self.place].sum()
        self.products: dict[int, Floats] = {}
        self.begin(None, 0)

    def begin(self, total: NDArray[Any] | None, size: float) -> None:
        self.size = float(size)
        self.square, self.truth, self.with_total = 0.0, 0.0, np.zeros(len(self.squares))
        if total is not None:
            wide = np.asarray(total, dtype=np.float64).ravel()
            self.square, self.truth = float(wide @ wide), float(wide[self.place].sum())
            self.with_total = self._products(wide)

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

    def loss(self) -> float:
        return float(self._loss(self.square, self.truth, self.size))

    def _loss(self, squares: Any, truths: Any, size: float) -> Any:
        return (squares / size**2 - 2 * truths / size) / self.rows + 1

    def losses(self, *, all_exact: bool = False) -> Floats:
        squares = self.square + 2 * self.with_total + self.squares
        return self._loss(squares, self.truth + self.truths, self.size + 1)


class VoteScorer:
    """Accuracy and macro F1: only rows whose predicted class depends on the candidate are looked at, exactly.

    With `lowest` and `highest` over all members, a class of a row can win only if total + highest reaches the largest
    total + lowest. A row with one such class is settled for all candidates at once; of the others only those classes
    are read. This leaves out what all members agree on and what is dominated by another class, and more of it with
    every member that is added, because no single one can overturn a lead above 1. Rows where the lowest of one class is
    above the highest of all others are not looked at again.
    """

    SLACK = 1e-9  # of the pool's size: more than what sums in float64 are rounded by

    def __init__(self, members: MemberBlocks, labels: NDArray[np.intp], *, of_counts: Callable[..., Floats]) -> None:
        self.members, self.labels, self.of_counts = members, labels, of_counts
        count, self.rows, self.classes = members.shape
        highest = members.one(0).copy()
        lowest = highest.copy()
        for member in range(count):
            values = members.one(member)
            np.maximum(highest, values, out=highest)
            np.minimum(lowest, values, out=lowest)
        if not _are_proper(lowest.min(), highest.max()):
            for member in range(count):
                _check(members.one(member)[None], member)
        self.bounds = (lowest.T.copy(order="C"), highest.T.copy(order="C"))
        everywhere = np.arange(self.rows)
        self.leaders = lowest.argmax(axis=1)
        highest[everywhere, self.leaders] = -np.inf
        self.leads = lowest[everywhere, self.leaders] - highest.max(axis=1)
        self.support = np.bincount(labels, minlength=self.classes)
        self.kind = np.int16 if self.classes < 2**15 else np.int32  # numbers of classes: the smaller, the faster
        self.begin(None, 0)

    def begin(self, total: NDArray[Any] | None, size: float) -> None:
        self.size = float(size)
        sure = self.leads > 1e-6 + self.SLACK * self.size
        if total is not None:  # it may be no sum of these members
            sure &= total[np.arange(self.rows), self.leaders] >= total.max(axis=1)
        self.play = np.flatnonzero(~sure)
        self.truth = self.labels[self.play]
        self.lowest, self.highest = (np.take(bound, self.play, axis=1) for bound in self.bounds)
        self.total = np.zeros((self.classes, len(self.play)))
        if total is not None:
            self.total += total[self.play].T
        self.predicted = np.bincount(self.leaders[sure], minlength=self.classes)
        self.hits = np.bincount(self.labels[sure & (self.leaders == self.labels)], minlength=self.classes)

    def add(self, member: int) -> None:
        self.total += self.members.one(member)[self.play].T
        self.size += 1

    def loss(self) -> float:
        winners = self.total.argmax(axis=0)
        right = winners[winners == self.truth]
        hits, predicted = (np.bincount(found, minlength=self.classes) for found in (right, winners))
        return float(self.of_counts(self.hits + hits, self.predicted + predicted, self.support))

    def losses(self, *, all_exact: bool = False) -> Floats:
        hits, predicted = (np.tile(table, (self.members.shape[0], 1)) for table in (self.hits, self.predicted))
        for first in range(0, len(self.play), VOTE_ROWS):
            self._count(slice(first, first + VOTE_ROWS), hits, predicted)
        return self.of_counts(hits, predicted, self.support)

    def _count(self, part: slice, hits: NDArray[np.intp], predicted: NDArray[np.intp]) -> None:
        """Add the hits and predictions (M, C) on some of the rows in play, with each member added."""
        total, truth = self.total[:, part], self.truth[part]
        reach = (total + self.lowest[:, part]).max(axis=0) - self.SLACK * (self.size + 1)
        live = total + self.highest[:, part] >= reach
        counts = live.sum(axis=0, dtype=self.kind)
        settled = counts == 1
        predicted += np.count_nonzero(live & settled, axis=1)
        hits += np.bincount(truth[settled & live[truth, np.arange(len(truth))]], minlength=self.classes)
        rows = np.flatnonzero(~settled)
        rows = rows[np.argsort(-counts[rows], kind="stable")]
        slots = _slots(live[:, rows].T, counts[rows])
        places = [self.play[part][rows[: len(classes)]] * self.classes + classes for classes in slots]
        totals = [total[classes, rows[: len(classes)]] for classes in slots]
        for block, values in self.members.blocks(len(rows)):
            winners = np.zeros((len(values), len(rows)), dtype=self.kind)
            best = np.full(winners.shape, -np.inf)
            for classes, place, before in zip(slots, places, totals, strict=True):
                reached = np.take(values, place, axis=1) + before
                far, who = best[:, : len(place)], winners[:, : len(place)]
                # Classes ascend: the winner has the highest number of those that beat all before them.
                np.maximum(who, (reached > far) * classes, out=who)
                np.maximum(far, reached, out=far)
            numbered = winners + np.arange(len(winners))[:, None] * self.classes
            for table, found in ((predicted, numbered.ravel()), (hits, numbered[winners == truth[rows]])):
                table[block] += np.bincount(found, minlength=len(winners) * self.classes).reshape(-1, self.classes)


def _slots(live: NDArray[np.bool_], counts: NDArray[Any]) -> list[NDArray[Any]]:
    """The first, second, ... live class of each row that has so many; rows (n, C) with most live classes first."""
    classes = np.nonzero(live)[1].astype(counts.dtype)
    starts = np.cumsum(counts) - counts
    return [classes[starts[counts > slot] + slot] for slot in range(counts[0] if len(counts) else 0)]


def accuracy_loss(hits: NDArray[np.intp], predicted: NDArray[np.intp], support: NDArray[np.intp]) -> Floats:
    """1 - accuracy (...,) of hits and predictions (..., C) and rows (C,) per class."""
    found: Floats = 1 - hits.sum(axis=-1) / support.sum()
    return found


def f1_loss(hits: NDArray[np.intp], predicted: NDArray[np.intp], support: NDArray[np.intp]) -> Floats:
    """1 - macro F1, to which a class that is neither labelled nor predicted gives 0."""
    found: Floats = 1 - (2 * hits / np.maximum(predicted + support, 1)).mean(axis=-1)
    return found


SCORERS: dict[str, Callable[[MemberBlocks, NDArray[np.intp]], Scorer]] = {
    "log_loss": LogLossScorer,
    "brier": BrierScorer,
    "accuracy": partial(VoteScorer, of_counts=accuracy_loss),
    "f1_macro": partial(VoteScorer, of_counts=f1_loss),
}
