"""A gate: looks at what one cheap expert says of an image and names the few experts that are worth running on it.

Noisy top-k gating (Shazeer et al. 2017) over experts that are trained already; a load-balance loss on the soft-max over
all experts (Fedus et al. 2022) and a z-loss (Zoph et al. 2022) keep it from sending everything one way. It reads the
expert's log-probabilities, which are honest on every row, and not its embedding, which is honest on val rows alone.
That expert has run already, so it takes part in every answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from utils.combiners.stacking_features import features, standardisation
from utils.numeric.metrics import softmax
from utils.numeric.nested_cv import evenly_spaced_epochs

if TYPE_CHECKING:
    from torch import Tensor

    from utils.combiners.routing_heads import NoisyTopK

KIND = "log_probabilities"
STOPS = 5
LEARNING_RATE = 0.003
WEIGHT_DECAY = 1.0  # of AdamW, as in utils/combiners/perceptron.py
BALANCE, Z = 0.01, 0.001  # weights of the two losses, as in the papers


@dataclass(frozen=True)
class SparseGate:
    """A fitted gate over E experts."""

    experts: np.ndarray
    """int64 (E,): their places among the M members, the best first"""
    reader: int
    """Which of the experts it reads."""
    top_k: int
    matrices: tuple[np.ndarray, np.ndarray]
    """float32 (C, H) and (H, E)"""
    biases: tuple[np.ndarray, np.ndarray]
    """float32 (H,) and (E,)"""

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> scores float64 (N, E), from the reader's logits alone."""
        read = features(logits[self.experts[[self.reader]]], KIND)
        hidden = np.maximum(read @ self.matrices[0].astype(np.float64) + self.biases[0], 0)
        return hidden @ self.matrices[1].astype(np.float64) + self.biases[1]

    def weights(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> weights (N, E) that sum to 1: 0 for all but the `top_k` largest and the reader."""
        scores = self.scores(logits)
        takes_part = self.chosen(scores)
        takes_part[:, self.reader] = True
        return softmax(np.where(takes_part, scores, -np.inf))

    def chosen(self, scores: np.ndarray) -> np.ndarray:
        """The `top_k` largest of scores (N, E), bool; of equals the better experts."""
        found = np.zeros(scores.shape, dtype=bool)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self.top_k]
        np.put_along_axis(found, order, True, axis=1)
        return found

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        return np.einsum("ne,enc->nc", self.weights(logits), softmax(logits[self.experts]))

    def route(self, logits: np.ndarray, ran: np.ndarray) -> np.ndarray:
        """First the reader, then whom it names; as `utils.combiners.routing.Sparse.route`."""
        reader = self.experts[self.reader]
        wanted = np.zeros(ran.shape, dtype=bool)
        wanted[self.experts] = (self.weights(logits) > 0).T & ran[reader]
        wanted[reader] = True
        return wanted & ~ran


@dataclass(frozen=True)
class GateLearner:
    """Which experts, and one training of their gate stopped at several epochs; all from the rows given."""

    choose: Callable[[np.ndarray, np.ndarray], Sequence[int]]
    """Logits (M, N, C), labels (N,) -> places of the experts, the best first."""
    top_k: int
    width: int
    epochs: int
    seed: int
    fixed: bool = True
    """Whether the first `top_k` experts for every image may take the place of a gate."""
    costs: np.ndarray | None = None
    """float64 (M,): what running a member costs, in any unit; None where nobody knows"""
    thread_safe: ClassVar[bool] = False  # torch's random numbers are the process's

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """The shortest training first; 0 epochs are the same experts for every image."""
        return [{"epochs": stop} for stop in self._stops()]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Probabilities float32 (G, H, C) of held-out logits (M, H, C) after trainings on logits (M, N, C)."""
        gates = self._gates(logits, labels, self._stops())
        return np.stack([gate.predict_proba(held_out).astype(np.float32) for gate in gates])

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> SparseGate:
        """The gate under one setting: the same schedule, stopped where the setting says."""
        (gate,) = self._gates(logits, labels, [setting["epochs"]])
        return gate

    def _stops(self) -> list[int]:
        return [*([0] if self.fixed else []), *evenly_spaced_epochs(self.epochs, STOPS)]

    def _gates(self, logits: np.ndarray, labels: np.ndarray, stops: Sequence[int]) -> Iterator[SparseGate]:
        experts = np.array(self.choose(logits, labels), dtype=np.int64)
        if 0 in stops:
            yield always(experts[: self.top_k], logits.shape[2])
        if any(stops):
            yield from self._trained(experts, logits, labels, [stop for stop in stops if stop])

    def _trained(
        self, experts: np.ndarray, logits: np.ndarray, labels: np.ndarray, stops: Sequence[int]
    ) -> Iterator[SparseGate]:
        import torch

        from utils.combiners.routing_heads import NoisyTopK
        from utils.numeric.module_training import train_module

        reader = 0 if self.costs is None else int(np.argmin(self.costs[experts]))
        top_k, rows, classes = min(self.top_k, len(experts)), logits.shape[1], logits.shape[2]
        raw = features(logits[experts[[reader]]], KIND)
        centre, scale = standardisation(raw, [classes])
        said = softmax(logits[experts]).transpose(1, 0, 2).reshape(rows, -1)
        inputs = np.concatenate([(raw - centre) / scale, said], axis=1).astype(np.float32)

        modules = train_module(
            lambda: NoisyTopK((classes, self.width, len(experts), classes), top_k, reader),
            torch.from_numpy(inputs),
            torch.from_numpy(labels),
            epochs=self.epochs,
            checkpoint_epochs=stops,
            lr=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            seed=self.seed,
            loss=lambda gate, *batch: objective(gate, *batch, torch.randn(len(batch[0]), len(experts))),
        )
        for module in modules:
            first = module.hidden.weight.detach().numpy().astype(np.float64).T / scale[:, None]
            bias = module.hidden.bias.detach().numpy() - centre @ first
            last = module.scores.weight.detach().numpy().T.copy()
            yield SparseGate(
                experts,
                reader,
                top_k,
                (first.astype(np.float32), last),
                (bias.astype(np.float32), module.scores.bias.detach().numpy().copy()),
            )


def objective(gate: NoisyTopK, rows: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """What a gate is trained to make small: log-loss of the mixture, and a little of balance and z-loss."""
    from torch.nn.functional import nll_loss

    from utils.combiners.routing_heads import balance_loss, z_loss

    found = gate(rows, noise)
    balance = balance_loss(found.scores, found.chosen)
    return nll_loss(found.log_probabilities, labels) + BALANCE * balance + Z * z_loss(found.scores)


def always(experts: np.ndarray, classes: int) -> SparseGate:
    """The plain mean of these experts for every image, in the form of a gate."""
    zeros = np.zeros((classes, 1), dtype=np.float32), np.zeros((1, len(experts)), dtype=np.float32)
    return SparseGate(experts, 0, len(experts), zeros, (zeros[0][0].copy(), zeros[1][0].copy()))
