"""Combiners as small torch modules: member logits (B, M, C) in, class probabilities (B, C) out, for any B."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MeanOfProbabilities(nn.Module):
    """Plain mean of the members' probabilities."""

    def forward(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, dim=2).mean(dim=1)


class ProbabilityOfMeanLogits(nn.Module):
    """Soft-max of the plain mean of the members' logits."""

    def forward(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits.mean(dim=1), dim=1)


class VoteShares(nn.Module):
    """Share of the members whose largest logit a class has, with `tie_share` of the mean probability mixed in."""

    def __init__(self, tie_share: float) -> None:
        super().__init__()
        self.tie_share = tie_share

    def forward(self, logits: Tensor) -> Tensor:
        votes = nn.functional.one_hot(logits.argmax(dim=2), logits.shape[2])
        shares = votes.to(logits.dtype).mean(dim=1)
        return (1 - self.tie_share) * shares + self.tie_share * torch.softmax(logits, dim=2).mean(dim=1)
