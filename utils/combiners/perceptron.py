"""A multi-layer perceptron on members' outputs, trained on whole tensors in memory; when to stop is left open.

The models at several epochs of one training are the settings that `utils.numeric.nested_cv` chooses from: early
stopping on rows that are held out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from utils.combiners.stacking_features import FeatureRows, features
from utils.numeric.metrics import softmax
from utils.numeric.nested_cv import evenly_spaced_epochs
from utils.numeric.setting_paths import FIT_THREADS, fits_side_by_side, path_predictions, paths_of_length, torch_threads

if TYPE_CHECKING:
    from utils.numeric.batched_perceptrons import BatchedPerceptrons, FitRows

STOPS = 6
SIDE_BY_SIDE = 3  # fits in one batch: what they read stays in the cache, and there are batches for several cores
WEIGHT_DECAY = 1.0  # of AdamW; less of it let held-out log-loss rise again on digits


@dataclass(frozen=True)
class Layers:
    """A fitted perceptron: affine maps with ReLU between them, for features as they are."""

    kind: str
    """Of the features."""
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
    """One training per kind of features, stopped at several epochs."""

    kinds: tuple[str, ...]
    hidden_dims: tuple[int, ...]
    epochs: int
    lr: float
    dropout: float
    seed: int
    thread_safe: ClassVar[bool] = False  # torch's number of threads is the process's

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Kinds of features by stops."""
        return [{"features": kind, "epochs": stop} for kind in self.kinds for stop in self._stops()]

    def paths(self) -> Sequence[Sequence[int]]:
        """One path per kind."""
        return paths_of_length(len(self.settings()), len(self._stops()))

    def trainings(
        self, path: int, logits: np.ndarray, labels: np.ndarray, held_out_sets: Sequence[np.ndarray]
    ) -> list[tuple[Sequence[int], _Training]]:
        """Trainings of up to `SIDE_BY_SIDE` fits each, which have batches of one shape.

        A fit is trained alone where its bytes could depend on the others.
        """
        from utils.numeric.batched_perceptrons import batch_shape
        from utils.numeric.batched_training import independent_products

        kind = self.kinds[path]
        rows = FeatureRows.of(logits, labels, kind)
        sizes = [rows.raw.shape[1], *self.hidden_dims, rows.classes]
        side_by_side = SIDE_BY_SIDE if independent_products(pairwise(sizes)) else 1
        shapes = [batch_shape(int(np.count_nonzero(~held_out))) for held_out in held_out_sets]
        return [
            (fits, _Training(self, rows, [held_out_sets[fit] for fit in fits], self._stops()))
            for _, fits in fits_side_by_side(shapes, side_by_side)
        ]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Probabilities float32 (G, H, C) of held-out logits (M, H, C) after trainings on logits (M, N, C)."""
        return path_predictions(self, logits, labels, held_out)

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> Layers:
        """The model under one setting: the same schedule, stopped where the setting says."""
        rows = FeatureRows.of(logits, labels, setting["features"])
        with torch_threads(FIT_THREADS):
            training = _Training(self, rows, [np.zeros(len(labels), dtype=bool)], [setting["epochs"]])
            return training.model()

    def _stops(self) -> list[int]:
        return evenly_spaced_epochs(self.epochs, STOPS)


class _Training:
    """Fits that are trained side by side, from one stop to the next."""

    def __init__(
        self, learner: PerceptronLearner, rows: FeatureRows, held_out_sets: Sequence[np.ndarray], stops: Sequence[int]
    ) -> None:
        self.learner, self.rows, self.held_out_sets, self.stops = learner, rows, held_out_sets, list(stops)
        self.batched: BatchedPerceptrons | None = None
        self.fits: list[FitRows] = []
        self.going_on = list(range(len(held_out_sets)))
        """Fits under training"""

    def advance(self, wanted: Sequence[int]) -> list[np.ndarray]:
        batched = self._go_on(wanted)
        return [batched.predict(number, np.flatnonzero(self.held_out_sets[fit])) for number, fit in enumerate(wanted)]

    def model(self) -> Layers:
        """Go on to the next stop with the only fit."""
        (fit,) = self.going_on
        layers = self._go_on([fit]).layers(0)
        return _kept(*layers, self.rows.kind, self.fits[fit].centre, self.fits[fit].scale)

    def _go_on(self, wanted: Sequence[int]) -> BatchedPerceptrons:
        """Train to the next stop with the `wanted` fits alone."""
        batched = self.batched = self.batched or self._started()
        batched.keep([self.going_on.index(fit) for fit in wanted])
        self.going_on = list(wanted)
        batched.run_to(self.stops.pop(0))
        return batched

    def _started(self) -> BatchedPerceptrons:
        import torch

        from utils.numeric.batched_perceptrons import BatchedPerceptrons, FitRows
        from utils.numeric.batched_training import Schedule

        rows, learner = self.rows, self.learner
        inside = [np.flatnonzero(~held_out) for held_out in self.held_out_sets]
        self.fits = [FitRows(each, *rows.standardisation(each)) for each in inside]
        return BatchedPerceptrons(
            torch.from_numpy(rows.raw.astype(np.float32)),
            torch.from_numpy(rows.labels),
            self.fits,
            [rows.raw.shape[1], *learner.hidden_dims, rows.classes],
            Schedule(learner.epochs, learner.lr, WEIGHT_DECAY, learner.dropout),
            seed=learner.seed,
        )


def _kept(
    matrices: Sequence[np.ndarray], biases: Sequence[np.ndarray], kind: str, centre: np.ndarray, scale: np.ndarray
) -> Layers:
    """Layers whose first one takes features as they are, given those of standardised features."""
    first = matrices[0] / scale[:, None]
    matrices, biases = [first, *matrices[1:]], [biases[0] - centre @ first, *biases[1:]]
    return Layers(
        kind,
        tuple(matrix.astype(np.float32) for matrix in matrices),
        tuple(bias.astype(np.float32) for bias in biases),
    )
