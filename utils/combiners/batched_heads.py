"""Batched training of the fusion heads of `utils.combiners.fusion_heads`.

The layers before the perceptron are computed for all heads at once, and autograd gives their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from utils.combiners.fusion_heads import ABSENT, FAR_BELOW, TOKEN
from utils.combiners.trained_heads import HeadShape
from utils.numeric.batched_training import (
    RANDOM_VALUES,
    BatchedTraining,
    BatchShape,
    Schedule,
    independent_products,
    linear_values,
)

SCORES = 4  # columns to which the matrix of the attention score is padded
WIDTHS = 8  # with tokens and projections of a multiple of this width, the rows of a batch fill whole SIMD vectors


class BatchedHeads(BatchedTraining):
    """B heads of one shape in training; this base class is a perceptron on the concatenated blocks."""

    prefix: ClassVar[str] = ""
    """Prefix of the names of the perceptron's weights"""

    def __init__(
        self,
        shape: HeadShape,
        table: Tensor,
        labels: Tensor,
        rows: Sequence[np.ndarray],
        seeds: Sequence[int],
        batches: BatchShape,
        schedule: Schedule,
    ) -> None:
        """Take concatenated blocks float32 (N, W), labels int64 (N,), and each fit's rows, int64 (n,), and seed."""
        self.shape = shape
        self.maps = self.maps_before(shape)
        super().__init__(table, labels, rows, seeds, batches, self.perceptron_sizes(shape), schedule)

    @classmethod
    def maps_before(cls, shape: HeadShape) -> Mapping[str, tuple[int, int]]:
        """Return {name: input and output width} of the linear layers before the perceptron."""
        return {}

    @classmethod
    def perceptron_sizes(cls, shape: HeadShape) -> list[int]:
        """Return the widths of the perceptron, from its input to the classes."""
        return [sum(shape.widths), *shape.hidden, shape.classes]

    @classmethod
    def numbers(cls, shape: HeadShape) -> int:
        """Return the number of parameters of a head."""
        maps = [*cls.maps_before(shape).values(), *pairwise(cls.perceptron_sizes(shape))]
        return sum((width + 1) * wider for width, wider in maps)

    @classmethod
    def are_independent(cls, shape: HeadShape) -> bool:
        """Return whether the bytes of a head do not depend on the other heads; if not, heads must be trained alone."""
        return independent_products([*cls.maps_before(shape).values(), *pairwise(cls.perceptron_sizes(shape))])

    def weights(self, number: int) -> dict[str, np.ndarray]:
        """Return a copy of the named weights of one head, float32."""
        layers = [f"{self.prefix}layers.{3 * index}" for index in range(len(self.sizes) - 1)]  # ReLU, dropout between
        parts = [part.numpy() for part in self.parts(number)]
        named: dict[str, np.ndarray] = {}
        for name, matrix, bias in zip([*self.maps, *layers], parts[::2], parts[1::2], strict=True):
            named |= {f"{name}.weight": matrix.T.copy(), f"{name}.bias": bias[0].copy()}
        return named

    def _shapes_before(self) -> Sequence[tuple[int, ...]]:
        return [shape for pair in self.maps.values() for shape in (pair, (1, pair[1]))]

    def _initial(self, generator: torch.Generator) -> list[Tensor]:
        before = [part for pair in self.maps.values() for part in linear_values(*pair, generator)]
        return before + super()._initial(generator)


