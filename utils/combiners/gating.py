"""Gates: small networks that read members' log-probabilities and weight the members for each image.

`AttentionGate` weights all inputs (a mixture of fixed experts, Jacobs et al. 1991). `SparseGate` reads one cheap expert
and selects the few experts to run: noisy top-k gating (Shazeer et al. 2017) with a load-balancing loss on the softmax
over all experts (Fedus et al. 2022) and a z-loss (Zoph et al. 2022), so that not all images are routed to the same
experts. A gate reads log-probabilities, which are out-of-sample on every row, and not embeddings, which are
out-of-sample on val rows only. The last layer is initialised to zero, so that training starts from equal weights.
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

    from utils.combiners.routing_heads import GateNetwork, NoisyTopK
    from utils.numeric.module_training import BatchLoss

KIND = "log_probabilities"
"""Kind of the features that gates read."""
ATTENTION_STOPS, SPARSE_STOPS = 6, 5
LEARNING_RATE = 0.003  # of sparse gates; attention gates use the configured one
WEIGHT_DECAY = 1.0  # of AdamW, as in utils/combiners/perceptron.py
BALANCE, Z = 0.01, 0.001  # weights of the load-balancing loss and the z-loss, as in the papers
Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class AttentionGate:
    """A fitted gate over all M inputs: unstandardised features -> hidden layer -> one score per input."""

    matrices: Pair
    """float32 (F, H) and (H, M)"""
    biases: Pair
    """float32 (H,) and (M,)"""

    def weights(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> weights (N, M) that sum to 1."""
        return softmax(_scores(logits, self.matrices, self.biases))

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        return np.einsum("nm,mnc->nc", self.weights(logits), softmax(logits))


