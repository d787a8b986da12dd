"""Learners of gates: one training of each fit's gate, evaluated at several epochs.

A gate's features are log-probabilities, which are out-of-sample on every row, and not embeddings, which are
out-of-sample on val rows only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from utils.combiners.gates import KIND, AttentionGate, ExpertChoice, SparseGate
from utils.combiners.stacking_features import FeatureRows
from utils.numeric.metrics import softmax
from utils.numeric.nested_cv import evenly_spaced_epochs
from utils.numeric.setting_paths import BatchedFits, path_predictions, trained_on_all

if TYPE_CHECKING:
    from utils.combiners.batched_gates import BatchedGates

ATTENTION_STOPS, SPARSE_STOPS = 6, 5
LEARNING_RATE = 0.003  # of sparse gates; attention gates use the configured one
WEIGHT_DECAY = 1.0  # of AdamW, as in utils/combiners/perceptron.py
SIDE_BY_SIDE = 5  # most gates trained together


class GateLearner(ABC):
    """One training of a gate, evaluated at several epochs: the only path of settings."""

    thread_safe: ClassVar[bool] = False  # torch's number of threads is global to the process
    width: int

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Return the settings, the fewest epochs first; 0 epochs stands for the same experts for every image."""
        return [{"epochs": stop} for stop in self._stops()]

    def paths(self) -> Sequence[Sequence[int]]:
        """Return the only path."""
        return [range(len(self._stops()))]

    def trainings(
        self, path: int, logits: np.ndarray, labels: np.ndarray, held_out_sets: Sequence[np.ndarray]
    ) -> list[tuple[Sequence[int], BatchedFits]]:
        """Return trainings of up to `SIDE_BY_SIDE` gates each, with equal batch shapes.

        Gates are trained alone where their bytes could depend on the others.
        """
        from utils.numeric.batched_perceptrons import batch_shape
        from utils.numeric.batched_training import FILLED

        start = self._starter(logits, labels)
        side_by_side = SIDE_BY_SIDE if self.width % FILLED == 0 and len(logits) > 1 else 1
        shapes = [batch_shape(int(np.count_nonzero(~held_out))) for held_out in held_out_sets]
        return BatchedFits.grouped(start, held_out_sets, self._stops(), shapes, side_by_side)

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Return probabilities float32 (G, H, C) of held-out logits (M, H, C) after training on logits (M, N, C)."""
        return path_predictions(self, logits, labels, held_out)

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> AttentionGate | SparseGate:
        """Return the gate under one setting: the same schedule, stopped at the setting's epoch."""
        return trained_on_all(self._starter(logits, labels), len(labels), setting["epochs"]).gate(0)

    @abstractmethod
    def _stops(self) -> list[int]:
        """Return the epochs that are settings."""

    @abstractmethod
    def _starter(self, logits: np.ndarray, labels: np.ndarray) -> Callable[[Sequence[np.ndarray]], BatchedGates]:
        """Return a function from the rows of each fit, int64 (n,), to gates to train, on logits (M, N, C)."""


@dataclass(frozen=True)
class AttentionLearner(GateLearner):
    """Gates over all inputs, with one hidden layer of `width` units."""

    width: int
    epochs: int
    lr: float
    seed: int

    def _stops(self) -> list[int]:
        return evenly_spaced_epochs(self.epochs, ATTENTION_STOPS)

    def _starter(self, logits: np.ndarray, labels: np.ndarray) -> Callable[[Sequence[np.ndarray]], BatchedGates]:
        from utils.combiners.batched_gates import BatchedAttentionGates
        from utils.numeric.batched_training import Schedule

        rows, probabilities = FeatureRows.of(logits, labels, KIND), softmax(logits)
        schedule = Schedule(self.epochs, self.lr, WEIGHT_DECAY)
        return lambda inside: BatchedAttentionGates(rows, probabilities, inside, self.width, schedule, self.seed)


@dataclass(frozen=True)
class SparseLearner(GateLearner):
    """Selection of the experts on the rows of a fit, and gates over them with one hidden layer of `width` units."""

    choose: Callable[[np.ndarray, np.ndarray], Sequence[int]]
    """Logits (M, N, C), labels (N,) -> indices of the experts, the best first; their number depends on M alone."""
    top_k: int
    width: int
    epochs: int
    seed: int
    fixed: bool = True
    """Whether the settings include the first `top_k` experts for every image, without a gate."""
    costs: np.ndarray | None = None
    """float64 (M,): cost of running a member, in any unit; None if costs are unknown"""

    def choice(self, logits: np.ndarray, labels: np.ndarray) -> ExpertChoice:
        """Return the experts of a fit on logits (M, N, C) and labels (N,), and which of them the gate reads."""
        experts = np.array(self.choose(logits, labels), dtype=np.int64)
        return ExpertChoice(experts, 0 if self.costs is None else int(np.argmin(self.costs[experts])))

    def _stops(self) -> list[int]:
        return [*([0] if self.fixed else []), *evenly_spaced_epochs(self.epochs, SPARSE_STOPS)]

    def _starter(self, logits: np.ndarray, labels: np.ndarray) -> Callable[[Sequence[np.ndarray]], BatchedGates]:
        from utils.combiners.batched_gates import BatchedSparseGates
        from utils.numeric.batched_training import Schedule

        schedule = Schedule(self.epochs, LEARNING_RATE, WEIGHT_DECAY)

        def start(inside: Sequence[np.ndarray]) -> BatchedGates:
            choices = [self.choice(logits[:, rows], labels[rows]) for rows in inside]
            return BatchedSparseGates(logits, labels, inside, choices, self.top_k, self.width, schedule, self.seed)

        return start
