"""Networks of one shape, trained side by side on rows of one table as products of three-dimensional tensors.

Fits of a nested search are small: much of their time goes into starting operations. One operation for several of them
costs hardly more than for one. Each fit has its own rows, initial weights, order of rows and random numbers, drawn from
generators of its own, so that its bytes do not depend on the fits beside it. AdamW (Loshchilov and Hutter 2019) with a
cosine schedule, dropout (Srivastava et al. 2014) and label smoothing (Szegedy et al. 2016). A network ends in a
perceptron, whose gradients are written out; what a subclass puts before it has its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

RANDOM_VALUES = 2**16  # that a number takes which decides whether a unit is dropped
BYTES_PER_DRAW = 8  # of the generator
FILLED = 4  # a batch's rows are filled up to a multiple of it
VECTOR = 64  # numbers, a multiple of what any processor treats at once


@dataclass(frozen=True)
class BatchShape:
    """How the rows of a fit are split; fits of equal shape are trained side by side."""

    n_batches: int
    """Of an epoch; they differ by at most one row"""
    width: int
    """Rows of the largest, filled up"""

    @classmethod
    def of(cls, rows: int, n_batches: int) -> BatchShape:
        """Of so many rows.

        It depends on the fit alone, since the number of rows that are summed over may decide about the last bit.
        """
        return cls(n_batches, -(-rows // (n_batches * FILLED)) * FILLED)


@dataclass(frozen=True)
class Schedule:
    """How a network is trained; the learning rate falls to 0 over `epochs`, also where a training ends earlier."""

    epochs: int
    lr: float
    weight_decay: float
    dropout: float = 0.0
    label_smoothing: float = 0.0


class BatchedTraining:
    """B perceptrons under training: affine maps with ReLU and dropout between them, cross-entropy at the end.

    `run_to` goes on to an epoch, `predict` answers with one of them.
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

        `sizes` are the widths of the perceptron, from what it reads to the classes.
        """
        self.table, self.labels, self.sizes, self.schedule = table, labels, sizes, schedule
        self.n_batches, self.width = shape.n_batches, shape.width
        self.threshold = round(schedule.dropout * RANDOM_VALUES)
        self.kept_share = 1 - self.threshold / RANDOM_VALUES
        self.rows = [torch.from_numpy(each) for each in rows]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        # Torch's own draws of dropout would take a third of the training.
        self.noise = [np.random.SFC64(seed) for seed in seeds]
        layers = [shape for pair in pairwise(sizes) for shape in (pair, (1, pair[1]))]
        self.shapes: list[tuple[int, ...]] = [*self._shapes_before(), *layers]
        """Of the matrices (in, out) and biases (1, out), by turns; the perceptron's come last"""
        self.n_before = len(self.shapes) - len(layers)
        self.values = torch.stack([_flat(self._initial(generator)) for generator in self.generators])
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
        self.rows = [self.rows[number] for number in numbers]
        self.generators = [self.generators[number] for number in numbers]
        self.noise = [self.noise[number] for number in numbers]

    def parts(self, number: int) -> list[Tensor]:
        """Views of the matrices (in, out) and biases (1, out) of one fit, by turns."""
        return [part[number] for part in self._parts(self.values)]

    def predict(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Probabilities float32 (n, C) by one fit of rows of the table, int64 (n,)."""
        parts = self.parts(number)
        values = self._read(number, self.table[torch.from_numpy(rows)], parts[: self.n_before])
        layers = parts[self.n_before :]
        for place in range(0, len(layers), 2):
            values = torch.addmm(layers[place + 1], values.relu_() if place else values, layers[place])
        return torch.softmax(values, dim=1).numpy()

    # what a subclass may put before the perceptron -------------------------------------------------------------------
    def _shapes_before(self) -> Sequence[tuple[int, ...]]:
        """Shapes of the matrices and biases before the perceptron."""
        return ()

    def _initial(self, generator: torch.Generator) -> list[Tensor]:
        """The numbers of a fit before its training, in the order and in the shapes of `shapes`."""
        return [part for pair in pairwise(self.sizes) for part in linear_values(*pair, generator)]

    def _read(self, number: int, values: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """What the perceptron of one fit reads of rows (n, F) of the table; `parts` come before it."""
        return values

    def _forward(self, values: Tensor, parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """What the perceptrons read under training, (B, n, D), of rows (B, n, F), `counts` of which are there."""
        return values

    def _backward(self, gradient: Tensor, slopes: Sequence[Tensor]) -> None:
        """Write the slopes of the parts before the perceptron, given the gradient (B, n, D) of what `_forward` gave."""

    # -----------------------------------------------------------------------------------------------------------------
    def _parts(self, values: Tensor) -> list[Tensor]:
        """Views of matrices (B, in, out) and biases (B, 1, out), by turns, of values (B, P)."""
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = values[:, : sum(sizes)].split(sizes, dim=1)
        return [part.view(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def _new_optimizer(self) -> torch.optim.AdamW:
        schedule = self.schedule
        return torch.optim.AdamW([self.values], lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True)

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
        parts = self._parts(self.values)
        matrices, biases = parts[self.n_before :: 2], parts[self.n_before + 1 :: 2]
        inputs = [self._forward(values, parts[: self.n_before], counts)]
        for place, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
            scores = torch.baddbmm(bias, inputs[-1], matrix)
            if place < len(matrices) - 1:
                inputs.append(self._drop(scores.relu_(), counts))
        gradient = self._score_gradient(scores, indices, divisors)
        self.values.grad = torch.zeros_like(self.values)
        all_slopes = self._parts(self.values.grad)
        slopes = all_slopes[self.n_before :]
        for place in reversed(range(len(matrices))):
            slopes[2 * place].copy_(torch.bmm(inputs[place].transpose(1, 2), gradient))
            torch.sum(gradient, dim=1, keepdim=True, out=slopes[2 * place + 1])
            if place or self.n_before:
                gradient = torch.bmm(gradient, matrices[place].transpose(1, 2))
            if place:
                # What is positive was neither cut off by ReLU nor dropped.
                gradient = torch.ops.aten.threshold_backward(gradient, inputs[place], 0).div_(self.kept_share)
        if self.n_before:
            self._backward(gradient, all_slopes[: self.n_before])
        total_steps = self.schedule.epochs * self.n_batches
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr * (1 + math.cos(math.pi * self.step / total_steps)) / 2
        self.optimizer.step()
        self.step += 1

    def _score_gradient(self, scores: Tensor, indices: Tensor, divisors: Tensor) -> Tensor:
        """Gradient (B, n, C) of each fit's mean cross-entropy by its scores (B, n, C)."""
        smoothing = self.schedule.label_smoothing
        gradient = torch.softmax(scores, dim=2)
        truth = self.labels[indices].unsqueeze(2)
        gradient.scatter_add_(2, truth, torch.full(truth.shape, smoothing - 1))
        if smoothing:
            gradient.sub_(smoothing / gradient.shape[2])
        return gradient.mul_(divisors.unsqueeze(2))

    def _drop(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """Dropout of values (B, n, H) in place."""
        if not self.threshold:
            return values
        return values.mul_(self._kept(values.shape, counts, self.threshold)).div_(self.kept_share)

    def _kept(self, shape: Sequence[int], counts: Sequence[int], threshold: int) -> Tensor:
        """Draw whether values (B, n, H) are kept, bool; `threshold` in `RANDOM_VALUES` are not.

        Every fit draws numbers for as many rows as it has.
        """
        numbers = np.zeros(shape, dtype=np.int16)
        for of_fit, count, noise in zip(numbers, counts, self.noise, strict=True):
            size = count * shape[2]
            drawn = noise.random_raw(-(-size * numbers.itemsize // BYTES_PER_DRAW)).view(np.int16)[:size]
            of_fit[:count] = drawn.reshape(count, -1)
        return torch.from_numpy(numbers) >= threshold - RANDOM_VALUES // 2


def independent_products(maps: Iterable[tuple[int, int]]) -> bool:
    """Whether products with matrices (in, out) of several fits have the bytes that each of them has alone.

    With rows filled up to a multiple of `FILLED` they have where each fit's matrices begin at a multiple of 16 bytes
    and none is a vector. With MKL, 11 % of other random products had another last bit, and none of these.
    """
    return all(width * wider % FILLED == 0 and min(width, wider) > 1 for width, wider in maps)


def linear_values(width: int, wider: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A matrix (in, out) and a bias (1, out) as `torch.nn.Linear` draws them."""
    matrix = torch.empty(wider, width)
    nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(width)
    return matrix.T, torch.empty(1, wider).uniform_(-bound, bound, generator=generator)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    """All numbers one after the other, filled up with zeros to a multiple of `VECTOR`."""
    values = torch.cat([part.reshape(-1) for part in parts])
    return nn.functional.pad(values, (0, -len(values) % VECTOR))
