"""The two kinds of pool of members, and the base class of combiners that are a pool with weights and temperatures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from utils.combiners.protocol import Combiner, unsaved
from utils.numeric import pools, weight_search
from utils.numeric.metrics import METRICS, SMALLEST_PROBABILITY, clipped_log, log_softmax, softmax

if TYPE_CHECKING:
    from torch import nn

    from utils.combiners.heads import LinearPool, LogLinearPool

LOWEST_SCORE = float(np.log(SMALLEST_PROBABILITY))
"""Lower bound at which members' log-probabilities are clipped."""
Floats = NDArray[np.float64]


class Pool(Protocol):
    """A map from weighted members to probabilities, and the loss that its weights minimise."""

    name: str
    sums: tuple[float, float]
    """Bounds of the sum of the weights."""
    scales: bool
    """Whether the sum of the weights is free, an inverse temperature."""

    def parts(self, scores: Floats) -> Floats:
        """Return the summands (M, N, C) of the weighted sum, from log-probabilities (M, N, C)."""

    def pooled(self, sums: Floats) -> Floats:
        """Return log-probabilities (..., N, C) of weighted sums of the parts."""

    def loss(self, parts: Floats, labels: NDArray[Any], metric: str) -> weight_search.ConvexLoss:
        """Return the convex loss, `metric` itself or its surrogate, of parts (M, N, C) and labels (N,)."""

    def votes(self, parts: Floats) -> NDArray[np.float32]:
        """Return numbers (M, N, C) from 0 to 1 whose weighted sums have the same argmax as those of the parts."""


class LinearPooling:
    """Mixture of probabilities."""

    name = "linear"
    sums = (1.0, 1.0)
    scales = False

    def parts(self, scores: Floats) -> Floats:
        return np.exp(scores)

    def pooled(self, sums: Floats) -> Floats:
        return log_softmax(clipped_log(sums))

    def loss(self, parts: Floats, labels: NDArray[Any], metric: str) -> weight_search.ConvexLoss:
        if metric == "brier":
            return pools.LinearBrier(parts, labels)
        return pools.LinearLogLoss(parts[:, np.arange(len(labels)), labels])

    def votes(self, parts: Floats) -> NDArray[np.float32]:
        return parts.astype(np.float32)


class LogLinearPooling:
    """Softmax of the weighted sum of log-probabilities; the weights minimise the log-loss for every metric.

    The loss includes the prior on the sum of the weights (`utils.numeric.pools`).
    """

    name = "log_linear"
    sums = pools.SUM_BOUNDS
    scales = True

    def parts(self, scores: Floats) -> Floats:
        return scores

    def pooled(self, sums: Floats) -> Floats:
        return log_softmax(sums)

    def loss(self, parts: Floats, labels: NDArray[Any], metric: str) -> weight_search.ConvexLoss:
        return pools.LogLinearObjective(parts, labels)

    def votes(self, parts: Floats) -> NDArray[np.float32]:
        return (1 - parts / LOWEST_SCORE).astype(np.float32)


POOLS: dict[str, Pool] = {pool.name: pool for pool in (LinearPooling(), LogLinearPooling())}


@dataclass(kw_only=True)
class PooledMembers(Combiner):
    """Base class of combiners that pool members with weights and temperatures; subclasses fit the weights.

    Weights are normalised to sum to 1; the sum of log-linear weights before that is the inverse temperature.
    """

    learns: ClassVar[bool] = True

    metric: str = unsaved("f1_macro")
    calibration: str = unsaved("auto")
    """auto, off or per_member"""
    pool: Pool = unsaved(POOLS["linear"])
    weights: Floats = unsaved(factory=lambda: np.ones(0))
    """(M,), sum 1"""
    temperature: float = unsaved(1.0)
    member_temperatures: Floats = unsaved(factory=lambda: np.ones(0))
    """(M,)"""
    facts: dict[str, Any] = unsaved(factory=dict)
    """Facts about the fit, for `report`."""

    def _predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        return softmax(self._pooled(logits) / self.temperature)

    def _to_module(self) -> nn.Module:
        """Logits (B, M, C) -> probabilities (B, C)."""
        return self._to_pool()

    def _to_pool(self) -> LinearPool | LogLinearPool:
        from utils.combiners import heads

        make = heads.LinearPool if self.pool.name == "linear" else heads.LogLinearPool
        return make(self.weights, self.temperature, self.member_temperatures)

    def fitted_arrays(self) -> dict[str, np.ndarray]:
        """Return weights and temperatures of the members, (M,), and the pool's temperature and kind, (1,)."""
        return {
            "shares": self.weights,
            "member_temperatures": self.member_temperatures,
            "temperature": np.array([self.temperature]),
            "log_linear": np.array([self.pool.name == "log_linear"], dtype=np.uint8),
        }

    def set_fitted_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set weights, temperatures and kind of the pool."""
        self.pool = POOLS["log_linear" if arrays["log_linear"][0] else "linear"]
        self.weights, self.member_temperatures = arrays["shares"], arrays["member_temperatures"]
        self.temperature = float(arrays["temperature"][0])

    def used(self, members: int) -> np.ndarray:
        """Return which members have a positive weight, bool (M,)."""
        return self.weights > 0

    def restricted(self, used: np.ndarray) -> Self:
        """Return the same map on the logits of the used members."""
        state = self.state()
        return self.from_state({**state, **{key: state[key][used] for key in ("shares", "member_temperatures")}})

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return weights by name, pool and temperature, and facts about the fit.

        `selection_score` is the score on the rows of the fit, `cross_validated_score` that on held-out folds, both by
        `optimization_metric`; `equal_weights_score` is that of the unweighted mean of the probabilities.
        """
        record: dict[str, Any] = {
            "weights": dict(zip(names, self.weights.tolist(), strict=True)),
            "pool": self.pool.name,
            "temperature": self.temperature,
            "member_temperatures": None,
            "optimization_metric": self.metric,
            **self.facts,
        }
        if (self.member_temperatures != 1).any():
            record["member_temperatures"] = dict(zip(names, self.member_temperatures.tolist(), strict=True))
        return record

    def _compared(
        self, crossfit: Floats | None, logits: np.ndarray, labels: np.ndarray, notes: list[str]
    ) -> dict[str, Any]:
        """Return scores for `report`; `crossfit` are the cross-fitted probabilities (N, C)."""
        metric = METRICS[self.metric]
        equal = metric.function(softmax(logits).mean(axis=0), labels)
        crossfit_score = None if crossfit is None else metric.function(crossfit, labels)
        beats_equal = None
        if crossfit_score is not None and np.ptp(labels):
            beats_equal = crossfit_score > equal if metric.higher_is_better else crossfit_score < equal
            if not beats_equal:
                scores = f"{self.metric} {equal:.4f} with them, {crossfit_score:.4f} with these"
                notes = [*notes, f"equal weights are not beaten: {scores}"]
        return {
            "selection_score": metric.function(self.predict_proba(logits), labels),
            "cross_validated_score": crossfit_score,
            "equal_weights_score": equal,
            "beats_equal_weights": beats_equal,
            "notes": notes,
        }

    def _pooled(self, logits: np.ndarray) -> Floats:
        """Logits (M, N, C) -> log-probabilities (N, C) of the pool at temperature 1."""
        return self.pool.pooled(np.tensordot(self.weights, self.pool.parts(self._scores(logits)), axes=1))

    def _scores(self, logits: np.ndarray) -> Floats:
        divided = np.asarray(logits, dtype=np.float64) / self.member_temperatures[:, None, None]
        return np.maximum(log_softmax(divided), LOWEST_SCORE)