class _PooledHeads(BatchedHeads):
    """Heads whose perceptron reads features pooled over the members, with dropout."""

    prefix = "perceptron."

    def _pooled(self, values: Tensor, parts: Sequence[Tensor], counts: Sequence[int] | None) -> Tensor:
        """Return pooled features (B, n, D) of rows (B, n, W).

        In training, `counts` are the heads' numbers of rows before the padding; at inference it is None.
        """
        raise NotImplementedError

    def _read(self, number: int, values: Tensor, parts: Sequence[Tensor]) -> Tensor:
        return self._pooled(values[None], [part[None] for part in parts], None)[0]

    def _forward(self, values: Tensor, parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        self.leaves = [part.detach().requires_grad_() for part in parts]
        with torch.enable_grad():
            pooled = self._pooled(values, self.leaves, counts)
            if self.threshold:
                pooled = pooled * self._kept(pooled.shape, counts, self.threshold) / self.kept_share
        self.pooled = pooled
        return pooled.detach()

    def _backward(self, gradient: Tensor, slopes: Sequence[Tensor]) -> None:
        for slope, part_gradient in zip(slopes, torch.autograd.grad(self.pooled, self.leaves, gradient), strict=True):
            slope.copy_(part_gradient)

    def _blocks(self, values: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Apply each member's linear layer to its block (B, n, w) of rows (B, n, W); return (B, n, M, D)."""
        blocks = values.split(self.shape.widths, dim=2)
        mapped = [torch.bmm(block, matrix) for block, matrix in zip(blocks, parts[::2], strict=True)]
        return torch.stack(mapped, dim=2) + torch.stack(tuple(parts[1::2]), dim=2)


class BatchedAttention(_PooledHeads):
    """Attention over the members as tokens."""

    @classmethod
    def maps_before(cls, shape: HeadShape) -> Mapping[str, tuple[int, int]]:
        """Return the layers of each member's token, of gated attention and of its score."""
        token = _token(shape)
        tokens = {f"tokens.{member}": (width, token) for member, width in enumerate(shape.widths)}
        return tokens | {"gate": (token, token), "value": (token, token), "score": (token, 1)}

    @classmethod
    def perceptron_sizes(cls, shape: HeadShape) -> list[int]:
        """Return the widths; the first hidden width is that of the tokens."""
        return [_token(shape), *shape.hidden[1:], shape.classes]

    @classmethod
    def are_independent(cls, shape: HeadShape) -> bool:
        """Return whether heads are independent, which also requires tokens of a multiple of `WIDTHS`."""
        maps = cls.maps_before(shape)
        products = [*(maps[name] for name in maps if name != "score"), *pairwise(cls.perceptron_sizes(shape))]
        return independent_products(products) and _token(shape) % WIDTHS == 0

    def _initial(self, generator: torch.Generator) -> list[Tensor]:
        parts = super()._initial(generator)
        for part in parts[2 * len(self.maps) - 2 : 2 * len(self.maps)]:
            part.zero_()
        return parts

    def _pooled(self, values: Tensor, parts: Sequence[Tensor], counts: Sequence[int] | None) -> Tensor:
        members = len(self.shape.widths)
        tokens = torch.relu(self._blocks(values, parts[: 2 * members]))
        gate, gate_bias, value, value_bias, score, score_bias = parts[2 * members :]
        present = None
        if counts is not None:
            present = self._kept((*tokens.shape[:2], members), counts, round(ABSENT * RANDOM_VALUES))
            tokens = tokens * present.unsqueeze(3)
        flat = tokens.flatten(1, 2)
        gated = torch.tanh(torch.baddbmm(value_bias, flat, value)) * torch.sigmoid(torch.baddbmm(gate_bias, flat, gate))
        # Products with a matrix of one column use another kernel for one head than for several, hence the padding.
        column = torch.bmm(gated, nn.functional.pad(score, (0, SCORES - 1)))[:, :, :1] + score_bias
        scores = column.view(tokens.shape[:3])
        if present is not None:
            scores = scores.masked_fill(~present, FAR_BELOW)
        return (tokens * torch.softmax(scores, dim=2).unsqueeze(3)).sum(dim=2)


class BatchedBilinear(_PooledHeads):
    """Elementwise products of every two members' projected embeddings, concatenated with their sum."""

    @classmethod
    def maps_before(cls, shape: HeadShape) -> Mapping[str, tuple[int, int]]:
        """Return the layer of each member's projection."""
        return {f"projections.{member}": (width, shape.rank) for member, width in enumerate(shape.widths)}

    @classmethod
    def perceptron_sizes(cls, shape: HeadShape) -> list[int]:
        """Return the widths; the input is the sum and the products."""
        return [2 * shape.rank, *shape.hidden, shape.classes]

    @classmethod
    def are_independent(cls, shape: HeadShape) -> bool:
        """Return whether heads are independent, which also requires a rank of a multiple of `WIDTHS`."""
        return super().are_independent(shape) and shape.rank % WIDTHS == 0

    def _pooled(self, values: Tensor, parts: Sequence[Tensor], counts: Sequence[int] | None) -> Tensor:
        members = len(self.shape.widths)
        pairs = max(1.0, members * (members - 1) / 2)
        projected = torch.tanh(self._blocks(values, parts))
        total = projected.sum(dim=2)
        products = (total * total - (projected * projected).sum(dim=2)) / 2
        return torch.cat([total / members**0.5, products / pairs**0.5], dim=2)


BATCHED: dict[str, type[BatchedHeads]] = {
    "concat_mlp": BatchedHeads,
    "attention": BatchedAttention,
    "bilinear": BatchedBilinear,
    "cca_aligned": BatchedHeads,
}
"""Batched training of each head of `fusion_heads.HEADS`, by the same names."""


def _token(shape: HeadShape) -> int:
    return shape.hidden[0] if shape.hidden else TOKEN
