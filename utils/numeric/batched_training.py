"""Networks of one shape, trained together on rows of one table by batched matrix products.

Fits of a nested search are small: much of their time is the overhead of starting operations. One operation for several
fits costs hardly more than for one. Each fit has its own rows and its own generators, which draw its initial weights,
order of rows and dropout, so that its bytes do not depend on the other fits. AdamW (Loshchilov and Hutter 2019) with a
cosine schedule, dropout (Srivastava et al. 2014) and label smoothing (Szegedy et al. 2016). A network ends in a
perceptron, whose gradients are written by hand; a subclass that adds layers before it writes their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

BATCH_SIZE = 128
RANDOM_VALUES = 2**16  # values of the random number that decides whether a unit is dropped
BYTES_PER_DRAW = 8  # of the generator
FILLED = 4  # the rows of a batch are padded to a multiple of this
VECTOR = 64  # numbers, a multiple of the SIMD width of any processor
BETAS = (0.9, 0.999)  # of AdamW, as are torch's defaults
EPSILON = 1e-8


@dataclass(frozen=True)
class BatchShape:
    """How the rows of a fit are split into batches; fits of equal shape are trained together."""

    n_batches: int
    """Batches of an epoch, whose sizes differ by at most one row"""
    width: int
    """Rows of the largest batch, padded"""

    @classmethod
    def of(cls, rows: int, n_batches: int) -> BatchShape:
        """Return the shape of a fit on this number of rows.

        It depends on the fit alone, since the number of summands may change the last bit of a sum.
        """
        return cls(n_batches, -(-rows // (n_batches * FILLED)) * FILLED)


@dataclass(frozen=True)
class Schedule:
    """How a network is trained; the learning rate falls to 0 over `epochs`, even if training ends earlier."""

    epochs: int
    lr: float
    weight_decay: float
    dropout: float = 0.0
    label_smoothing: float = 0.0


class BatchedTraining:
    """B perceptrons in training: linear layers with ReLU and dropout between them, and the cross-entropy as loss.

    `run_to` trains all of them until the end of an epoch, `predict` returns the probabilities of one.
    """

    def __init__(
        self,
        table: Tensor,
        labels: Tensor,
        rows: Sequence[np.ndarray],
        seeds: Sequence[int],
        shape: BatchShape,
        sizes: Sequence[int],
        schedule: Schedule,
    ) -> None:
        """Take a table float32 (N, F), labels int64 (N,), and each fit's rows, int64 (n,), and seed.

        `sizes` are the widths of the perceptron's layers, from its inputs to the classes.
        """
        self.table, self.labels, self.sizes, self.schedule = table, labels, sizes, schedule
        self.n_batches, self.width = shape.n_batches, shape.width
        self.threshold = round(schedule.dropout * RANDOM_VALUES)
        self.kept_share = 1 - self.threshold / RANDOM_VALUES
        self.rows = [torch.from_numpy(indices) for indices in rows]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        # Drawing dropout masks in torch would take a third of the training time.
        self.noise = [np.random.SFC64(seed) for seed in seeds]
        layers = [shape for pair in pairwise(sizes) for shape in (pair, (1, pair[1]))]
        self.shapes: list[tuple[int, ...]] = [*self._shapes_before(), *layers]
        """Shapes of alternating matrices (in, out) and biases (1, out); the perceptron's come last"""
        self.n_before = len(self.shapes) - len(layers)
        values = torch.stack([_flat(self._initial(generator)) for generator in self.generators])
        self._set_values(values, [torch.zeros_like(values), torch.zeros_like(values)])
        self.steps = torch.zeros(())
        """Number of steps taken, as AdamW counts them"""
        self.epoch = 0

    def run_to(self, epoch: int) -> None:
        """Train until the end of an epoch."""
        while self.epoch < epoch:
            indices, divisors, sizes = self._epoch_rows()
            for number in range(self.n_batches):
                self._train_step(indices[:, number], divisors[:, number], [counts[number] for counts in sizes])
            self.epoch += 1

    def keep(self, numbers: Sequence[int]) -> None:
        """Keep the fits at these indices unchanged, with their state of AdamW, and drop all others."""
        if len(numbers) == len(self.rows):
            return
        indices = torch.tensor(list(numbers))
        self._set_values(self.values[indices], [moment[indices] for moment in self.moments])
        self.rows = [self.rows[number] for number in numbers]
        self.generators = [self.generators[number] for number in numbers]
        self.noise = [self.noise[number] for number in numbers]

    def parts(self, number: int) -> list[Tensor]:
        """Return views of the alternating matrices (in, out) and biases (1, out) of one fit."""
        return [part[number] for part in self.all_parts]

    def predict(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Return the probabilities float32 (n, C) of one fit for rows of the table, int64 (n,)."""
        parts = self.parts(number)
        values = self._read(number, self.table[torch.from_numpy(rows)], parts[: self.n_before])
        layers = parts[self.n_before :]
        for layer in range(0, len(layers), 2):
            values = torch.addmm(layers[layer + 1], values.relu_() if layer else values, layers[layer])
        return torch.softmax(values, dim=1).numpy()

    # Hooks for subclasses with layers before the perceptron ----------------------------------------------------------
    def _shapes_before(self) -> Sequence[tuple[int, ...]]:
        """Shapes of the matrices and biases before the perceptron."""
        return ()

    def _initial(self, generator: torch.Generator) -> list[Tensor]:
        """Draw the initial parameters of a fit, in the order and shapes of `shapes`."""
        return [part for pair in pairwise(self.sizes) for part in linear_values(*pair, generator)]

    def _read(self, number: int, values: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Map rows (n, F) of the table to the inputs (n, D) of one fit's perceptron by its earlier layers, `parts`."""
        return values

    def _forward(self, values: Tensor, parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """Map training rows (B, n, F) to the perceptrons' inputs (B, n, D); all but the first `counts` are padding."""
        return values

    def _backward(self, gradient: Tensor, slopes: Sequence[Tensor]) -> None:
        """Write the gradients of the layers before the perceptron, given that of the output of `_forward` (B, n, D)."""

    # -----------------------------------------------------------------------------------------------------------------
    def _set_values(self, values: Tensor, moments: Sequence[Tensor]) -> None:
        """Set the parameters (B, P), and the first and second moments of their gradients (B, P)."""
        self.values = values
        """Parameters float32 (B, P): padded to a multiple of `VECTOR`, so that no SIMD vector spans two fits"""
        self.moments = moments
        # One buffer for the gradients of all steps: a new one of some megabytes would be mapped and cleared each time.
        self.gradients = torch.zeros_like(values)
        self.all_parts, self.all_slopes = self._parts(values), self._parts(self.gradients)

    def _parts(self, values: Tensor) -> list[Tensor]:
        """Return views of the alternating matrices (B, in, out) and biases (B, 1, out) in values (B, P)."""
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = values[:, : sum(sizes)].split(sizes, dim=1)
        return [part.view(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def _epoch_rows(self) -> tuple[Tensor, Tensor, list[list[int]]]:
        """Return indices (B, S, n) and divisors (B, S, n) of the rows of S batches, and the rows per fit and batch.

        Batches of a fit differ by at most one row. Padding rows have the divisor 0.
        """
        counts = []
        for rows in self.rows:
            least, n_larger = divmod(len(rows), self.n_batches)
            counts.append([least + 1] * n_larger + [least] * (self.n_batches - n_larger))
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
        """Take one step of AdamW on batches of `indices` (B, n) whose gradients have the `divisors` (B, n)."""
        fits, width = indices.shape
        values = self.table.index_select(0, indices.reshape(-1)).view(fits, width, -1)
        parts, slopes = self.all_parts, self.all_slopes[self.n_before :]
        matrices, biases = parts[self.n_before :: 2], parts[self.n_before + 1 :: 2]
        inputs = [self._forward(values, parts[: self.n_before], counts)]
        # The products scale what dropout has kept, which takes no operation of its own.
        scales = [1.0, *[1 / self.kept_share] * (len(matrices) - 1)]
        for layer, (matrix, bias, scale) in enumerate(zip(matrices, biases, scales, strict=True)):
            scores = torch.baddbmm(bias, inputs[-1], matrix, alpha=scale)
            if layer < len(matrices) - 1:
                inputs.append(self._drop(scores.relu_(), counts))
        gradient = self._score_gradient(scores, indices, divisors)
        factor = 1.0  # times `gradient` is the gradient of the layer
        for layer in reversed(range(len(matrices))):
            slope, bias_slope = slopes[2 * layer : 2 * layer + 2]
            slope.baddbmm_(inputs[layer].transpose(1, 2), gradient, beta=0, alpha=factor * scales[layer])
            torch.sum(gradient, dim=1, keepdim=True, out=bias_slope)
            bias_slope.mul_(factor)
            if layer or self.n_before:
                gradient = torch.bmm(gradient, matrices[layer].transpose(1, 2))
            if layer:
                # A positive activation was neither zeroed by ReLU nor dropped.
                gradient = torch.ops.aten.threshold_backward(gradient, inputs[layer], 0)
                factor *= scales[layer]
        if self.n_before:
            self._backward(gradient.mul_(factor), self.all_slopes[: self.n_before])
        self._update()

    def _update(self) -> None:
        """Take a step of AdamW, by the function, which takes half of the optimizer's time with small networks."""
        schedule, progress = self.schedule, self.steps.item() / (self.schedule.epochs * self.n_batches)
        adamw(
            [self.values],
            [self.gradients],
            [self.moments[0]],
            [self.moments[1]],
            [],  # largest second moments, of AMSGrad
            [self.steps],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=schedule.lr * (1 + math.cos(math.pi * progress)) / 2,
            weight_decay=schedule.weight_decay,
            eps=EPSILON,
            maximize=False,
        )

    def _score_gradient(self, scores: Tensor, indices: Tensor, divisors: Tensor) -> Tensor:
        """Return the gradient (B, n, C) of each fit's mean cross-entropy with respect to its logits (B, n, C)."""
        smoothing = self.schedule.label_smoothing
        gradient = torch.softmax(scores, dim=2)
        truth = self.labels[indices].unsqueeze(2)
        gradient.scatter_add_(2, truth, torch.full(truth.shape, smoothing - 1))
        if smoothing:
            gradient.sub_(smoothing / gradient.shape[2])
        return gradient.mul_(divisors.unsqueeze(2))

    def _drop(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """Set values (B, n, H) that dropout drops to 0 in place; the others are not scaled."""
        return zero_dropped(values, self._kept(values.shape, counts, self.threshold)) if self.threshold else values

    def _kept(self, shape: Sequence[int], counts: Sequence[int], threshold: int) -> Tensor:
        """Draw which values (B, n, H) are kept, bool; a share of `threshold` / `RANDOM_VALUES` is dropped.

        Every fit draws numbers for its own rows only, without the padding.
        """
        numbers = np.zeros(shape, dtype=np.int16)
        for fit_numbers, count, noise in zip(numbers, counts, self.noise, strict=True):
            size = count * shape[2]
            draws = noise.random_raw(-(-size * numbers.itemsize // BYTES_PER_DRAW)).view(np.int16)[:size]
            fit_numbers[:count] = draws.reshape(count, -1)
        # NumPy compares short integers in a tenth of torch's time.
        return torch.from_numpy(numbers >= np.int16(threshold - RANDOM_VALUES // 2))


def zero_dropped(values: Tensor, kept: Tensor) -> Tensor:
    """Set values that are not `kept`, bool, to 0 in place; NumPy takes a third of torch's time."""
    numbers = values.numpy()
    np.multiply(numbers, kept.numpy(), out=numbers)
    return values


def independent_products(maps: Iterable[tuple[int, int]]) -> bool:
    """Return whether batched products with matrices (in, out) have the same bytes as the product of each fit alone.

    With rows padded to a multiple of `FILLED` this holds where each fit's matrices begin at a multiple of 16 bytes and
    none is a vector. With MKL, 11 % of other random products differed in the last bit, and none of these.
    """
    return all(width * wider % FILLED == 0 and min(width, wider) > 1 for width, wider in maps)


def linear_values(width: int, wider: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a matrix (in, out) and a bias (1, out) as `torch.nn.Linear` does."""
    matrix = torch.empty(wider, width)
    nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(width)
    return matrix.T, torch.empty(1, wider).uniform_(-bound, bound, generator=generator)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate all values, padded with zeros to a multiple of `VECTOR`."""
    values = torch.cat([part.reshape(-1) for part in parts])
    return nn.functional.pad(values, (0, -len(values) % VECTOR))
