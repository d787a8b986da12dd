"""Mixtures of experts and cascades as torch modules, and the training losses of gates.

Modules for export compute the weights of all members, 0 for unused ones, without data-dependent control flow.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils.combiners.heads import tempered
from utils.numeric.metrics import SMALLEST_PROBABILITY


def top_k_mask(scores: Tensor, count: int) -> Tensor:
    """Return which scores (B, E) are the `count` largest of their row, bool (B, E); ties go to the first.

    All pairs are compared, because runtimes differ in how `topk` breaks ties.
    """
    experts = scores.shape[1]
    earlier = torch.ones(experts, experts, dtype=torch.bool, device=scores.device).tril(-1)
    score, other = scores[:, :, None], scores[:, None, :]
    ahead = (other > score) | ((other == score) & earlier)
    return ahead.to(scores.dtype).sum(dim=2) < count


def balance_loss(scores: Tensor, chosen: Tensor) -> Tensor:
    """Return E times the sum over experts of fraction of choices times mean probability; 1 if both are uniform.

    Takes scores (B, E) and choices bool (B, E). The probabilities are those of the softmax over all E experts: with a
    softmax over the chosen experts only, the loss would not lower the probability of an expert that is chosen too often
    (Fedus et al. 2022).
    """
    shares = chosen.to(scores.dtype).sum(dim=0) / chosen.sum()
    return scores.shape[1] * (shares * torch.softmax(scores, dim=1).mean(dim=0)).sum()


def z_loss(scores: Tensor) -> Tensor:
    """Return the mean squared log-sum-exp of the scores (B, E), which keeps scores small (Zoph et al. 2022)."""
    return torch.logsumexp(scores, dim=1).square().mean()


class Routed(NamedTuple):
    """Output of a gate in training for B rows."""

    log_probabilities: Tensor
    """(B, C)"""
    scores: Tensor
    """(B, E), without noise"""
    chosen: Tensor
    """bool (B, E): experts with the largest noisy scores"""


class GateNetwork(nn.Module):
    """A gate in training: a hidden layer and an output layer with one score per expert, initialised to zero."""

    def __init__(self, features: int, width: int, experts: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, width)
        self.scores = nn.Linear(width, experts)
        nn.init.zeros_(self.scores.weight)
        nn.init.zeros_(self.scores.bias)

    def layer_arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return weight and bias of the hidden layer, then of the scores; they share memory with the network."""
        layers = (self.hidden.weight, self.hidden.bias, self.scores.weight, self.scores.bias)
        weight, bias, last, last_bias = (values.detach().numpy() for values in layers)
        return weight, bias, last, last_bias


class AttentionMixture(GateNetwork):
    """A gate over all M members. Rows are M x C features followed by M x C probabilities."""

    def __init__(self, width: int, members: int, classes: int) -> None:
        super().__init__(members * classes, width, members)
        self.members, self.classes = members, classes

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (B, 2 x M x C) -> log-probabilities of the mixture (B, C)."""
        read, probabilities = rows.split(self.members * self.classes, dim=1)
        weights = torch.softmax(self.scores(torch.relu(self.hidden(read))), dim=1)
        mixed = (weights[:, :, None] * probabilities.view(-1, self.members, self.classes)).sum(dim=1)
        return mixed.clamp_min(SMALLEST_PROBABILITY).log()


class NoisyTopK(GateNetwork):
    """A gate in training with noise on its scores (Shazeer et al. 2017), over fixed experts.

    Rows are F features followed by E x C probabilities of the experts. The expert `reader`, whose outputs are the
    features, is always part of the mixture. Initial scores are zero and the initial noise scale is softplus(0), so that
    experts are at first chosen uniformly.
    """

    def __init__(self, sizes: tuple[int, int, int, int], top_k: int, reader: int) -> None:
        features, width, experts, classes = sizes
        super().__init__(features, width, experts)
        self.features, self.experts, self.classes = features, experts, classes
        self.top_k, self.reader = top_k, reader
        self.spread = nn.Linear(width, experts)
        nn.init.zeros_(self.spread.weight)
        nn.init.zeros_(self.spread.bias)

    def forward(self, rows: Tensor, noise: Tensor) -> Routed:
        """Rows (B, F + E x C) and standard normal noise (B, E) -> log-probabilities, scores and chosen experts."""
        read, probabilities = rows.split([self.features, self.experts * self.classes], dim=1)
        hidden = torch.relu(self.hidden(read))
        scores = self.scores(hidden)
        noisy = scores + noise * nn.functional.softplus(self.spread(hidden))
        chosen = top_k_mask(noisy, self.top_k)
        weights = _shares(noisy, chosen, self.reader)
        mixed = (weights[:, :, None] * probabilities.view(-1, self.experts, self.classes)).sum(dim=1)
        return Routed(mixed.clamp_min(SMALLEST_PROBABILITY).log(), scores, chosen)


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
        weights = _shares(scores, top_k_mask(scores, self.top_k), self.reader)
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


def _shares(scores: Tensor, chosen: Tensor, reader: int) -> Tensor:
    """Return the softmax of scores (B, E) over the chosen experts and the reader; exactly 0 for the others."""
    takes_part = chosen | (torch.arange(scores.shape[1], device=scores.device) == reader)
    powers = torch.exp(scores - scores.amax(dim=1, keepdim=True).detach()) * takes_part.to(scores.dtype)
    return powers / powers.sum(dim=1, keepdim=True)
