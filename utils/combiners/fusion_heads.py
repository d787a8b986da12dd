"""Fusion heads as torch modules, and the maps of the members' embeddings to their inputs.

A head maps the members' concatenated blocks (B, W) to logits (B, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from utils.combiners.heads import tempered
from utils.numeric.metrics import SMALLEST_PROBABILITY

TOKEN = 64  # width of an attention token where no hidden width is configured
ABSENT = 0.1  # fraction of the members that attention drops in each training step
FAR_BELOW = -1e9  # attention score of an absent member


class MappedEmbeddings(nn.Module):
    """Each member's embedding centred, scaled and multiplied by its matrix; one block per member, or their sum."""

    def __init__(
        self,
        centres: Sequence[np.ndarray],
        scales: Sequence[np.ndarray],
        matrices: Sequence[np.ndarray],
        *,
        summed: bool,
    ) -> None:
        super().__init__()
        self.summed = summed
        self.projected = [matrix.size > 0 for matrix in matrices]
        for member, parts in enumerate(zip(centres, scales, matrices, strict=True)):
            for name, part in zip(("centre", "scale", "matrix"), parts, strict=True):
                self.register_buffer(f"{name}{member}", torch.tensor(part, dtype=torch.float32))

    def forward(self, embeddings: list[Tensor]) -> list[Tensor]:
        """M embeddings (B, D_m) -> M blocks (B, R_m), or one block (B, R)."""
        blocks = []
        for member, embedding in enumerate(embeddings):
            # Centred before the matrix product, which would lose small differences of large values.
            block = (embedding - self.get_buffer(f"centre{member}")) / self.get_buffer(f"scale{member}")
            blocks.append(block @ self.get_buffer(f"matrix{member}") if self.projected[member] else block)
        if not self.summed:
            return blocks
        total = blocks[0]
        for block in blocks[1:]:
            total = total + block
        return [total]


class Perceptron(nn.Module):
    """Linear layers with ReLU and dropout between them; a single layer without hidden widths."""

    def __init__(self, width: int, hidden: Sequence[int], classes: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for pair in pairwise([width, *hidden, classes]):
            layers += [nn.Linear(*pair), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers[:-2])

    def forward(self, values: Tensor) -> Tensor:
        """(B, W) -> logits (B, C)."""
        return self.layers(values)


class ConcatHead(Perceptron):
    """A perceptron on all blocks concatenated."""

    def __init__(self, widths: Sequence[int], hidden: Sequence[int], classes: int, dropout: float, rank: int) -> None:
        super().__init__(sum(widths), hidden, classes, dropout)


class AttentionHead(nn.Module):
    """Members as tokens of one width, weighted by gated attention (Ilse, Tomczak and Welling 2018), then a perceptron.

    A member may be absent: its token is zeroed and its weight is 0. Training drops members at random, so that the head
    works without them. Attention scores start at zero, so that training starts from the unweighted mean of the tokens.
    """

    def __init__(self, widths: Sequence[int], hidden: Sequence[int], classes: int, dropout: float, rank: int) -> None:
        super().__init__()
        self.widths = tuple(widths)
        token, *further = hidden or (TOKEN,)
        self.tokens = nn.ModuleList(nn.Linear(width, token) for width in widths)
        self.gate, self.value = nn.Linear(token, token), nn.Linear(token, token)
        self.score = nn.Linear(token, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        self.dropout = nn.Dropout(dropout)
        self.perceptron = Perceptron(token, further, classes, dropout)

    def forward(self, values: Tensor, present: Tensor | None = None) -> Tensor:
        """(B, W), and whether each member is present, bool (B, M) -> logits (B, C)."""
        tokens, weights = self._weighed(values, present)
        return self.perceptron(self.dropout((tokens * weights[:, :, None]).sum(dim=1)))

    def weights(self, values: Tensor, present: Tensor | None = None) -> Tensor:
        """(B, W), and whether each member is present, bool (B, M) -> weights (B, M) that sum to 1."""
        return self._weighed(values, present)[1]

    def _weighed(self, values: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        parts = values.split(self.widths, dim=1)
        tokens = torch.stack([torch.relu(layer(part)) for layer, part in zip(self.tokens, parts, strict=True)], dim=1)
        if self.training:
            present = torch.rand(tokens.shape[:2], device=tokens.device) >= ABSENT
        if present is not None:
            tokens = torch.where(present[:, :, None], tokens, torch.zeros_like(tokens))
        scores = self.score(torch.tanh(self.value(tokens)) * torch.sigmoid(self.gate(tokens))).squeeze(2)
        if present is not None:
            scores = torch.where(present, scores, torch.full_like(scores, FAR_BELOW))
        return tokens, torch.softmax(scores, dim=1)


class BilinearHead(nn.Module):
    """Low-rank products of every two members' embeddings, concatenated with their sum, then a perceptron.

    Low-rank bilinear pooling (Kim et al. 2017) of all pairs at once: with p_m the projection of member m to `rank`
    dimensions, the sum over pairs of p_m * p_n is ((sum p)^2 - sum p^2) / 2 (Rendle 2010), so that the cost is linear
    in the number of members.
    """

    def __init__(self, widths: Sequence[int], hidden: Sequence[int], classes: int, dropout: float, rank: int) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.pairs = max(1.0, len(widths) * (len(widths) - 1) / 2)
        self.projections = nn.ModuleList(nn.Linear(width, rank) for width in widths)
        self.dropout = nn.Dropout(dropout)
        self.perceptron = Perceptron(2 * rank, hidden, classes, dropout)

    def forward(self, values: Tensor) -> Tensor:
        """(B, W) -> logits (B, C)."""
        parts = values.split(self.widths, dim=1)
        projected = torch.stack(
            [torch.tanh(layer(part)) for layer, part in zip(self.projections, parts, strict=True)], dim=1
        )
        total = projected.sum(dim=1)
        products = (total * total - (projected * projected).sum(dim=1)) / 2
        pooled = torch.cat([total / len(self.widths) ** 0.5, products / self.pairs**0.5], dim=1)
        return self.perceptron(self.dropout(pooled))


HEADS: dict[str, type[nn.Module]] = {
    "concat_mlp": ConcatHead,
    "attention": AttentionHead,
    "bilinear": BilinearHead,
    "cca_aligned": ConcatHead,
}
"""Head of each name of `runs.fusion.fusion_methods`."""


class MeanOfHeads(nn.Module):
    """Mean of the probabilities of heads that differ by their seed."""

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, values: Tensor) -> Tensor:
        """(B, W) -> probabilities (B, C)."""
        return torch.stack([torch.softmax(head(values), dim=1) for head in self.heads]).mean(dim=0)


class FusedEmbeddings(nn.Module):
    """A complete fusion: maps, heads and temperature, mixed with the members' unweighted mean at its temperature."""

    def __init__(
        self, maps: nn.Module, heads: nn.Module, temperature: float, share: float, mean_temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.maps, self.heads, self.temperature, self.share = maps, heads, temperature, share
        self.mean_temperature = mean_temperature

    def forward(self, logits: Tensor, embeddings: list[Tensor]) -> Tensor:
        """Logits (B, M, C) and M embeddings (B, D_m) -> probabilities (B, C)."""
        log_probabilities = self.heads(torch.cat(self.maps(embeddings), dim=1)).clamp_min(SMALLEST_PROBABILITY).log()
        mean = tempered(torch.softmax(logits, dim=2).mean(dim=1), self.mean_temperature)
        return self.share * torch.softmax(log_probabilities / self.temperature, dim=1) + (1 - self.share) * mean
