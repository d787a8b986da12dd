"""Batched training of the fusion heads of `utils.combiners.fusion_heads`, with gradients written by hand.

The linear layers of members with equally wide blocks are one batched product, since starting an operation costs more
than such a product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

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
    zero_dropped,
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

    saved: tuple[Any, ...] = ()
    """What `_pooled` saves in training for the gradients"""

    @cached_property
    def groups(self) -> list[list[int]]:
        """Members with blocks of equal widths."""
        return _groups(self.shape)

    @cached_property
    def order(self) -> list[int]:
        """Order of the members along M of mapped blocks (B, M, n, D), and of their layers among the parameters."""
        return _order(self.shape)

    def _pooled(self, values: Tensor, parts: Sequence[Tensor], counts: Sequence[int] | None) -> Tensor:
        """Return pooled features (B, n, D) of rows (B, n, W).

        In training, `counts` are the heads' numbers of rows before the padding; at inference it is None.
        """
        raise NotImplementedError

    def _pooled_backward(self, gradient: Tensor, parts: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        """Write the gradients of `parts` into `slopes`, given that of the pooled features (B, n, D)."""
        raise NotImplementedError

    def _read(self, number: int, values: Tensor, parts: Sequence[Tensor]) -> Tensor:
        return self._pooled(values[None], [part[None] for part in parts], None)[0]

    def _forward(self, values: Tensor, parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        pooled = self._pooled(values, parts, counts)
        self.before, self.kept = parts, None
        if self.threshold:
            self.kept = self._kept(pooled.shape, counts, self.threshold)
            zero_dropped(pooled, self.kept).div_(self.kept_share)
        return pooled

    def _backward(self, gradient: Tensor, slopes: Sequence[Tensor]) -> None:
        if self.kept is not None:
            zero_dropped(gradient, self.kept).div_(self.kept_share)
        self._pooled_backward(gradient, self.before, slopes)
        self.saved = ()

    def _mapped(self, values: Tensor, parts: Sequence[Tensor], *, is_training: bool) -> tuple[Tensor, list[Tensor]]:
        """Apply each member's linear layer to its block (B, n, w) of rows (B, n, W).

        Returns the outputs (B, M, n, D), and the blocks (B * m, n, w) of each group of m members for the gradients.
        """
        blocks, inputs, mapped = values.split(self.shape.widths, dim=2), [], []
        layers = self.layers_of_groups if is_training else self._layers_of_groups(parts)
        for group, (matrices, biases) in zip(self.groups, layers, strict=True):
            block = torch.stack([blocks[member] for member in group], dim=1).flatten(0, 1)
            outputs = torch.baddbmm(biases.flatten(0, 1), block, matrices.flatten(0, 1))
            mapped.append(outputs.unflatten(0, (-1, len(group))))
            inputs.append(block)
        return mapped[0] if len(mapped) == 1 else torch.cat(mapped, dim=1), inputs

    def _mapped_backward(self, gradient: Tensor, inputs: Sequence[Tensor]) -> None:
        """Write the gradients of the members' linear layers, given that of their outputs (B, M, n, D)."""
        by_group = gradient.split([len(group) for group in self.groups], dim=1)
        for (matrices, biases), block, part in zip(self.slopes_of_groups, inputs, by_group, strict=True):
            outputs = part.flatten(0, 1)
            matrices.copy_(torch.bmm(block.transpose(1, 2), outputs).view(matrices.shape))
            biases.copy_(outputs.sum(dim=1, keepdim=True).view(biases.shape))

    def _set_values(self, values: Tensor, moments: Sequence[Tensor]) -> None:
        super()._set_values(values, moments)
        self.layers_of_groups = self._layers_of_groups(self.all_parts)
        self.slopes_of_groups = self._layers_of_groups(self.all_slopes)

    def _layers_of_groups(self, parts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return views (B, m, w, D) and (B, m, 1, D) of the matrices and biases of each group of m members in `parts`.

        The layers of a group follow one another, so that one operation reads or writes all of them.
        """
        views, place = [], 0
        for group in self.groups:
            matrix, bias = parts[2 * place : 2 * place + 2]
            of_layer = matrix[0].numel() + bias[0].numel()
            matrices, biases = (
                torch.as_strided(
                    first, (len(first), len(group), *first.shape[1:]), (first.stride(0), of_layer, *first.stride()[1:])
                )
                for first in (matrix, bias)
            )
            views.append((matrices, biases))
            place += len(group)
        return views


class BatchedAttention(_PooledHeads):
    """Attention over the members as tokens."""

    @classmethod
    def maps_before(cls, shape: HeadShape) -> Mapping[str, tuple[int, int]]:
        """Return the layers of each member's token, of gated attention and of its score."""
        token = _token(shape)
        tokens = {f"tokens.{member}": (shape.widths[member], token) for member in _order(shape)}
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
        n_members, rows = len(self.shape.widths), values.shape[1]
        mapped, inputs = self._mapped(values, parts[: 2 * n_members], is_training=counts is not None)
        tokens = mapped.relu_()  # (B, M, n, D)
        gate, gate_bias, value, value_bias, score, score_bias = parts[2 * n_members :]
        present = None
        if counts is not None:
            kept = self._kept((len(values), rows, n_members), counts, round(ABSENT * RANDOM_VALUES))
            present = kept[:, :, self.order].transpose(1, 2)
            tokens.mul_(present.to(tokens.dtype).unsqueeze(3))  # a product with bool would take several times as long
        flat = tokens.flatten(1, 2)
        tanh = torch.baddbmm(value_bias, flat, value).tanh_()
        sigmoid = torch.baddbmm(gate_bias, flat, gate).sigmoid_()
        gated = tanh * sigmoid
        # Products with a matrix of one column use another kernel for one head than for several, hence the padding.
        column = torch.bmm(gated, nn.functional.pad(score, (0, SCORES - 1)))[:, :, :1] + score_bias
        scores = column.view(tokens.shape[:3])
        if present is not None:
            scores = scores.masked_fill(~present, FAR_BELOW)
        weights = torch.softmax(scores, dim=1)
        if present is not None:
            self.saved = inputs, tokens, tanh, sigmoid, gated, present, weights
        return (tokens * weights.unsqueeze(3)).sum(dim=1)

    def _pooled_backward(self, gradient: Tensor, parts: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        n_members = len(self.shape.widths)
        gate, _, value, _, score, _ = parts[2 * n_members :]
        gate_slope, gate_bias, value_slope, value_bias, score_slope, score_bias = slopes[2 * n_members :]
        inputs, tokens, tanh, sigmoid, gated, present, weights = self.saved
        flat, pooled_gradient = tokens.flatten(1, 2), gradient.unsqueeze(1)
        of_weights = (tokens * pooled_gradient).sum(dim=3)
        of_scores = weights * (of_weights - (weights * of_weights).sum(dim=1, keepdim=True))
        column = of_scores.masked_fill_(~present, 0).flatten(1).unsqueeze(2)
        padded = nn.functional.pad(column, (0, SCORES - 1))
        score_slope.copy_(torch.bmm(gated.transpose(1, 2), padded)[:, :, :1])
        torch.sum(column, dim=1, keepdim=True, out=score_bias)
        of_gated = column * score.transpose(1, 2)
        of_value = torch.ops.aten.tanh_backward(of_gated * sigmoid, tanh)
        of_gate = torch.ops.aten.sigmoid_backward(of_gated.mul_(tanh), sigmoid)
        transposed = flat.transpose(1, 2)
        for part, matrix, bias in ((of_value, value_slope, value_bias), (of_gate, gate_slope, gate_bias)):
            matrix.copy_(torch.bmm(transposed, part))
            torch.sum(part, dim=1, keepdim=True, out=bias)
        of_tokens = torch.bmm(of_value, value.transpose(1, 2)).baddbmm_(of_gate, gate.transpose(1, 2))
        of_tokens = of_tokens.view(tokens.shape).addcmul_(weights.unsqueeze(3), pooled_gradient)
        # A positive token was neither zeroed by ReLU nor absent.
        of_mapped = torch.ops.aten.threshold_backward(of_tokens, tokens, 0)
        self._mapped_backward(of_mapped, inputs)


class BatchedBilinear(_PooledHeads):
    """Elementwise products of every two members' projected embeddings, concatenated with their sum."""

    @classmethod
    def maps_before(cls, shape: HeadShape) -> Mapping[str, tuple[int, int]]:
        """Return the layer of each member's projection."""
        return {f"projections.{member}": (shape.widths[member], shape.rank) for member in _order(shape)}

    @classmethod
    def perceptron_sizes(cls, shape: HeadShape) -> list[int]:
        """Return the widths; the input is the sum and the products."""
        return [2 * shape.rank, *shape.hidden, shape.classes]

    @classmethod
    def are_independent(cls, shape: HeadShape) -> bool:
        """Return whether heads are independent, which also requires a rank of a multiple of `WIDTHS`."""
        return super().are_independent(shape) and shape.rank % WIDTHS == 0

    def _pooled(self, values: Tensor, parts: Sequence[Tensor], counts: Sequence[int] | None) -> Tensor:
        mapped, inputs = self._mapped(values, parts, is_training=counts is not None)
        projected = mapped.tanh_()  # (B, M, n, D)
        total = projected.sum(dim=1)
        products = (total * total - (projected * projected).sum(dim=1)) / 2
        if counts is not None:
            self.saved = inputs, projected, total
        return torch.cat([total / self._members**0.5, products / self._pairs**0.5], dim=2)

    def _pooled_backward(self, gradient: Tensor, parts: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        inputs, projected, total = self.saved
        of_total, of_products = gradient.chunk(2, dim=2)
        of_products = of_products / self._pairs**0.5
        of_total = (of_total / self._members**0.5).addcmul_(of_products, total)
        of_projected = of_total.unsqueeze(1) - of_products.unsqueeze(1) * projected
        self._mapped_backward(torch.ops.aten.tanh_backward(of_projected, projected), inputs)

    @property
    def _members(self) -> int:
        return len(self.shape.widths)

    @property
    def _pairs(self) -> float:
        return max(1.0, self._members * (self._members - 1) / 2)


BATCHED: dict[str, type[BatchedHeads]] = {
    "concat_mlp": BatchedHeads,
    "attention": BatchedAttention,
    "bilinear": BatchedBilinear,
    "cca_aligned": BatchedHeads,
}
"""Batched training of each head of `fusion_heads.HEADS`, by the same names."""


def _groups(shape: HeadShape) -> list[list[int]]:
    """Return the members with blocks of equal widths."""
    widths = shape.widths
    return [[member for member in range(len(widths)) if widths[member] == width] for width in dict.fromkeys(widths)]


def _order(shape: HeadShape) -> list[int]:
    """Return the members, group by group."""
    return [member for group in _groups(shape) for member in group]


def _token(shape: HeadShape) -> int:
    return shape.hidden[0] if shape.hidden else TOKEN
