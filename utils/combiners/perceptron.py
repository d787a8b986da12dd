"""A multi-layer perceptron on members' outputs, trained on tensors in memory for several numbers of epochs.

The models at several epochs of one training are the settings that `utils.numeric.nested_cv` selects from: early
stopping on held-out rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from utils.combiners.fit_demand import FitDemand
from utils.combiners.stacking_features import FeatureRows, features
from utils.numeric.metrics import softmax
from utils.numeric.nested_cv import evenly_spaced_epochs
from utils.numeric.setting_paths import BatchedFits, path_predictions, paths_of_length, trained_on_all

if TYPE_CHECKING:
    from utils.numeric.batched_perceptrons import BatchedPerceptrons

STOPS = 6  # epochs that are settings
SIDE_BY_SIDE = 3  # most fits trained together: their rows stay in the cache, and several cores have work
FLOPS = 3e10  # operations per second in products of matrices of float32, on one core
TRAINED_SHARE = 0.25  # of all kinds and epochs: the search leaves most of them out (measured: 0.19 and 0.26)
WEIGHT_DECAY = 1.0  # of AdamW; with less, the held-out log-loss rose again on digits


@dataclass(frozen=True)
class Layers:
    """A fitted perceptron on unstandardised features: linear layers with ReLU between them."""

    kind: str
    """Kind of the features."""
    matrices: tuple[np.ndarray, ...]
    """float32 (in, out) each"""
    biases: tuple[np.ndarray, ...]
    """float32 (out,) each"""

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        values = features(logits, self.kind)
        for index, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            values = (np.maximum(values, 0) if index else values) @ matrix.astype(np.float64) + bias
        return softmax(values)


@dataclass(frozen=True)
class PerceptronLearner:
    """One training per kind of features, evaluated at several epochs."""

    kinds: tuple[str, ...]
    hidden_dims: tuple[int, ...]
    epochs: int
    lr: float
    dropout: float
    seed: int
    thread_safe: ClassVar[bool] = False  # torch's number of threads is global to the process

    def demand(self, members: int, rows: int, classes: int) -> FitDemand:
        """Return memory and time of a fit: weights, gradients and moments; three products per row and epoch."""
        sizes = [members * classes, *self.hidden_dims, classes]
        weights = sum(width * wider for width, wider in pairwise(sizes))
        seconds = TRAINED_SHARE * len(self.kinds) * self.epochs * rows * 6 * weights / FLOPS
        return FitDemand(16.0 * SIDE_BY_SIDE * weights + 24.0 * rows * members * classes, seconds)

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Return the settings: kinds of features times epochs."""
        return [{"features": kind, "epochs": stop} for kind in self.kinds for stop in self._stops()]

    def paths(self) -> Sequence[Sequence[int]]:
        """Return one path per kind."""
        return paths_of_length(len(self.settings()), len(self._stops()))

    def trainings(
        self, path: int, logits: np.ndarray, labels: np.ndarray, held_out_sets: Sequence[np.ndarray]
    ) -> list[tuple[Sequence[int], BatchedFits]]:
        """Return trainings of up to `SIDE_BY_SIDE` fits each, with equal batch shapes.

        Fits are trained alone where their bytes could depend on the others.
        """
        from utils.numeric.batched_perceptrons import batch_shape
        from utils.numeric.batched_training import independent_products

        kind = self.kinds[path]
        rows = FeatureRows.of(logits, labels, kind)
        sizes = [rows.raw.shape[1], *self.hidden_dims, rows.classes]
        side_by_side = SIDE_BY_SIDE if independent_products(pairwise(sizes)) else 1
        shapes = [batch_shape(int(np.count_nonzero(~held_out))) for held_out in held_out_sets]
        return BatchedFits.grouped(partial(self._started, rows), held_out_sets, self._stops(), shapes, side_by_side)

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Return probabilities float32 (G, H, C) of held-out logits (M, H, C) after training on logits (M, N, C)."""
        return path_predictions(self, logits, labels, held_out)

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> Layers:
        """Return the model under one setting: the same schedule, stopped at the setting's epoch."""
        rows = FeatureRows.of(logits, labels, setting["features"])
        trained = trained_on_all(partial(self._started, rows), len(labels), setting["epochs"])
        matrices, biases = trained.layers(0)
        return Layers(rows.kind, tuple(matrices), tuple(biases))

    def _stops(self) -> list[int]:
        return evenly_spaced_epochs(self.epochs, STOPS)

    def _started(self, rows: FeatureRows, inside: Sequence[np.ndarray]) -> BatchedPerceptrons:
        """Return perceptrons to train, each on the rows `inside`, int64 (n,)."""
        import torch

        from utils.numeric.batched_perceptrons import BatchedPerceptrons, FitRows
        from utils.numeric.batched_training import Schedule

        return BatchedPerceptrons(
            torch.from_numpy(rows.single_precision),
            torch.from_numpy(rows.labels),
            [FitRows(indices, *rows.standardisation(indices)) for indices in inside],
            [rows.raw.shape[1], *self.hidden_dims, rows.classes],
            Schedule(self.epochs, self.lr, WEIGHT_DECAY, self.dropout),
            seed=self.seed,
        )
