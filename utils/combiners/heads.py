"""Combiners as small torch modules: member logits (B, M, C) in, class probabilities (B, C) out, for any B."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from utils.numeric.metrics import SMALLEST_PROBABILITY


def tempered(probabilities: Tensor, temperature: float) -> Tensor:
    """Return probabilities (B, C) at a temperature; unchanged for temperature 1."""
    if temperature == 1:
        return probabilities
    return torch.softmax(probabilities.clamp(min=SMALLEST_PROBABILITY).log() / temperature, dim=1)


class ScaledClasses(nn.Module):
    """A pool of members whose log-probabilities are mapped by a matrix (C, C) and a bias (C,) before the softmax."""

    matrix: Tensor
    bias: Tensor

    def __init__(self, pool: LinearPool | LogLinearPool, matrix: np.ndarray, bias: np.ndarray) -> None:
        super().__init__()
        self.pool = pool
        self.register_buffer("matrix", torch.tensor(matrix, dtype=torch.float32))
        self.register_buffer("bias", torch.tensor(bias, dtype=torch.float32))

    def forward(self, logits: Tensor) -> Tensor:
        scores = torch.log_softmax(self.pool.scores(logits), dim=1)
        return torch.softmax(nn.functional.linear(scores, self.matrix, self.bias), dim=1)


class MixedWithUniform(nn.Module):
    """A combiner's probabilities mixed with the uniform distribution (`utils.numeric.uniform_mixture`)."""

    def __init__(self, combiner: nn.Module, weight: float) -> None:
        super().__init__()
        self.combiner, self.weight = combiner, weight

    def forward(self, logits: Tensor, embeddings: list[Tensor] | None = None) -> Tensor:
        """Logits (B, M, C), and embeddings where the combiner reads them -> probabilities (B, C)."""
        probabilities: Tensor = self.combiner(logits) if embeddings is None else self.combiner(logits, embeddings)
        return probabilities + self.weight * (1 / probabilities.shape[1] - probabilities)


class MeanOfProbabilities(nn.Module):
    """Unweighted mean of the members' probabilities."""

    def forward(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, dim=2).mean(dim=1)


class ProbabilityOfMeanLogits(nn.Module):
    """Softmax of the mean of the members' logits, divided by member temperatures (M,) and a common temperature."""

    divisors: Tensor

    def __init__(self, temperature: float, member_temperatures: np.ndarray) -> None:
        super().__init__()
        divisors = torch.tensor(member_temperatures * temperature, dtype=torch.float32)
        self.register_buffer("divisors", divisors[:, None])

    def forward(self, logits: Tensor) -> Tensor:
        return torch.softmax((logits / self.divisors).mean(dim=1), dim=1)


class VoteShares(nn.Module):
    """Fraction of the members that vote for each class, with `tie_share` of the mean probability mixed in."""

    def __init__(self, tie_share: float) -> None:
        super().__init__()
        self.tie_share = tie_share

    def forward(self, logits: Tensor) -> Tensor:
        # By comparison, since no converter to TFLite supports one_hot.
        votes = logits.argmax(dim=2, keepdim=True) == torch.arange(logits.shape[2], device=logits.device)
        shares = votes.to(logits.dtype).mean(dim=1)
        return (1 - self.tie_share) * shares + self.tie_share * torch.softmax(logits, dim=2).mean(dim=1)


class LinearPool(nn.Module):
    """Mixture of the members' probabilities with weights `shares` (M,), at a temperature.

    `member_temperatures` (M,) divide the members' logits.
    """

    shares: Tensor
    member_temperatures: Tensor

    def __init__(self, shares: np.ndarray, temperature: float, member_temperatures: np.ndarray) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("shares", torch.tensor(shares, dtype=torch.float32)[:, None])
        self.register_buffer("member_temperatures", torch.tensor(member_temperatures, dtype=torch.float32)[:, None])

    def forward(self, logits: Tensor) -> Tensor:
        return tempered((self._member_probabilities(logits) * self.shares).sum(dim=1), self.temperature)

    def scores(self, logits: Tensor) -> Tensor:
        """Return unnormalised log-probabilities (B, C) at the temperature; members are clipped at 1e-12 as in a fit."""
        members = self._member_probabilities(logits).clamp(min=SMALLEST_PROBABILITY)
        return (members * self.shares).sum(dim=1).log() / self.temperature

    def _member_probabilities(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits / self.member_temperatures, dim=2)


class LogLinearPool(nn.Module):
    """Softmax of the sum of the members' log-probabilities, clipped at log(1e-12), times `shares` (M,) / temperature.

    `member_temperatures` (M,) divide the members' logits.
    """

    weights: Tensor
    member_temperatures: Tensor

    def __init__(self, shares: np.ndarray, temperature: float, member_temperatures: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(shares / temperature, dtype=torch.float32)[:, None])
        self.register_buffer("member_temperatures", torch.tensor(member_temperatures, dtype=torch.float32)[:, None])

    def forward(self, logits: Tensor) -> Tensor:
        return torch.softmax(self.scores(logits), dim=1)

    def scores(self, logits: Tensor) -> Tensor:
        """Return unnormalised log-probabilities (B, C) at the temperature."""
        scores = torch.log_softmax(logits / self.member_temperatures, dim=2).clamp(min=math.log(SMALLEST_PROBABILITY))
        return (scores * self.weights).sum(dim=1)
