"""The weighted ensemble: a linear or log-linear pool whose weights, penalty and temperature held-out folds decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from utils import pooling, temperature
from utils.combiner import MemberFacts
from utils.config import Config
from utils.errors import UserError
from utils.metrics import METRICS, log_softmax, softmax
from utils.pooling import POOLS, Pool, Weighting

if TYPE_CHECKING:
    from torch import nn

UNTESTED_STRENGTH = 0.01  # of the penalty where one fold leaves nothing to choose by
Floats = NDArray[np.float64]


@dataclass
class WeightedPool:
    """Members weighted for least loss on the rows given to fit, as a linear or a log-linear pool.

    Accuracy and macro F1 are piecewise constant: weights of least log-loss are the start, and members added greedily
    (Caruana et al. 2004), on average over bootstrap samples, move them where held-out folds gain by it. All weights are
    kept as shares that sum to 1; the sum of log-linear weights is the inverse of the temperature.
    """

    settings: ClassVar[tuple[str, ...]] = tuple(
        f"runs.score_ensemble.{key}" for key in ("optimize_weights", "optimization_metric", "pool", "temperature")
    )
    learns: ClassVar[bool] = True

    members: MemberFacts | None = None
    metric: str = "f1_macro"
    kind: str = "auto"
    """auto, linear or log_linear"""
    optimize_weights: bool = True
    """False: weights proportional to the recorded accuracies."""
    calibration: str = "auto"
    """auto, off or per_member"""
    seed: int = 42
    pool: Pool = POOLS["linear"]
    shares: Floats = field(default_factory=lambda: np.ones(0))
    """(M,), sum 1"""
    temperature: float = 1.0
    member_temperatures: Floats = field(default_factory=lambda: np.ones(0))
    """(M,)"""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the fit found out about itself."""

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """With the settings of `runs.score_ensemble`."""
        settings = config.runs.score_ensemble
        return cls(
            members,
            metric=settings.optimization_metric,
            kind=settings.pool,
            optimize_weights=settings.optimize_weights,
            calibration=settings.temperature,
            seed=config.seed,
        )

    def fit(self, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> Self:
        """Fit on logits (M, N, C), labels (N,) and folds (N,).

        With one fold or one class nothing can be held out, so that nothing is chosen. UserError where the weights are
        to follow recorded accuracies and a member has none.
        """
        testable = bool(np.ptp(folds)) and bool(np.ptp(labels))
        calibrate = testable and self.calibration != "off"
        self.member_temperatures = np.ones(len(logits))
        if calibrate and self.calibration == "per_member":
            self.member_temperatures = temperature.choose_per_member(logits, labels, folds)
        found = self._weighted(self._scores(logits), labels, folds, testable=testable, calibrate=calibrate)
        total = float(found.weights.sum())
        self.pool, self.shares, self.temperature = found.pool, found.weights / total, found.temperature / total
        self.facts = self._judged(found, logits, labels)
        return self

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        sums = np.tensordot(self.shares, self.pool.parts(self._scores(logits)), axes=1)
        return softmax(self.pool.pooled(sums) / self.temperature)

    def to_module(self) -> nn.Module:
        """Logits (B, M, C) -> probabilities (B, C)."""
        from utils import heads

        make = heads.LinearPool if self.pool.name == "linear" else heads.LogLinearPool
        return make(self.shares, self.temperature, self.member_temperatures)

    def state(self) -> dict[str, np.ndarray]:
        """Shares and temperatures of the members, (M,), and the pool's temperature and kind, (1,)."""
        return {
            "shares": self.shares,
            "member_temperatures": self.member_temperatures,
            "temperature": np.array([self.temperature]),
            "log_linear": np.array([self.pool.name == "log_linear"], dtype=np.uint8),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """The pool whose `state` this is."""
        return cls(
            pool=POOLS["log_linear" if state["log_linear"][0] else "linear"],
            shares=state["shares"],
            member_temperatures=state["member_temperatures"],
            temperature=float(state["temperature"][0]),
        )

    def used(self, members: int) -> np.ndarray:
        """Those with a share, (M,)."""
        return self.shares > 0

    def restricted(self, used: np.ndarray) -> Self:
        """The same map on the used members' logits."""
        state = self.state()
        return self.from_state({**state, **{key: state[key][used] for key in ("shares", "member_temperatures")}})

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Shares by name, pool and temperature, and what the fit found out about itself.

        `selection_score` is that of the rows fitted on, `cross_validated_score` that of folds left out, both by
        `optimization_metric`; `equal_weights_score` is that of the plain mean of the probabilities.
        """
        found: dict[str, Any] = {
            "weights": dict(zip(names, self.shares.tolist(), strict=True)),
            "pool": self.pool.name,
            "temperature": self.temperature,
            "member_temperatures": None,
            "optimization_metric": self.metric,
            **self.facts,
        }
        if (self.member_temperatures != 1).any():
            found["member_temperatures"] = dict(zip(names, self.member_temperatures.tolist(), strict=True))
        return found

    def _scores(self, logits: np.ndarray) -> Floats:
        divided = np.asarray(logits, dtype=np.float64) / self.member_temperatures[:, None, None]
        return np.maximum(log_softmax(divided), pooling.LOWEST_SCORE)

    def _weighted(
        self, scores: Floats, labels: np.ndarray, folds: np.ndarray, *, testable: bool, calibrate: bool
    ) -> Weighting:
        only = POOLS["linear" if self.kind == "auto" else self.kind]
        if not (self.optimize_weights and np.ptp(labels)):
            shares = np.full(len(scores), 1 / len(scores)) if self.optimize_weights else self._recorded_shares()
            return pooling.given(only, scores, labels, folds, shares, calibrate=calibrate)
        if not testable:
            return pooling.fit(only, scores, labels, self.metric, strength=UNTESTED_STRENGTH)
        names = tuple(POOLS) if self.kind == "auto" else (self.kind,)
        tuned = [pooling.tune(POOLS[name], scores, labels, folds, self.metric, calibrate=calibrate) for name in names]
        found = pooling.preferred(*tuned, labels, self.metric) if len(tuned) > 1 else tuned[0]
        if self.metric in pooling.PIECEWISE_CONSTANT:
            options: dict[str, Any] = {"seed": self.seed, "calibrate": calibrate}
            found = pooling.with_members_added(found, scores, labels, folds, self.metric, **options)
        return found

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
        shares: Floats = recorded / recorded.sum()
        return shares

    def _judged(self, found: Weighting, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        metric = METRICS[self.metric]
        equal = metric.function(softmax(logits).mean(axis=0), labels)
        unseen_score = None if found.unseen is None else metric.function(np.exp(found.unseen), labels)
        notes, beaten = [], None
        if not np.ptp(labels):
            notes.append(f"all {len(labels)} rows are of one class: nothing was fitted")
        elif unseen_score is None:
            notes.append(f"one fold only: penalty {UNTESTED_STRENGTH}, no temperature, no comparison of pools")
        else:
            beaten = unseen_score > equal if metric.higher_is_better else unseen_score < equal
            if not beaten:
                notes.append(
                    f"equal weights are not beaten: {self.metric} {equal:.4f} with them, {unseen_score:.4f} with these"
                )
        strength = "infinite" if found.strength is not None and np.isinf(found.strength) else found.strength
        return {
            "strength": strength,
            "duality_gap": found.gap,
            "members_added": found.added,
            "selection_score": metric.function(self.predict_proba(logits), labels),
            "cross_validated_score": unseen_score,
            "equal_weights_score": equal,
            "beats_equal_weights": beaten,
            "notes": notes,
        }
