"""Selection and convex weights on predictions that do not fit into memory: files per shard of rows and member.

Each pass reads a block of rows of all members and lets it go. What log-loss and Brier score need of the predictions is
small enough to be kept after one pass; accuracy and macro F1 read again those rows whose class the next member could
change. The numbers are those of `utils.candidates` on arrays in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils import engines, pools
from utils.artifacts import open_array
from utils.candidates import Floats, LogLoss, Members, Scorer, Votes, accuracy_loss, f1_loss
from utils.errors import UserError
from utils.metrics import SMALLEST_PROBABILITY, softmax
from utils.selection import Selection, select_scored

BLOCK_BYTES = 2**26  # of the float32 predictions that one job reads
AGAIN = "Write it again"


@dataclass(frozen=True)
class Shards:
    """Members' predictions in files: `files[s][m]` holds (N_s, C) of shard s and member m, memory-mapped when read.

    `logits` says that they are logits, whose soft-max is taken, and no probabilities.
    """

    files: tuple[tuple[Path, ...], ...]
    logits: bool = False

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each shard. Raises UserError where the files of a shard disagree, or shards in members or classes."""
        found = [[open_array(file, remedy=AGAIN).shape for file in shard] for shard in self.files]
        for shard, shapes in zip(self.files, found, strict=True):
            for file, shape in zip(shard, shapes, strict=True):
                expected = (shapes[0][0], found[0][0][1])
                if len(shape) != 2 or shape != expected:
                    raise UserError(f"{file}: found shape {shape}; expected {expected}, as the others have. {AGAIN}")
            if len(shard) != len(self.files[0]):
                raise UserError(f"{shard[0].parent}: found {len(shard)} members; expected {len(self.files[0])}")
        return tuple(shapes[0][0] for shapes in found)

    @property
    def members(self) -> int:
        """M"""
        return len(self.files[0])

    @property
    def rows(self) -> int:
        """N"""
        return sum(self.lengths)

    @cached_property
    def classes(self) -> int:
        """C"""
        return int(open_array(self.files[0][0], remedy=AGAIN).shape[1])

    def blocks(self, chosen: NDArray[np.bool_] | None = None) -> list[Block]:
        """Pieces of the chosen rows (N,), or of all, each within one shard and small enough to be read at once."""
        length = max(1, BLOCK_BYTES // (4 * self.members * self.classes))
        found, first = [], 0
        for shard, rows in enumerate(self.lengths):
            places = np.arange(rows) if chosen is None else np.flatnonzero(chosen[first : first + rows])
            found += [Block(shard, first, places[at : at + length]) for at in range(0, len(places), length)]
            first += rows
        return found

    def read(self, block: Block) -> NDArray[np.float32]:
        """Probabilities (M, n, C) of a block."""
        places: Any = block.places
        if len(places) == places[-1] - places[0] + 1:
            places = slice(int(places[0]), int(places[-1]) + 1)
        parts = [open_array(file, remedy=AGAIN)[places] for file in self.files[block.shard]]
        if self.logits:
            parts = [softmax(part) for part in parts]
        return np.stack(parts).astype(np.float32, copy=False)


@dataclass(frozen=True)
class Block:
    """Some rows of one shard."""

    shard: int
    first: int
    """Number of the shard's first row among all."""
    places: NDArray[np.intp]
    """Rows within the shard, ascending."""

    @property
    def rows(self) -> NDArray[np.intp]:
        """Numbers (n,) among all rows."""
        return self.first + self.places


def select_in_blocks(
    shards: Shards, labels: NDArray[Any], *, metric: str, tie_breaker: str | None = None, **options: Any
) -> Selection:
    """`selection.select` on shards with labels (N,): the same members and losses, by reading blocks of rows.

    `options` are steps, sorted_start, bags, bag_share, tries and seed. Memory: (M, N) float32 for log-loss, (M, M) for
    the Brier score, 12 bytes a row for accuracy and macro F1. UserError for what cannot be scored.
    """
    _check(shards, labels, metric)
    scorers = [SCORERS[name](shards, labels.astype(np.intp)) for name in (metric, tie_breaker) if name]
    return select_scored(scorers, shards.members, **options)


def linear_weights(shards: Shards, labels: NDArray[Any], *, metric: str = "log_loss", **options: Any) -> pools.Solution:
    """Weights of the mixture of least log-loss or Brier score, as `pools.linear` and `pools.linear_brier` find them."""
    _check(shards, labels, metric)
    if metric == "log_loss":
        return pools.linear(of_truth(shards, labels.astype(np.intp)), **options)
    products, truths = _products(shards, labels.astype(np.intp))
    return pools.minimise(_Quadratic(products, truths), **options)


def of_truth(shards: Shards, labels: NDArray[np.intp]) -> NDArray[np.float32]:
    """Each member's probability of the true class, (M, N): one pass."""
    found = np.empty((shards.members, shards.rows), dtype=np.float32)
    blocks = shards.blocks()
    for block, values in zip(blocks, _each(_of_truth, blocks, shards, labels), strict=True):
        found[:, block.rows] = values
    return found


def _of_truth(shards: Shards, labels: NDArray[np.intp], block: Block) -> NDArray[np.float32]:
    found: NDArray[np.float32] = _proper(shards, block)[:, np.arange(len(block.places)), labels[block.rows]]
    return found


def _products(shards: Shards, labels: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Scalar products (M, M) of members over rows and classes, and sums (M,) of their probabilities of the truth."""
    products, truths = np.zeros((shards.members, shards.members)), np.zeros(shards.members)
    for own, true in _each(_products_of_block, shards.blocks(), shards, labels):
        products += own
        truths += true
    return products / shards.rows, truths / shards.rows


def _products_of_block(shards: Shards, labels: NDArray[np.intp], block: Block) -> tuple[Floats, Floats]:
    values = _proper(shards, block).astype(np.float64)
    flat = values.reshape(len(values), -1)
    return flat @ flat.T, values[:, np.arange(len(block.places)), labels[block.rows]].sum(axis=1)


class TruthsInBlocks(LogLoss):
    """Log-loss by each member's probability of the true class, which is kept."""

    def __init__(self, shards: Shards, labels: NDArray[np.intp]) -> None:
        self.rows = shards.rows
        self.columns = -(-self.rows // self.FACTORS) * self.FACTORS
        self.of_truth = np.ones((shards.members, self.columns), dtype=np.float32)
        self.of_truth[:, : self.rows] = of_truth(shards, labels)
        self.clips = bool(self.of_truth.min() < SMALLEST_PROBABILITY)
        self.begin(None, 0)


class ProductsInBlocks:
    """Brier score by the members' scalar products, which are kept."""

    def __init__(self, shards: Shards, labels: NDArray[np.intp]) -> None:
        self.products, self.truths = _products(shards, labels)
        self.begin(None, 0)

    def begin(self, total: NDArray[Any] | None, size: float) -> None:
        """An empty pool; there is no other here."""
        self.counts = np.zeros(len(self.truths))

    def add(self, member: int) -> None:
        """One more of this member."""
        self.counts[member] += 1

    def loss(self) -> float:
        """Of the pool."""
        weights = self.counts / self.counts.sum()
        return float(weights @ self.products @ weights - 2 * self.truths @ weights + 1)

    def losses(self, *, all_exact: bool = False) -> Floats:
        """(M,) with each member added."""
        size, with_pool = self.counts.sum() + 1, self.products @ self.counts
        squares = self.counts @ with_pool + 2 * with_pool + np.diag(self.products)
        found: Floats = squares / size**2 - 2 * (self.truths @ self.counts + self.truths) / size + 1
        return found


class VotesInBlocks:
    """Accuracy and macro F1; a row is read again only where one more member could change its class.

    The lead of a row's first class over the second falls by at most 1 with each member that is added.
    """

    SURE = 1 + 1e-6

    def __init__(self, shards: Shards, labels: NDArray[np.intp], *, of_counts: Callable[..., Floats]) -> None:
        self.shards, self.labels, self.of_counts = shards, labels, of_counts
        self.support = np.bincount(labels, minlength=shards.classes)
        self.begin(None, 0)

    def begin(self, total: NDArray[Any] | None, size: float) -> None:
        """An empty pool; there is no other here."""
        self.counts = np.zeros(self.shards.members)
        self.winners = np.zeros(self.shards.rows, dtype=np.int32)
        self.leads = np.zeros(self.shards.rows)

    def add(self, member: int) -> None:
        """One more of this member."""
        self.counts[member] += 1
        self.leads -= 1

    def loss(self) -> float:
        """Of the pool."""
        self._look(self.leads <= 1e-6, candidates=False)
        hits, predicted = self._settled(slice(None))
        return float(self.of_counts(hits, predicted, self.support))

    def losses(self, *, all_exact: bool = False) -> Floats:
        """(M,) with each member added."""
        read = self.leads <= self.SURE
        hits, predicted = self._look(read, candidates=True)
        own_hits, own_predicted = self._settled(~read)
        return self.of_counts(hits + own_hits, predicted + own_predicted, self.support)

    def _settled(self, rows: Any) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        winners, labels = self.winners[rows], self.labels[rows]
        right = winners[winners == labels]
        hits, predicted = (np.bincount(found, minlength=self.shards.classes) for found in (right, winners))
        return hits, predicted

    def _look(self, rows: NDArray[np.bool_], *, candidates: bool) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Read these rows: their winners and leads now; hits and predictions (M, C) with each member added."""
        hits, predicted = (np.zeros((self.shards.members, self.shards.classes), dtype=np.intp) for _ in range(2))
        blocks = self.shards.blocks(rows)
        answers = _each(_votes_of_block, blocks, self.shards, self.labels, self.counts, candidates)
        for block, (winners, leads, own_hits, own_predicted) in zip(blocks, answers, strict=True):
            self.winners[block.rows], self.leads[block.rows] = winners, leads
            hits += own_hits
            predicted += own_predicted
        return hits, predicted


def _votes_of_block(
    shards: Shards, labels: NDArray[np.intp], counts: Floats, candidates: bool, block: Block
) -> tuple[Any, Any, Any, Any]:
    values = _proper(shards, block)
    total = np.zeros(values.shape[1:])
    for member in np.flatnonzero(counts):
        total += counts[member] * values[member]
    winners = total.argmax(axis=1)
    ends = np.partition(total, -2, axis=1)[:, -2:] if total.shape[1] > 1 else np.zeros((len(total), 2))
    leads = ends[:, 1] - ends[:, 0]
    if not candidates:
        return winners, leads, 0, 0
    votes = Votes(Members(values), labels[block.rows], of_counts=lambda *found: found[:2])
    votes.begin(total if counts.any() else None, float(counts.sum()))
    hits, predicted = votes.losses()
    return winners, leads, hits, predicted


class _Quadratic:
    """Brier score of a mixture by products of members, for weights that sum to 1."""

    def __init__(self, products: Floats, truths: Floats) -> None:
        self.members = len(truths)
        self.products = products - truths[:, None] - truths[None, :] + 1
        self.twins = np.arange(self.members)

    def value(self, weights: Floats) -> float:
        return float(weights @ self.products @ weights)

    def derivatives(self, weights: Floats) -> tuple[float, Floats, Floats]:
        half = self.products @ weights
        return float(weights @ half), 2 * half, 2 * self.products


def _each(function: Callable[..., Any], blocks: Sequence[Block], *shared: Any) -> Any:
    return engines.current().each(function, blocks, shared=shared, side_by_side=engines.cores(), threads=1)


def _proper(shards: Shards, block: Block) -> NDArray[np.float32]:
    values = shards.read(block)
    if not (values.min() >= -1e-6 and values.max() <= 1 + 1e-3):  # NaN is neither
        at = shards.files[block.shard][0].parent
        raise UserError(f"{at}: found numbers from {values.min()} to {values.max()}; expected probabilities. {AGAIN}")
    return values


def _check(shards: Shards, labels: NDArray[Any], metric: str) -> None:
    if metric not in SCORERS:
        raise UserError(f"metric: found {metric}; expected one of {', '.join(SCORERS)}")
    if labels.shape != (shards.rows,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"labels: found {labels.dtype} of shape {labels.shape}; expected integers of shape ({shards.rows},)"
        )
    if labels.min() < 0 or labels.max() >= shards.classes:
        raise UserError(f"labels: found {labels.min()}..{labels.max()}; expected 0..{shards.classes - 1}")


SCORERS: dict[str, Callable[[Shards, NDArray[np.intp]], Scorer]] = {
    "log_loss": TruthsInBlocks,
    "brier": ProductsInBlocks,
    "accuracy": partial(VotesInBlocks, of_counts=accuracy_loss),
    "f1_macro": partial(VotesInBlocks, of_counts=f1_loss),
}
