"""Perceptrons on standardised features, trained in one batch; each fit has its own standardisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.numeric.batched_training import BATCH_SIZE, BatchedTraining, BatchShape, Schedule


@dataclass(frozen=True)
class FitRows:
    """The rows of one fit and the standardisation of their features."""

    rows: np.ndarray
    """int64 (n,): indices into the table"""
    centre: np.ndarray
    """float64 (F,): subtracted from the features"""
    scale: np.ndarray
    """float64 (F,): divisor of the centred features"""


def batch_shape(rows: int) -> BatchShape:
    """Return how the rows of a fit are split into batches; fits of equal shape are trained together."""
    return BatchShape.of(rows, max(1, rows // BATCH_SIZE))


class BatchedPerceptrons(BatchedTraining):
    """B perceptrons in training on features, which each fit standardises by its centre and scale."""

    def __init__(
        self,
        table: Tensor,
        labels: Tensor,
        fits: Sequence[FitRows],
        sizes: Sequence[int],
        schedule: Schedule,
        *,
        seed: int,
    ) -> None:
        """Take features float32 (N, F), labels int64 (N,), fits of equal `batch_shape`, and layer widths `sizes`."""
        (shape,) = {batch_shape(len(fit.rows)) for fit in fits}
        super().__init__(table, labels, [fit.rows for fit in fits], [seed] * len(fits), shape, sizes, schedule)
        self.fits = list(fits)
        self.centres = torch.from_numpy(np.stack([fit.centre for fit in fits]).astype(np.float32))[:, None]
        self.factors = torch.from_numpy(np.stack([1 / fit.scale for fit in fits]).astype(np.float32))[:, None]

    def keep(self, numbers: Sequence[int]) -> None:
        """Keep the fits at these indices unchanged, with their state of AdamW, and drop all others."""
        self.fits = [self.fits[number] for number in numbers]
        self.centres, self.factors = self.centres[list(numbers)], self.factors[list(numbers)]
        super().keep(numbers)

    def layers(self, number: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the matrices (in, out) and biases (out,) of one fit on unstandardised features, float32."""
        parts = [part.numpy().astype(np.float64) for part in self.parts(number)]
        matrices, biases = parts[::2], [bias[0] for bias in parts[1::2]]
        fit = self.fits[number]
        matrices[0] /= fit.scale[:, None]
        biases[0] -= fit.centre @ matrices[0]
        return [matrix.astype(np.float32) for matrix in matrices], [bias.astype(np.float32) for bias in biases]

    def _read(self, number: int, values: Tensor, parts: Sequence[Tensor]) -> Tensor:
        return (values - self.centres[number]) * self.factors[number]

    def _forward(self, values: Tensor, parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        return values.sub_(self.centres).mul_(self.factors)
