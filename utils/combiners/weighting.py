"""The weighted ensemble: a linear or log-linear pool with penalty and temperature selected on held-out folds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from utils.combiners import pooling
from utils.combiners.pooled_members import POOLS, PooledMembers
from utils.combiners.pooling import Weighting
from utils.combiners.protocol import MemberFacts, unsaved
from utils.combiners.shared_fits import SharedFits
from utils.core.config import Config
from utils.core.errors import UserError
from utils.numeric import temperature

UNTESTED_STRENGTH = 0.01  # of the penalty, where a single fold allows no selection
Floats = NDArray[np.float64]


@dataclass(kw_only=True)
class WeightedPool(PooledMembers):
    """A linear or log-linear pool with the weights of least loss on the rows of the fit.

    Accuracy and macro F1 are piecewise constant: the search starts from the weights of least log-loss and adds members
    greedily (Caruana et al. 2004), averaged over bootstrap samples, if this raises the metric on held-out folds.
    """

    settings: ClassVar[tuple[str, ...]] = tuple(
        f"runs.score_ensemble.{key}" for key in ("optimize_weights", "optimization_metric", "pool", "temperature")
    )

    members: MemberFacts | None = unsaved()
    kind: str = unsaved("auto")
    """auto, linear or log_linear"""
    optimize_weights: bool = unsaved(True)
    """If false, weights are proportional to the recorded accuracies."""
    seed: int = unsaved(42)
    shared: SharedFits = unsaved(factory=SharedFits)

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """Return an unfitted combiner with the settings of `runs.score_ensemble`."""
        settings = config.runs.score_ensemble
        return cls(
            members=members,
            metric=settings.optimization_metric,
            kind=settings.pool,
            optimize_weights=settings.optimize_weights,
            calibration=settings.temperature,
            seed=config.seed,
        )

    def _fit(self, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> None:
        """Fit on logits (M, N, C), labels (N,) and folds (N,).

        With one fold or one class nothing can be held out, and nothing is selected. Raises UserError if the weights
        follow recorded accuracies and a member has none.
        """
        testable = bool(np.ptp(folds)) and bool(np.ptp(labels))
        calibrate = testable and self.calibration != "off"
        self.member_temperatures = np.ones(len(logits))
        if calibrate and self.calibration == "per_member":
            self.member_temperatures = temperature.select_member_temperatures(logits, labels, folds)
        weighting = self._weighted(self._scores(logits), labels, folds, testable=testable, calibrate=calibrate)
        total = float(weighting.weights.sum())
        self.pool, self.weights = weighting.pool, weighting.weights / total
        self.temperature = weighting.temperature / total
        self.facts = self._judged(weighting, logits, labels)

    def _weighted(
        self, scores: Floats, labels: np.ndarray, folds: np.ndarray, *, testable: bool, calibrate: bool
    ) -> Weighting:
        only = POOLS["linear" if self.kind == "auto" else self.kind]
        if not (self.optimize_weights and np.ptp(labels)):
            weights = np.full(len(scores), 1 / len(scores)) if self.optimize_weights else self._recorded_shares()
            return pooling.fixed_weights(only, scores, labels, folds, weights, calibrate=calibrate)
        if not testable:
            return pooling.fitted_weights(only, scores, labels, self.metric, strength=UNTESTED_STRENGTH)
        names = tuple(POOLS) if self.kind == "auto" else (self.kind,)
        tuned = [
            pooling.tuned_weights(
                POOLS[name], scores, labels, folds, self.metric, calibrate=calibrate, shared=self.shared
            )
            for name in names
        ]
        weighting = tuned[0] if len(tuned) == 1 else pooling.preferred_pool(tuned[0], tuned[1], labels, self.metric)
        if self.metric in pooling.PIECEWISE_CONSTANT:
            options: dict[str, Any] = {"seed": self.seed, "calibrate": calibrate, "shared": self.shared}
            weighting = pooling.with_members_added(weighting, scores, labels, folds, self.metric, **options)
        return weighting

    def _recorded_shares(self) -> Floats:
        assert self.members is not None, "a restored pool is not fitted again"
        recorded = self.members.recorded_accuracy
        missing = [name for name, value in zip(self.members.names, recorded, strict=True) if not value > 0]
        if missing:
            raise UserError(
                f"runs.score_ensemble.optimize_weights is false, so that weights follow the recorded accuracies, and "
                f"{', '.join(missing)} has none above 0. Measure it: python ensemble_orchestrator.py discover "
                f"--verify; or set runs.score_ensemble.optimize_weights to true"
            )
        weights: Floats = recorded / recorded.sum()
        return weights

    def _judged(self, weighting: Weighting, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        crossfit, notes = weighting.crossfit, []
        if not np.ptp(labels):
            notes.append(f"all {len(labels)} rows are of one class: nothing was fitted")
        elif crossfit is None:
            notes.append(f"one fold only: penalty {UNTESTED_STRENGTH}, no temperature, no comparison of pools")
        strength = "infinite" if weighting.strength is not None and np.isinf(weighting.strength) else weighting.strength
        return {
            "strength": strength,
            "duality_gap": weighting.gap,
            "members_added": weighting.added,
            **self._compared(None if crossfit is None else np.exp(crossfit), logits, labels, notes),
        }
