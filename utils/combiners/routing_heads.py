"""Mixtures of experts and cascades as torch modules.

They compute the weights of all members, 0 for unused ones, without data-dependent control flow.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from utils.combiners.gates import SCORE_STEP
from utils.combiners.heads import tempered
from utils.numeric.metrics import SMALLEST_PROBABILITY


def top_k_mask(scores: Tensor, count: int) -> Tensor:
    """Return which scores (B, E) are the `count` largest of their row, bool (B, E), as `SparseGate.chosen` does.

    All pairs are compared, because runtimes differ in how `topk` breaks ties, which go to the first.
    """
    scores, experts = torch.round(scores / SCORE_STEP), scores.shape[1]
    earlier = torch.ones(experts, experts, dtype=torch.bool, device=scores.device).tril(-1)
    score, other = scores[:, :, None], scores[:, None, :]
    ahead = (other > score) | ((other == score) & earlier)
    return ahead.to(scores.dtype).sum(dim=2) < count


class SparseMixture(nn.Module):
    """A fitted mixture of the experts with the largest scores and the reader, weighted by a softmax over these only."""

    experts: Tensor
    first: Tensor
    first_bias: Tensor
    last: Tensor
    last_bias: Tensor

    def __init__(
        self,
        experts: np.ndarray,
        reader: int,
        top_k: int,
        layers: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
        temperature: float,
    ) -> None:
        super().__init__()
        self.reader, self.top_k, self.temperature = reader, top_k, temperature
        self.register_buffer("experts", torch.from_numpy(np.asarray(experts, dtype=np.int64)))
        for name, values in zip(("first", "first_bias", "last", "last_bias"), layers, strict=True):
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)))

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (B, M, C) -> probabilities (B, C)."""
        probabilities = torch.softmax(logits.index_select(1, self.experts), dim=2)
        logs = probabilities[:, self.reader].clamp_min(SMALLEST_PROBABILITY).log()
        hidden = torch.relu((logs - logs.mean(dim=1, keepdim=True)) @ self.first + self.first_bias)
        scores = hidden @ self.last + self.last_bias
        is_reader = torch.arange(scores.shape[1], device=scores.device) == self.reader
        weights = shares(scores, top_k_mask(scores, self.top_k) | is_reader)
        return tempered((weights[:, :, None] * probabilities).sum(dim=1), self.temperature)


class EarlyExit(nn.Module):
    """A cascade: the mean of the first k members of the chain.

    k is the smallest number for which the largest mean probability is at least `threshold`; all members if there is
    none.
    """

    chain: Tensor
    running: Tensor
    earlier: Tensor
    is_last: Tensor

    def __init__(self, chain: np.ndarray, threshold: float, temperature: float) -> None:
        super().__init__()
        stages = len(chain)
        self.threshold, self.temperature = threshold, temperature
        self.register_buffer("chain", torch.from_numpy(np.asarray(chain, dtype=np.int64)))
        triangle = torch.ones(stages, stages).tril()
        self.register_buffer("running", triangle / torch.arange(1, stages + 1)[:, None])
        self.register_buffer("earlier", triangle.tril(-1).T.contiguous())
        self.register_buffer("is_last", torch.eye(stages)[-1])

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (B, M, C) -> probabilities (B, C)."""
        probabilities = torch.softmax(logits.index_select(1, self.chain), dim=2)
        means = torch.matmul(self.running, probabilities)
        stops = torch.maximum((means.amax(dim=2) >= self.threshold).to(logits.dtype), self.is_last)
        before = torch.matmul(stops, self.earlier)
        leaves = stops * (before < 0.5).to(logits.dtype)
        return tempered((leaves[:, :, None] * means).sum(dim=1), self.temperature)


def shares(scores: Tensor, takes_part: Tensor) -> Tensor:
    """Return the softmax of scores (..., E) over the experts that take part; exactly 0 for the others."""
    powers = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach()) * takes_part.to(scores.dtype)
    return powers / powers.sum(dim=-1, keepdim=True)
