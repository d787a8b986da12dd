"""Batched training of the gates of `utils.combiners.gates`, with gradients written by hand.

A gate is a perceptron with one hidden layer whose outputs are scores of the members. Its loss is the log-loss of the
mixture of the members' probabilities, for which only their probabilities of the true class matter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.combiners.gates import KIND, AttentionGate, ExpertChoice, SparseGate, fixed_gate
from utils.combiners.routing_heads import shares
from utils.combiners.stacking_features import FeatureRows, features, standardisation
from utils.numeric.batched_perceptrons import BatchedPerceptrons, FitRows
from utils.numeric.batched_training import Schedule, linear_values
from utils.numeric.metrics import SMALLEST_PROBABILITY, softmax

BALANCE, Z = 0.01, 0.001  # weights of the load-balancing loss and the z-loss, as in the papers


class BatchedGates(BatchedPerceptrons, ABC):
    """B gates in training. The last layer is initialised to zero: training starts from equal weights."""

    @abstractmethod
    def gate(self, number: int) -> AttentionGate | SparseGate:
        """Return one gate as it is now."""

    def _initial(self, generator: torch.Generator) -> list[Tensor]:
        features, width, outputs = self.sizes
        return [*linear_values(features, width, generator), torch.zeros(width, outputs), torch.zeros(1, outputs)]


class BatchedAttentionGates(BatchedGates):
    """Gates over all members."""

    def __init__(
        self,
        rows: FeatureRows,
        probabilities: np.ndarray,
        inside: Sequence[np.ndarray],
        width: int,
        schedule: Schedule,
        seed: int,
    ) -> None:
        """Take the features, the members' probabilities (M, N, C), and each fit's rows, int64 (n,)."""
        super().__init__(
            torch.from_numpy(rows.single_precision),
            torch.from_numpy(rows.labels),
            [FitRows(indices, *rows.standardisation(indices)) for indices in inside],
            [rows.raw.shape[1], width, rows.members],
            schedule,
            seed=seed,
        )
        self.raw, self.probabilities = rows.raw, probabilities
        self.truths = _truths(probabilities, rows.labels)

    def gate(self, number: int) -> AttentionGate:
        """Return one gate as it is now."""
        (hidden, scores), (hidden_bias, scores_bias) = self.layers(number)
        return AttentionGate((hidden, scores), (hidden_bias, scores_bias))

    def predict(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Return the probabilities float32 (n, C) of one gate's mixture for rows, int64 (n,)."""
        return self.gate(number).mixed(self.raw[rows], self.probabilities[:, rows]).astype(np.float32)

    def _score_gradient(self, scores: Tensor, indices: Tensor, divisors: Tensor) -> Tensor:
        weights = torch.softmax(scores, dim=2)
        return mixture_gradient(weights, self.truths[indices]).mul_(divisors.unsqueeze(2))