@dataclass(frozen=True)
class SparseGate:
    """A fitted gate over E experts."""

    experts: np.ndarray
    """int64 (E,): their indices among the M members, the best first"""
    reader: int
    """Index of the expert that the gate reads. Since it has run already, it is part of every prediction."""
    top_k: int
    matrices: Pair
    """float32 (C, H) and (H, E)"""
    biases: Pair
    """float32 (H,) and (E,)"""

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> scores float64 (N, E), from the reader's logits only."""
        return _scores(logits[self.experts[[self.reader]]], self.matrices, self.biases)

    def weights(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> weights (N, E) that sum to 1: 0 for all but the `top_k` largest and the reader."""
        scores = self.scores(logits)
        takes_part = self.chosen(scores)
        takes_part[:, self.reader] = True
        return softmax(np.where(takes_part, scores, -np.inf))

    def chosen(self, scores: np.ndarray) -> np.ndarray:
        """Return which scores (N, E) are the `top_k` largest of their row, bool; ties go to the better experts."""
        mask = np.zeros(scores.shape, dtype=bool)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self.top_k]
        np.put_along_axis(mask, order, True, axis=1)
        return mask

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        return np.einsum("ne,enc->nc", self.weights(logits), softmax(logits[self.experts]))

    def route(self, logits: np.ndarray, ran: np.ndarray) -> np.ndarray:
        """Request the reader, then the experts that it selects; see `utils.combiners.routing.SparseCombiner.route`."""
        reader = self.experts[self.reader]
        requested = np.zeros(ran.shape, dtype=bool)
        requested[self.experts] = (self.weights(logits) > 0).T & ran[reader]
        requested[reader] = True
        return requested & ~ran


@dataclass(frozen=True)
class AttentionLearner:
    """One training of one width, evaluated at several epochs."""

    width: int
    epochs: int
    lr: float
    seed: int
    thread_safe: ClassVar[bool] = False  # torch's random number generator is global to the process

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Return the settings, the fewest epochs first."""
        return [{"epochs": stop} for stop in self._stops()]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Return probabilities float32 (G, H, C) of held-out logits (M, H, C) after training on logits (M, N, C)."""
        gates = self._train(logits, labels, self._stops())
        return np.stack([gate.predict_proba(held_out).astype(np.float32) for gate in gates])

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> AttentionGate:
        """Return the gate under one setting: the same schedule, stopped at the setting's epoch."""
        (gate,) = self._train(logits, labels, [setting["epochs"]])
        return gate

    def _stops(self) -> list[int]:
        return evenly_spaced_epochs(self.epochs, ATTENTION_STOPS)

    def _train(self, logits: np.ndarray, labels: np.ndarray, stops: Sequence[int]) -> Iterator[AttentionGate]:
        from utils.combiners.routing_heads import AttentionMixture
        from utils.numeric.module_training import cross_entropy

        members, _, classes = logits.shape
        layers = _trained_layers(
            lambda: AttentionMixture(self.width, members, classes),
            logits,
            logits,
            labels,
            epochs=self.epochs,
            stops=stops,
            lr=self.lr,
            seed=self.seed,
            loss=cross_entropy,
        )
        for matrices, biases in layers:
            yield AttentionGate(matrices, biases)


@dataclass(frozen=True)
class GateLearner:
    """Selection of the experts, and one training of their gate evaluated at several epochs, on the rows of the fit."""

    choose: Callable[[np.ndarray, np.ndarray], Sequence[int]]
    """Logits (M, N, C), labels (N,) -> indices of the experts, the best first."""
    top_k: int
    width: int
    epochs: int
    seed: int
    fixed: bool = True
    """Whether the settings include the first `top_k` experts for every image, without a gate."""
    costs: np.ndarray | None = None
    """float64 (M,): cost of running a member, in any unit; None if costs are unknown"""
    thread_safe: ClassVar[bool] = False  # torch's random number generator is global to the process

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Return the settings, the fewest epochs first; 0 epochs stands for the same experts for every image."""
        return [{"epochs": stop} for stop in self._stops()]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Return probabilities float32 (G, H, C) of held-out logits (M, H, C) after training on logits (M, N, C)."""
        gates = self._gates(logits, labels, self._stops())
        return np.stack([gate.predict_proba(held_out).astype(np.float32) for gate in gates])

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> SparseGate:
        """Return the gate under one setting: the same schedule, stopped at the setting's epoch."""
        (gate,) = self._gates(logits, labels, [setting["epochs"]])
        return gate

    def _stops(self) -> list[int]:
        return [*([0] if self.fixed else []), *evenly_spaced_epochs(self.epochs, SPARSE_STOPS)]

    def _gates(self, logits: np.ndarray, labels: np.ndarray, stops: Sequence[int]) -> Iterator[SparseGate]:
        experts = np.array(self.choose(logits, labels), dtype=np.int64)
        if 0 in stops:
            yield fixed_gate(experts[: self.top_k], logits.shape[2])
        if any(stops):
            yield from self._trained(experts, logits, labels, [stop for stop in stops if stop])

    def _trained(
        self, experts: np.ndarray, logits: np.ndarray, labels: np.ndarray, stops: Sequence[int]
    ) -> Iterator[SparseGate]:
        import torch

        from utils.combiners.routing_heads import NoisyTopK

        reader = 0 if self.costs is None else int(np.argmin(self.costs[experts]))
        top_k, classes = min(self.top_k, len(experts)), logits.shape[2]
        layers = _trained_layers(
            lambda: NoisyTopK((classes, self.width, len(experts), classes), top_k, reader),
            logits[experts[[reader]]],
            logits[experts],
            labels,
            epochs=self.epochs,
            stops=stops,
            lr=LEARNING_RATE,
            seed=self.seed,
            loss=lambda gate, rows, labels: gate_loss(gate, rows, labels, torch.randn(len(rows), len(experts))),
        )
        for matrices, biases in layers:
            yield SparseGate(experts, reader, top_k, matrices, biases)


def gate_loss(gate: NoisyTopK, rows: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """Return the training loss of a gate: log-loss of the mixture plus weighted load-balancing loss and z-loss.

    `rows` (B, F + E x C) and `noise` (B, E) are the inputs of `NoisyTopK`, `labels` are (B,).
    """
    from torch.nn.functional import nll_loss

    from utils.combiners.routing_heads import balance_loss, z_loss

    output = gate(rows, noise)
    balance = balance_loss(output.scores, output.chosen)
    return nll_loss(output.log_probabilities, labels) + BALANCE * balance + Z * z_loss(output.scores)


def fixed_gate(experts: np.ndarray, classes: int) -> SparseGate:
    """Return a gate that averages these experts (E,) for every image."""
    zeros = np.zeros((classes, 1), dtype=np.float32), np.zeros((1, len(experts)), dtype=np.float32)
    return SparseGate(experts, 0, len(experts), zeros, (zeros[0][0].copy(), zeros[1][0].copy()))


def _scores(logits: np.ndarray, matrices: Pair, biases: Pair) -> np.ndarray:
    """Logits (R, N, C) of the members that a gate reads -> its scores float64 (N, E)."""
    hidden = features(logits, KIND) @ matrices[0].astype(np.float64) + biases[0]
    return np.maximum(hidden, 0) @ matrices[1].astype(np.float64) + biases[1]


def _trained_layers(
    make_network: Callable[[], GateNetwork],
    read: np.ndarray,
    mixed: np.ndarray,
    labels: np.ndarray,
    *,
    epochs: int,
    stops: Sequence[int],
    lr: float,
    seed: int,
    loss: BatchLoss,
) -> Iterator[tuple[Pair, Pair]]:
    """Train a gate that reads logits (R, N, C) and mixes members of logits (E, N, C); yield its layers at each stop.

    Layers are two matrices and two biases, with the standardisation of the features folded into the first layer.
    """
    import torch

    from utils.numeric.module_training import train_module

    raw = features(read, KIND)
    centre, scale = standardisation(raw, [raw.shape[1]])
    probabilities = softmax(mixed).transpose(1, 0, 2).reshape(len(labels), -1)
    inputs = np.concatenate([(raw - centre) / scale, probabilities], axis=1).astype(np.float32)
    networks = train_module(
        make_network,
        torch.from_numpy(inputs),
        torch.from_numpy(labels),
        epochs=epochs,
        checkpoint_epochs=stops,
        lr=lr,
        weight_decay=WEIGHT_DECAY,
        seed=seed,
        loss=loss,
    )
    for network in networks:
        first, first_bias, last, last_bias = network.layer_arrays()
        matrix = first.astype(np.float64).T / scale[:, None]
        bias = first_bias - centre @ matrix
        yield (matrix.astype(np.float32), last.T.copy()), (bias.astype(np.float32), last_bias.copy())
