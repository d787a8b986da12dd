"""The super learner as a combiner: a log-linear pool of ensembles' predictions, shrunk to the best of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from utils.combiners.pooled_members import POOLS, Pool, PooledMembers
from utils.combiners.protocol import MemberFacts, unsaved
from utils.core.config import Config
from utils.numeric import super_learner
from utils.numeric.metrics import log_loss
from utils.numeric.super_learner import SuperLearner


@dataclass(kw_only=True)
class ConvexPool(PooledMembers):
    """Non-negative weights of the inputs' log-probabilities, most of them 0 (`utils.numeric.super_learner`)."""

    settings: ClassVar[tuple[str, ...]] = ("runs.meta_fuser",)

    pool: Pool = unsaved(POOLS["log_linear"])

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """Return an unfitted pool; it has no settings."""
        return cls()

    def _fit(self, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> None:
        """Fit on log-probabilities (I, N, C) of the inputs, labels (N,) and folds (N,)."""
        self.member_temperatures = np.ones(len(logits))
        scores = self._scores(logits)
        self._keep(super_learner.fit(scores, labels, folds), scores, labels)

    def fit_two_level(
        self,
        crossfit: np.ndarray,
        inner: Callable[[int], np.ndarray],
        labels: np.ndarray,
        folds: np.ndarray,
    ) -> np.ndarray:
        """Fit on the inputs' cross-fitted log-probabilities; return cross-fitted probabilities (N, C) of the pool.

        For each fold, a copy of the pool is fitted on rows of other folds, with inputs by copies that read the labels
        of neither this fold nor the row's fold; it then predicts the rows of the fold. With one level, on `crossfit`
        alone, the inputs would have read the labels of the rows that evaluate the pool, and the loss would be biased
        downwards. The result is NaN with a single fold.

        Args:
            crossfit: (I, N, C) log-probabilities by copies of the inputs fitted without the row's fold.
            inner: Returns, for a fold, (I, N, C) by copies fitted without this fold and without the row's fold; NaN
                where an input has no such copy.
            labels: (N,)
            folds: (N,)
        """
        predictions = np.full(crossfit.shape[1:], np.nan)
        names = np.unique(folds)
        for name in names if len(names) > 1 else ():
            inside = folds == name
            scores, copy = inner(int(name)), type(self)()
            fitted_on = ~inside & ~np.isnan(scores).any(axis=(0, 2))
            copy._fit(scores[:, fitted_on], labels[fitted_on], folds[fitted_on])
            predictions[inside] = copy._predict_proba(crossfit[:, inside])
        self._fit(crossfit, labels, folds)
        return predictions

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return `input_weights` {input: weight} (their sum is 1 / temperature), the best input and the penalty."""
        weights = self.weights / self.temperature
        record = {"input_weights": dict(zip(names, weights.tolist(), strict=True)), "weights": None, **self.facts}
        if "best_input" in record:
            record["best_input"] = names[record["best_input"]]
        return record

    def _keep(self, fitted: SuperLearner, scores: np.ndarray, labels: np.ndarray) -> None:
        total = float(fitted.weights.sum())
        self.weights, self.temperature = fitted.weights / total, 1 / total
        strengths = ["infinite" if np.isinf(strength) else strength for strength in super_learner.STRENGTHS]
        is_tested = not np.isnan(fitted.held_out_losses).any()
        self.facts = {
            "best_input": fitted.best,
            "strength": strengths[super_learner.STRENGTHS.index(fitted.strength)],
            "duality_gap": fitted.gap,
            "held_out_losses": (
                [[strength, loss] for strength, loss in zip(strengths, fitted.held_out_losses.tolist(), strict=True)]
                if is_tested
                else None
            ),
            "selection_score": log_loss(self._predict_proba(scores), labels),
        }
