"""Votes and single members with a temperature: the baselines and fallbacks of learned ensembles.

A vote keeps the members' raw probabilities, which are as overconfident as the networks; a fitted ensemble beats it by
its temperature alone. These combiners therefore have a temperature selected on held-out folds, which does not change
the predicted classes, and the mixture with the uniform distribution of every fit. With
`runs.score_ensemble.calibration: auto`, held-out folds may select vector or Dirichlet scaling instead, which can change
predicted classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from utils.combiners.pooled_members import POOLS, Floats, PooledMembers
from utils.combiners.protocol import MemberFacts, fit_crossfitted, unsaved
from utils.core.config import Config
from utils.numeric import class_scaling, temperature
from utils.numeric.class_scaling import ClassScaling
from utils.numeric.metrics import log_loss, softmax

if TYPE_CHECKING:
    from torch import nn


@dataclass(kw_only=True)
class CalibratedVote(PooledMembers):
    """Base class: fixed weights, and a temperature of the pool if it lowers the held-out log-loss.

    With `per_member`, each member's logits are first divided by a temperature of this member.
    """

    settings: ClassVar[tuple[str, ...]] = ("runs.score_ensemble.temperature", "runs.score_ensemble.calibration")
    kind: ClassVar[str] = "linear"
    """Name of the pool."""

    scales_classes: bool = unsaved(False)
    """Whether held-out folds may select vector or Dirichlet scaling."""
    scaling: ClassScaling | None = unsaved(None)
    """Replaces the pool's temperature where it is not None."""

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """Return an unfitted combiner with the kind of temperature and calibration of `runs.score_ensemble`."""
        score_ensemble = config.runs.score_ensemble
        return cls(
            metric="log_loss",
            calibration=score_ensemble.temperature,
            scales_classes=score_ensemble.calibration == "auto",
        )

    def _fit(self, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> None:
        """Fit on logits (M, N, C), labels (N,), folds (N,); temperatures are 1 with one fold or one class."""
        testable = bool(np.ptp(folds)) and bool(np.ptp(labels))
        self.pool, self.temperature, self.member_temperatures = POOLS[self.kind], 1.0, np.ones(len(logits))
        self.scaling, self.facts = None, {}
        if testable and self.calibration == "per_member":
            self.member_temperatures = temperature.select_member_temperatures(logits, labels, folds)
        parts = self.pool.parts(self._scores(logits))
        self.weights = self._member_weights(parts, labels)
        if testable:
            pooled = self.pool.pooled(np.tensordot(self.weights, parts, axes=1))
            self.temperature = temperature.select_temperature(pooled, labels, folds).temperature
            selected = class_scaling.select(pooled, labels, folds) if self.scales_classes else None
            if selected:
                self.scaling, kind = selected
                self.temperature = self.scaling.temperature
                self.facts = {"class_scaling": kind}

    def _predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        if self.scaling is None:
            return super()._predict_proba(logits)
        return softmax(self.scaling.apply(self._pooled(logits)))

    def _to_module(self) -> nn.Module:
        """Logits (B, M, C) -> probabilities (B, C)."""
        if self.scaling is None:
            return super()._to_module()
        from utils.combiners.heads import ScaledClasses

        return ScaledClasses(self._to_pool(), self.scaling.matrix, self.scaling.bias)

    def fitted_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of the pool, and the matrix (C, C) and bias (C,) of the class scaling if there is one."""
        arrays = super().fitted_arrays()
        if self.scaling is not None:
            arrays |= {"scaling_matrix": self.scaling.matrix, "scaling_bias": self.scaling.bias}
        return arrays

    def set_fitted_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set the pool and, if there is one, the class scaling."""
        super().set_fitted_arrays(arrays)
        if "scaling_matrix" in arrays:
            self.scaling = ClassScaling(self.temperature, arrays["scaling_matrix"], arrays["scaling_bias"])

    @abstractmethod
    def _member_weights(self, parts: Floats, labels: np.ndarray) -> Floats:
        """Return weights (M,) that sum to 1, for parts (M, N, C) of the pool and labels (N,)."""


class CalibratedSoftVoting(CalibratedVote):
    """Mean of the members' probabilities, at a temperature."""

    def _member_weights(self, parts: Floats, labels: np.ndarray) -> Floats:
        return np.full(len(parts), 1 / len(parts))


class CalibratedLogitAveraging(CalibratedSoftVoting):
    """Normalised geometric mean of the members' probabilities, at a temperature."""

    kind: ClassVar[str] = "log_linear"


class CalibratedBestSingle(CalibratedVote):
    """The single member of least log-loss, each compared at its fitted temperature."""

    kind: ClassVar[str] = "log_linear"

    def _member_weights(self, parts: Floats, labels: np.ndarray) -> Floats:
        losses = []
        for scores in parts:
            divisor = temperature.fit_temperature(scores, labels)
            losses.append(log_loss(np.exp(self.pool.pooled(scores / divisor)), labels))
        return np.eye(len(parts))[int(np.argmin(losses))]


def calibrated_probabilities(logits: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Return float32 probabilities (N, C) of one member's logits (N, C), cross-fitted over folds (N,).

    For each fold, the temperature and the mixture weight are from a fit on the other folds with labels (N,).
    """
    return fit_crossfitted(CalibratedSoftVoting(), logits[None], labels, folds)
