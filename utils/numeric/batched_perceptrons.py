"""Perceptrons of one shape, trained side by side on rows of one table as products of three-dimensional tensors.

Fits of a nested search are small: much of their time goes into starting operations. One operation for several of them
costs hardly more than for one. Each fit has its own rows, standardisation, initial weights, order of rows and dropout,
drawn from generators of its own, so that its bytes do not depend on the fits beside it. AdamW (Loshchilov and Hutter
2019) with a cosine schedule and dropout (Srivastava et al. 2014); the gradients are written out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from utils.numeric.module_training import BATCH_SIZE

RANDOM_VALUES = 2**16  # that a number takes which decides whether a unit is dropped
BYTES_PER_DRAW = 8  # of the generator
FILLED = 4  # a batch's rows are filled up to a multiple of it
VECTOR = 64  # numbers, a multiple of what any processor treats at once


@dataclass(frozen=True)
class FitRows:
    """The rows of one fit and their standardisation."""

    rows: np.ndarray
    """int64 (n,): indices into the table"""
    centre: np.ndarray
    """float64 (F,)"""
    scale: np.ndarray
    """float64 (F,)"""


def batch_shape(rows: int) -> tuple[int, int]:
    """Number of batches of an epoch, and rows of the largest, filled up; fits of equal shape are trained side by side.

    It depends on the fit alone, since the number of rows that are summed over may decide about the last bit.
    """
    n_batches = max(1, rows // BATCH_SIZE)
    return n_batches, -(-rows // (n_batches * FILLED)) * FILLED


class BatchedPerceptrons:
    """B perceptrons under training; affine maps with ReLU and dropout between them, cross-entropy at the end.

    `run_to` goes on to an epoch. `layers` are matrices (in, out) and biases (out,) of standardised features.
    """

    def __init__(
        self,
        table: Tensor,
        labels: Tensor,
        fits: Sequence[FitRows],
        sizes: Sequence[int],
        *,
        dropout: float,
        epochs: int,
        lr: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        """Take features float32 (N, F), labels int64 (N,), and fits of equal `batch_shape`; widths in `sizes`."""
        self.table, self.labels, self.epochs, self.lr = table, labels, epochs, lr
        self.threshold = round(dropout * RANDOM_VALUES)
        self.kept_share = 1 - self.threshold / RANDOM_VALUES
        self.weight_decay = weight_decay
        ((self.n_batches, self.width),) = {batch_shape(len(fit.rows)) for fit in fits}
        self.rows = [torch.from_numpy(fit.rows) for fit in fits]
        self.centres = torch.from_numpy(np.stack([fit.centre for fit in fits]).astype(np.float32))[:, None]
        self.factors = torch.from_numpy(np.stack([1 / fit.scale for fit in fits]).astype(np.float32))[:, None]
        self.generators = [torch.Generator().manual_seed(seed) for _ in fits]
        # Torch's own draws of dropout would take a third of the training.
        self.noise = [np.random.SFC64(seed) for _ in fits]
        self.shapes = [shape for pair in pairwise(sizes) for shape in (pair, (1, pair[1]))]
        """Of the matrices (in, out) and biases (1, out), by turns"""
        self.values = torch.stack([_initial_values(sizes, generator) for generator in self.generators])
        """Float32 (B, P): a fit's numbers end at a multiple of `VECTOR`, as no vector is to hold those of two"""
        self.optimizer = self._new_optimizer()
        self.epoch = self.step = 0

    def run_to(self, epoch: int) -> None:
        """Train until the end of an epoch."""
        while self.epoch < epoch:
            indices, divisors, sizes = self._epoch_rows()
            for number in range(self.n_batches):
                self._train_step(indices[:, number], divisors[:, number], [each[number] for each in sizes])
            self.epoch += 1

    def keep(self, numbers: Sequence[int]) -> None:
        """Leave out all fits but those at these places; the others stay as they are, with the state of AdamW."""
        if len(numbers) == len(self.rows):
            return
        chosen = torch.tensor(list(numbers))
        state = self.optimizer.state[self.values]
        self.values = self.values[chosen]
        self.optimizer = self._new_optimizer()
        if state:
            moments = {name: state[name][chosen] for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[self.values] = moments | {"step": state["step"]}
        self.centres, self.factors = self.centres[chosen], self.factors[chosen]
        self.rows = [self.rows[number] for number in numbers]
        self.generators = [self.generators[number] for number in numbers]
        self.noise = [self.noise[number] for number in numbers]

    def layers(self, number: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """A copy of the matrices (in, out) and biases (out,) of one fit, float64."""
        parts = [part[number].numpy().astype(np.float64) for part in self._parts(self.values)]
        return parts[::2], [bias[0] for bias in parts[1::2]]

    def predict(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Probabilities float32 (n, C) by one fit of rows of the table, int64 (n,)."""
        values = (self.table[torch.from_numpy(rows)] - self.centres[number]) * self.factors[number]
        parts = [part[number] for part in self._parts(self.values)]
        for place in range(0, len(parts), 2):
            values = torch.addmm(parts[place + 1], values.relu_() if place else values, parts[place])
        return torch.softmax(values, dim=1).numpy()

    def _parts(self, values: Tensor) -> list[Tensor]:
        """Views of matrices (B, in, out) and biases (B, 1, out), by turns, of values (B, P)."""
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = values[:, : sum(sizes)].split(sizes, dim=1)
        return [part.view(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def _new_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW([self.values], lr=self.lr, weight_decay=self.weight_decay, fused=True)

    def _epoch_rows(self) -> tuple[Tensor, Tensor, list[list[int]]]:
        """Indices (B, S, n) and divisors (B, S, n) of each batch's rows, and how many there are of each fit and batch.

        Batches of a fit differ by at most one row. Rows that fill a batch up have the divisor 0.
        """
        counts = [[len(part) for part in torch.arange(len(rows)).tensor_split(self.n_batches)] for rows in self.rows]
        indices = torch.zeros(len(self.rows), self.n_batches, self.width, dtype=torch.int64)
        divisors = torch.zeros(indices.shape)
        for number, (rows, generator) in enumerate(zip(self.rows, self.generators, strict=True)):
            order = torch.randperm(len(rows), generator=generator)
            size = torch.tensor(counts[number])
            inside = torch.arange(self.width)[None] < size[:, None]
            indices[number][inside] = rows[order]
            divisors[number] = inside / size[:, None]
        return indices, divisors, counts

    def _train_step(self, indices: Tensor, divisors: Tensor, counts: Sequence[int]) -> None:
        """One step of AdamW on batches of `indices` (B, n) whose gradients have the `divisors` (B, n)."""
        fits, width = indices.shape
        values = self.table.index_select(0, indices.reshape(-1)).view(fits, width, -1)
        inputs = [values.sub_(self.centres).mul_(self.factors)]
        parts = self._parts(self.values)
        matrices, biases = parts[::2], parts[1::2]
        for place, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
            scores = torch.baddbmm(bias, inputs[-1], matrix)
            if place < len(matrices) - 1:
                inputs.append(self._drop(scores.relu_(), counts))
        gradient = torch.softmax(scores, dim=2)
        truth = self.labels[indices].unsqueeze(2)
        gradient.scatter_add_(2, truth, torch.full(truth.shape, -1.0)).mul_(divisors.unsqueeze(2))
        self.values.grad = torch.zeros_like(self.values)
        slopes = self._parts(self.values.grad)
        for place in reversed(range(len(matrices))):
            slopes[2 * place].copy_(torch.bmm(inputs[place].transpose(1, 2), gradient))
            torch.sum(gradient, dim=1, keepdim=True, out=slopes[2 * place + 1])
            if place:
                gradient = torch.bmm(gradient, matrices[place].transpose(1, 2))
                # What is positive was neither cut off by ReLU nor dropped.
                gradient = torch.ops.aten.threshold_backward(gradient, inputs[place], 0).div_(self.kept_share)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * (1 + math.cos(math.pi * self.step / (self.epochs * self.n_batches))) / 2
        self.optimizer.step()
        self.step += 1

    def _drop(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """Dropout of values (B, n, H) in place; every fit draws numbers for as many rows as it has."""
        if not self.threshold:
            return values
        numbers = np.zeros(values.shape, dtype=np.int16)
        for of_fit, count, noise in zip(numbers, counts, self.noise, strict=True):
            size = count * values.shape[2]
            drawn = noise.random_raw(-(-size * numbers.itemsize // BYTES_PER_DRAW)).view(np.int16)[:size]
            of_fit[:count] = drawn.reshape(count, -1)
        kept = torch.from_numpy(numbers) >= self.threshold - RANDOM_VALUES // 2
        return values.mul_(kept).div_(self.kept_share)


def _initial_values(sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    """Matrices (in, out) and biases (out,) by turns, as `torch.nn.Linear` draws them, flat and filled up with zeros."""
    parts = []
    for width, wider in pairwise(sizes):
        matrix = torch.empty(wider, width)
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
        bound = 1 / math.sqrt(width)
        parts += [matrix.T.reshape(-1), torch.empty(wider).uniform_(-bound, bound, generator=generator)]
    values = torch.cat(parts)
    return nn.functional.pad(values, (0, -len(values) % VECTOR))