class BatchedSparseGates(BatchedGates):
    """Gates over a few experts each, with noise on the scores (Shazeer et al. 2017).

    The outputs are the scores of the experts and, before a softplus, the scales of the noise. Initial scores are equal
    and the scales softplus(0), so that experts are at first chosen uniformly. The reader is always part of the mixture.
    """

    def __init__(
        self,
        logits: np.ndarray,
        labels: np.ndarray,
        inside: Sequence[np.ndarray],
        choices: Sequence[ExpertChoice],
        top_k: int,
        width: int,
        schedule: Schedule,
        seed: int,
    ) -> None:
        """Take logits (M, N, C), labels (N,), and each fit's rows, int64 (n,), and equally many experts."""
        # The table has one row for each image and each member that any of the gates reads.
        readers = [int(choice.experts[choice.reader]) for choice in choices]
        read = sorted(set(readers))
        raw = features(logits[read], KIND).reshape(-1, logits.shape[2])
        fits = []
        for indices, reader in zip(inside, readers, strict=True):
            places = indices * len(read) + read.index(reader)
            fits.append(FitRows(places, *standardisation(raw[places], [raw.shape[1]])))
        (n_experts,) = {len(choice.experts) for choice in choices}
        super().__init__(
            torch.from_numpy(raw.astype(np.float32)),
            torch.from_numpy(labels),
            fits,
            [raw.shape[1], width, 2 * n_experts],
            schedule,
            seed=seed,
        )
        self.logits, self.choices, self.n_read = logits, list(choices), len(read)
        self.top_k = min(top_k, n_experts)
        used = np.unique([choice.experts for choice in choices])
        self.truths = _truths(softmax(logits[used]), labels)  # (N, U)
        places_of_experts = np.stack([np.searchsorted(used, choice.experts) for choice in choices])
        self.experts = torch.from_numpy(places_of_experts).unsqueeze(1)
        self.is_reader = torch.tensor([[choice.reader] for choice in choices]).unsqueeze(2) == torch.arange(n_experts)

    def keep(self, numbers: Sequence[int]) -> None:
        """Keep the fits at these indices unchanged, with their state of AdamW, and drop all others."""
        self.choices = [self.choices[number] for number in numbers]
        self.experts, self.is_reader = self.experts[list(numbers)], self.is_reader[list(numbers)]
        super().keep(numbers)

    def gate(self, number: int) -> SparseGate:
        """Return one gate as it is now; before the first epoch, the mean of the first `top_k` experts."""
        experts, reader = self.choices[number].experts, self.choices[number].reader
        if not self.epoch:
            return fixed_gate(experts[: self.top_k], self.logits.shape[2])
        (hidden, outputs), (hidden_bias, outputs_bias) = self.layers(number)
        scores, scores_bias = outputs[:, : len(experts)].copy(), outputs_bias[: len(experts)].copy()
        return SparseGate(experts, reader, self.top_k, (hidden, scores), (hidden_bias, scores_bias))

    def predict(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Return the probabilities float32 (n, C) of one gate's mixture for rows, int64 (n,)."""
        return self.gate(number).predict_proba(self.logits[:, rows]).astype(np.float32)

    def _score_gradient(self, scores: Tensor, indices: Tensor, divisors: Tensor) -> Tensor:
        means, spreads = scores.chunk(2, dim=2)
        truths = self.truths[indices // self.n_read].gather(2, self.experts.expand(means.shape))
        draws = [np.random.Generator(noise).standard_normal(means.shape[1:], dtype=np.float32) for noise in self.noise]
        noise = torch.from_numpy(np.stack(draws))
        return sparse_gradient(means, spreads, noise, truths, divisors, self.is_reader, self.top_k)


def mixture_gradient(weights: Tensor, truths: Tensor) -> Tensor:
    """Return the gradient (B, n, M) of each row's log-loss of a mixture with respect to the logits of its weights.

    Takes the weights (B, n, M), softmax of the logits, and the members' probabilities of the true class (B, n, M).
    """
    mixed = (weights * truths).sum(dim=2, keepdim=True)
    # Below the smallest probability the loss is constant.
    return weights * (1 - truths / mixed.clamp_min(SMALLEST_PROBABILITY)) * (mixed >= SMALLEST_PROBABILITY)


def sparse_gradient(
    scores: Tensor, spreads: Tensor, noise: Tensor, truths: Tensor, divisors: Tensor, is_reader: Tensor, top_k: int
) -> Tensor:
    """Return the gradient (B, n, 2 E) with respect to scores and spreads, (B, n, E) each, of each gate's loss.

    The loss is the mean log-loss of the mixture, plus weighted load-balancing loss and z-loss. The load-balancing loss
    is E times the sum over experts of the fraction of choices times the mean probability under the softmax over all E
    experts: with a softmax over the chosen experts only, it would not lower the probability of an expert that is
    chosen too often (Fedus et al. 2022). The z-loss is the mean squared log-sum-exp of the scores (Zoph et al. 2022).

    Takes noise and the experts' probabilities of the true class (B, n, E), divisors (B, n), which are 0 for rows of
    padding, and which expert is the reader, bool (B, 1, E).
    """
    divisors, n_experts = divisors.unsqueeze(2), scores.shape[2]
    noisy = scores + noise * torch.nn.functional.softplus(spreads)
    largest = noisy.topk(top_k, dim=2).indices
    chosen = torch.zeros(noisy.shape, dtype=torch.bool).scatter_(2, largest, True)
    of_noisy = mixture_gradient(shares(noisy, chosen | is_reader), truths).mul_(divisors)
    fractions = (chosen * divisors).sum(dim=1, keepdim=True)
    fractions = fractions / fractions.sum(dim=2, keepdim=True)
    probabilities = torch.softmax(scores, dim=2)
    of_balance = n_experts * probabilities * (fractions - (fractions * probabilities).sum(dim=2, keepdim=True))
    of_z = 2 * torch.logsumexp(scores, dim=2, keepdim=True) * probabilities
    of_scores = of_noisy + (BALANCE * of_balance + Z * of_z).mul_(divisors)
    return torch.cat([of_scores, of_noisy * noise * torch.sigmoid(spreads)], dim=2)


def _truths(probabilities: np.ndarray, labels: np.ndarray) -> Tensor:
    """Return each member's probability of the true class float32 (N, M), of probabilities (M, N, C)."""
    return torch.from_numpy(probabilities[:, np.arange(len(labels)), labels].T.astype(np.float32))
