"""Fitted gates: small networks that read members' log-probabilities and weight the members for each image.

`AttentionGate` weights all inputs (a mixture of fixed experts, Jacobs et al. 1991). `SparseGate` reads one cheap expert
and selects the few experts to run: noisy top-k gating (Shazeer et al. 2017) with a load-balancing loss on the softmax
over all experts (Fedus et al. 2022) and a z-loss (Zoph et al. 2022), so that not all images are routed to the same
experts. They are trained by `utils.combiners.gate_learners`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from utils.combiners.stacking_features import features
from utils.numeric.metrics import softmax

KIND = "log_probabilities"
"""Kind of the features that gates read."""
SCORE_STEP = 2.0**-20
"""Multiples of it are compared when experts are selected: a power of two, so that the division is exact."""
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
        return self._weights(features(logits, KIND))

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        return self.mixed(features(logits, KIND), softmax(logits))

    def mixed(self, values: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        """Features (N, F) and the members' probabilities (M, N, C) -> probabilities (N, C)."""
        return np.einsum("nm,mnc->nc", self._weights(values), probabilities)

    def _weights(self, values: np.ndarray) -> np.ndarray:
        """Features (N, F) -> weights (N, M)."""
        return softmax(_scores(values, self.matrices, self.biases))


@dataclass(frozen=True)
class ExpertChoice:
    """The experts of one gate."""

    experts: np.ndarray
    """int64 (E,): their indices among the M members, the best first"""
    reader: int
    """Index among the experts of the one that the gate reads"""


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
        return _scores(features(logits[self.experts[[self.reader]]], KIND), self.matrices, self.biases)

    def weights(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> weights (N, E) that sum to 1: 0 for all but the `top_k` largest and the reader."""
        scores = self.scores(logits)
        takes_part = self.chosen(scores)
        takes_part[:, self.reader] = True
        return softmax(np.where(takes_part, scores, -np.inf))

    def chosen(self, scores: np.ndarray) -> np.ndarray:
        """Return which scores (N, E) are the `top_k` largest of their row, bool; ties go to the better experts.

        Scores that agree up to `SCORE_STEP` are ties: after few steps of Adam, which are of equal size at first,
        experts differ by rounding errors only, which are others in an exported file.
        """
        mask = np.zeros(scores.shape, dtype=bool)
        order = np.argsort(-np.round(scores / SCORE_STEP), axis=1, kind="stable")[:, : self.top_k]
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


def fixed_gate(experts: np.ndarray, classes: int) -> SparseGate:
    """Return a gate that averages these experts (E,) for every image."""
    zeros = np.zeros((classes, 1), dtype=np.float32), np.zeros((1, len(experts)), dtype=np.float32)
    return SparseGate(experts, 0, len(experts), zeros, (zeros[0][0].copy(), zeros[1][0].copy()))


def _scores(values: np.ndarray, matrices: Pair, biases: Pair) -> np.ndarray:
    """Features (N, F) -> scores float64 (N, E)."""
    hidden = values @ matrices[0].astype(np.float64) + biases[0]
    return np.maximum(hidden, 0) @ matrices[1].astype(np.float64) + biases[1]
