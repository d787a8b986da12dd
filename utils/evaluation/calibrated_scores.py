"""The log-loss of models after temperature scaling fitted on their out-of-sample rows.

Networks are overconfident, so that raw log-losses compare temperatures more than models. Here every model, including
those that already have a temperature, gets a temperature fitted on rows that are not evaluated, and the same mixture
with the uniform distribution as fitted ensembles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from utils.evaluation.scoring import ScoredModel
from utils.numeric.means import paired_interval
from utils.numeric.metrics import clipped_log, ece, log_loss_per_row, softmax
from utils.numeric.temperature import fit_temperature
from utils.numeric.uniform_mixture import mixed_with_uniform, uniform_weight


class LabelledProbabilities(Protocol):
    """Probabilities (R, C) and labels (R,)."""

    @property
    def probabilities(self) -> np.ndarray:
        """(R, C)"""

    @property
    def labels(self) -> np.ndarray:
        """int64 (R,)"""


@dataclass(frozen=True)
class CalibratedScores:
    """Losses of one model on N evaluated rows."""

    temperature: float
    """Divisor of the log-probabilities."""
    losses: np.ndarray
    """(N,), nats"""
    ece: float
    """Expected calibration error of the top class"""


def calibrated_scores(
    probabilities: np.ndarray, labels: np.ndarray, fitted_on: LabelledProbabilities
) -> CalibratedScores:
    """Score probabilities (N, C) with labels (N,) at the temperature of least log-loss on `fitted_on`, other rows."""
    temperature = fit_temperature(clipped_log(fitted_on.probabilities.astype(np.float64)), fitted_on.labels)
    tempered = softmax(clipped_log(probabilities.astype(np.float64)) / temperature)
    weight = uniform_weight(len(fitted_on.labels), probabilities.shape[1])
    calibrated = mixed_with_uniform(tempered, weight)
    return CalibratedScores(temperature, log_loss_per_row(calibrated, labels), ece(calibrated, labels))


class CalibratedLosses:
    """The calibrated scores of the models of one evaluation, each computed once."""

    def __init__(
        self,
        labels: np.ndarray,
        groups: np.ndarray | None,
        rows_of: Callable[[ScoredModel], LabelledProbabilities | None],
    ) -> None:
        """`labels` and `groups` (N,) are of the evaluated rows; `rows_of` returns the rows that fit a temperature."""
        self.labels, self.groups, self.rows_of = labels, groups, rows_of
        self._scores: dict[str, CalibratedScores | None] = {}

    def entries(self, model: ScoredModel) -> dict[str, Any]:
        """Return `calibrated_log_loss` and `calibration_temperature` of `metrics.json`; null without rows to fit it."""
        scores = self._of(model)
        return {
            "calibrated_log_loss": None if scores is None else float(scores.losses.mean()),
            "calibration_temperature": None if scores is None else scores.temperature,
        }

    def difference(self, model: ScoredModel, reference: ScoredModel) -> dict[str, Any]:
        """Return `delta_calibrated_log_loss` with its interval; each model has its own temperature."""
        scores, other = self._of(model), self._of(reference)
        differences = None if scores is None or other is None else scores.losses - other.losses
        interval = None if differences is None else paired_interval(differences, self.groups)
        return {
            "delta_calibrated_log_loss": None if differences is None else float(differences.mean()),
            "delta_calibrated_log_loss_ci95": None if interval is None else list(interval),
        }

    def ece(self, model: ScoredModel) -> float | None:
        """Return the expected calibration error at the model's temperature; None without rows to fit it."""
        scores = self._of(model)
        return None if scores is None else scores.ece

    def _of(self, model: ScoredModel) -> CalibratedScores | None:
        if model.name not in self._scores:
            rows = self.rows_of(model)
            has_rows = rows is not None and len(rows.labels)
            self._scores[model.name] = (
                calibrated_scores(model.probabilities, self.labels, rows) if rows is not None and has_rows else None
            )
        return self._scores[model.name]
