"""Training of fusion heads on blocks of embeddings in memory, for several ranks and numbers of epochs.

The heads at several epochs of one training are settings that `utils.numeric.nested_cv` selects from: early stopping on
held-out rows, and never on rows that a cross-fitted copy predicts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from utils.combiners.trained_heads import HeadShape, TrainedHeads
from utils.core.errors import UserError
from utils.networks.memory import out_of_memory
from utils.numeric.nested_cv import evenly_spaced_epochs
from utils.numeric.setting_paths import (
    FIT_THREADS,
    BatchedFits,
    fits_side_by_side,
    joined_path_predictions,
    paths_of_length,
    torch_threads,
)
from utils.predictions.rows import MemberOutputs

if TYPE_CHECKING:
    from torch import Tensor

    from utils.combiners.batched_heads import BatchedHeads
    from utils.numeric.batched_training import BatchShape

logger = logging.getLogger("disease_pipeline")

STOPS = 6  # epochs that are settings
WEIGHT_DECAY = 1.0  # of AdamW, as in utils/combiners/perceptron.py
RANKS = (16, 64)  # of bilinear products
STEPS, SMALLEST_BATCH = 16, 16  # at least 16 steps per epoch, unless batches would have fewer than 16 rows
SIDE_BY_SIDE = 5  # most fits that are trained together
MOST_NUMBERS = 2**18  # most parameters of the heads that are trained together


@dataclass(frozen=True)
class HeadLearner:
    """One training per rank and seed, evaluated at several epochs."""

    method: str
    hidden: tuple[int, ...]
    epochs: int
    lr: float
    dropout: float
    label_smoothing: float
    seeds: int
    seed: int
    thread_safe: ClassVar[bool] = False  # torch's number of threads is global to the process

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Return the settings: ranks times epochs, the cheapest first."""
        return [{"rank": rank, "epochs": stop} for rank in self._ranks() for stop in self._stops()]

    def paths(self) -> Sequence[Sequence[int]]:
        """Return one path per rank."""
        return paths_of_length(len(self.settings()), len(self._stops()))

    def trainings(
        self, path: int, outputs: MemberOutputs, labels: np.ndarray, held_out_sets: Sequence[np.ndarray]
    ) -> list[tuple[Sequence[int], _Training]]:
        """Return trainings of fits with equal batch shapes, as many together as fit the processor's cache."""
        from utils.combiners.batched_heads import BATCHED

        shape = self._shape(outputs, self._ranks()[path])
        table, truth = _tensors(outputs, labels)
        heads = BATCHED[self.method]
        most = min(SIDE_BY_SIDE, MOST_NUMBERS // heads.numbers(shape)) if heads.are_independent(shape) else 1
        shapes = [_batches(int(np.count_nonzero(~held_out))) for held_out in held_out_sets]
        return [
            (fits, _Training(self, shape, batches, table, truth, [held_out_sets[fit] for fit in fits], self._stops()))
            for batches, fits in fits_side_by_side(shapes, max(1, most // self.seeds))
        ]

    def predictions(self, outputs: MemberOutputs, labels: np.ndarray, held_out: MemberOutputs) -> np.ndarray:
        """Return probabilities float32 (G, H, C) of `held_out` (M, H, C) after training on `outputs` (M, N, C)."""
        pairs = zip(outputs.embeddings, held_out.embeddings, strict=True)
        joined = MemberOutputs(
            np.concatenate([outputs.logits, held_out.logits], axis=1), tuple(np.concatenate(pair) for pair in pairs)
        )
        return joined_path_predictions(self, joined, labels)

    def fit(self, outputs: MemberOutputs, labels: np.ndarray, setting: Mapping[str, Any]) -> TrainedHeads:
        """Return the heads of all seeds under one setting: the same schedule, stopped at the setting's epoch."""
        shape = self._shape(outputs, setting["rank"])
        table, truth = _tensors(outputs, labels)
        batches = _batches(len(labels))
        held_out = np.zeros(len(labels), dtype=bool)
        with torch_threads(FIT_THREADS):
            training = _Training(self, shape, batches, table, truth, [held_out], [setting["epochs"]])
            return training.heads()

    def all_seeds(self) -> range:
        """Return the seeds of the heads whose probabilities are averaged."""
        return range(self.seed, self.seed + self.seeds)

    def _ranks(self) -> tuple[int, ...]:
        return RANKS if self.method == "bilinear" else (0,)

    def _stops(self) -> list[int]:
        return evenly_spaced_epochs(self.epochs, STOPS)

    def _shape(self, outputs: MemberOutputs, rank: int) -> HeadShape:
        widths = tuple(embedding.shape[1] for embedding in outputs.embeddings)
        return HeadShape(self.method, widths, self.hidden, outputs.shape[2], rank)


class _Training(BatchedFits["BatchedHeads"]):
    """Heads of some fits and of all seeds, trained together from one stop to the next.

    If memory runs out, the training restarts with half the batch size.
    """

    def __init__(
        self,
        learner: HeadLearner,
        shape: HeadShape,
        batches: BatchShape,
        table: Tensor,
        labels: Tensor,
        held_out_sets: Sequence[np.ndarray],
        stops: Sequence[int],
    ) -> None:
        super().__init__(self._started, held_out_sets, stops, networks_per_fit=learner.seeds)
        self.learner, self.shape, self.batches, self.table, self.labels = learner, shape, batches, table, labels

    def heads(self) -> TrainedHeads:
        """Train the only fit to the next stop and return its heads."""
        networks = self.advanced(self.going_on)
        return TrainedHeads(self.shape, tuple(networks.weights(number) for number in self.numbers(0)))

    def advanced(self, wanted: Sequence[int]) -> BatchedHeads:
        """Return the heads of the `wanted` fits at the next stop, and drop those of the others."""
        while True:
            try:
                return super().advanced(wanted)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self.networks = None
                self._halve_batches(error)

    def _started(self, inside: Sequence[np.ndarray]) -> BatchedHeads:
        from utils.combiners.batched_heads import BATCHED
        from utils.numeric.batched_training import Schedule

        learner, seeds = self.learner, self.learner.all_seeds()
        return BATCHED[learner.method](
            self.shape,
            self.table,
            self.labels,
            [rows for rows in inside for _ in seeds],
            [seed for _ in inside for seed in seeds],
            self.batches,
            Schedule(learner.epochs, learner.lr, WEIGHT_DECAY, learner.dropout, learner.label_smoothing),
        )

    def _halve_batches(self, error: BaseException) -> None:
        from utils.numeric.batched_training import BatchShape

        method = self.learner.method
        rows = [int(np.count_nonzero(~self.held_out_sets[fit])) for fit in self.going_on]
        if self.batches.n_batches >= min(rows):
            raise UserError(
                f"fusion_{method}: out of memory with one row at a time. Free memory, or make "
                "runs.fusion.fusion_config.hidden_dims smaller"
            ) from error
        n_batches = min(2 * self.batches.n_batches, min(rows))
        self.batches = BatchShape.of(max(rows), n_batches)
        logger.warning("fusion_%s: out of memory; going on with %d rows at a time", method, -(-max(rows) // n_batches))


def _tensors(outputs: MemberOutputs, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the concatenated blocks float32 (N, W) and the labels int64 (N,)."""
    import torch

    return torch.from_numpy(np.concatenate(outputs.embeddings, axis=1)), torch.from_numpy(np.array(labels))


def _batches(rows: int) -> BatchShape:
    """Return how the rows of a fit are split into batches."""
    from utils.numeric.batched_training import BATCH_SIZE, BatchShape

    batch_size = min(BATCH_SIZE, max(SMALLEST_BATCH, rows // STEPS))
    return BatchShape.of(rows, max(1, rows // batch_size))
