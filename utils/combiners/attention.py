"""Attention over inputs: a mixture whose weights depend on what the inputs say of the image, trained in memory.

A small network looks at all inputs' outputs and gives each input a weight; the weights are non-negative and sum to 1.
Its last layer starts at zero, so that training starts from the plain mean. A mixture of experts whose experts are fixed
(Jacobs et al. 1991).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from utils.combiners.stacking_features import features, standardisation
from utils.numeric.metrics import SMALLEST_PROBABILITY, softmax
from utils.numeric.nested_cv import evenly_spaced_epochs

KIND = "log_probabilities"
STOPS = 6
WEIGHT_DECAY = 1.0  # of AdamW, as in utils/combiners/perceptron.py


@dataclass(frozen=True)
class AttentionGate:
    """A fitted gate: features -> hidden -> one score per input, for features as they are."""

    matrices: tuple[np.ndarray, np.ndarray]
    """float32 (F, H) and (H, M)"""
    biases: tuple[np.ndarray, np.ndarray]
    """float32 (H,) and (M,)"""

    def weights(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> weights (N, M) that sum to 1."""
        hidden = features(logits, KIND) @ self.matrices[0].astype(np.float64) + self.biases[0]
        return softmax(np.maximum(hidden, 0) @ self.matrices[1].astype(np.float64) + self.biases[1])

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        return np.einsum("nm,mnc->nc", self.weights(logits), softmax(logits))


@dataclass(frozen=True)
class AttentionLearner:
    """One training of one width, stopped at several epochs."""

    width: int
    epochs: int
    lr: float
    seed: int
    thread_safe: ClassVar[bool] = False  # torch's random numbers are the process's

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """The shortest training first."""
        return [{"epochs": stop} for stop in self._stops()]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Probabilities float32 (G, H, C) of held-out logits (M, H, C) after trainings on logits (M, N, C)."""
        gates = list(self._train(logits, labels, self._stops()))
        return np.stack([gate.predict_proba(held_out).astype(np.float32) for gate in gates])

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> AttentionGate:
        """The gate under one setting: the same schedule, stopped where the setting says."""
        (gate,) = self._train(logits, labels, [setting["epochs"]])
        return gate

    def _stops(self) -> list[int]:
        return evenly_spaced_epochs(self.epochs, STOPS)

    def _train(self, logits: np.ndarray, labels: np.ndarray, stops: Sequence[int]) -> Iterator[AttentionGate]:
        import torch
        from torch import nn

        from utils.numeric.module_training import train_module

        members, rows, classes = logits.shape
        raw = features(logits, KIND)
        centre, scale = standardisation(raw, [members * classes])
        probabilities = softmax(logits).transpose(1, 0, 2).reshape(rows, members * classes)
        inputs = np.concatenate([(raw - centre) / scale, probabilities], axis=1).astype(np.float32)

        class Mixture(nn.Module):
            """Features and probabilities side by side -> log-probabilities of the mixture."""

            def __init__(self, width: int) -> None:
                super().__init__()
                self.hidden = nn.Linear(members * classes, width)
                self.scores = nn.Linear(width, members)
                nn.init.zeros_(self.scores.weight)
                nn.init.zeros_(self.scores.bias)

            def forward(self, values: torch.Tensor) -> torch.Tensor:
                seen, said = values.split(members * classes, dim=1)
                weights = torch.softmax(self.scores(torch.relu(self.hidden(seen))), dim=1)
                mixed = (weights[:, :, None] * said.view(-1, members, classes)).sum(dim=1)
                return mixed.clamp_min(SMALLEST_PROBABILITY).log()

        modules = train_module(
            lambda: Mixture(self.width),
            torch.from_numpy(inputs),
            torch.from_numpy(labels),
            epochs=self.epochs,
            checkpoint_epochs=stops,
            lr=self.lr,
            weight_decay=WEIGHT_DECAY,
            seed=self.seed,
        )
        for module in modules:
            first = module.hidden.weight.detach().numpy().astype(np.float64).T / scale[:, None]
            bias = module.hidden.bias.detach().numpy() - centre @ first
            last = module.scores.weight.detach().numpy().T.copy()
            yield AttentionGate(
                (first.astype(np.float32), last),
                (bias.astype(np.float32), module.scores.bias.detach().numpy().copy()),
            )
