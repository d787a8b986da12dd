"""Temperature scaling: one number that divides the scores before the softmax (Guo et al. 2017).

It is fitted after pooling, as Rahaman and Thiery (2021) advise. The log-loss is convex in 1/T, which is the weight of a
log-linear pool of one member, so that T has the bounds and the prior of that weight: a fit on N rows minimises the mean
log-loss plus (1/T + ln T) / N. Held-out losses, which decide whether a temperature is kept, do not include the prior.
Scores are logits or log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.numeric import pools

MAX_TEMPERATURE = 1 / pools.SUM_BOUNDS[0]
MIN_TEMPERATURE = 1 / pools.SUM_BOUNDS[1]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TemperatureChoice:
    """A temperature and its cross-validated log-losses."""

    temperature: float
    """Fitted on all rows; 1 if the held-out log-loss does not improve."""
    row_temperatures: Floats
    """(N,): the temperature fitted on the other folds of each row; 1 if the held-out log-loss does not improve."""
    initial_loss: float
    """Log-loss at temperature 1, in nats."""
    held_out_loss: float
    """Log-loss with each row's temperature fitted on the other folds; `initial_loss` where there is only one fold."""


def fit_temperature(scores: NDArray[Any], labels: NDArray[Any]) -> float:
    """Fit the temperature of least log-loss plus prior to scores (N, C) and labels (N,), within its bounds."""
    return 1 / float(pools.fit_log_linear(scores[None], labels).weights[0])


def select_temperature(scores: NDArray[Any], labels: NDArray[Any], folds: NDArray[Any]) -> TemperatureChoice:
    """Fit a temperature to scores (N, C) and labels (N,); 1 unless it lowers the log-loss of held-out `folds` (N,)."""
    fold_names = np.unique(folds)
    initial_loss = _log_loss(scores, labels, 1.0)
    row_temperatures, held_out_loss = np.ones(len(labels)), 0.0
    for fold in fold_names if len(fold_names) > 1 else ():
        inside = folds == fold
        fold_temperature = fit_temperature(scores[~inside], labels[~inside])
        row_temperatures[inside] = fold_temperature
        held_out_loss += _log_loss(scores[inside], labels[inside], fold_temperature) * inside.mean()
    if len(fold_names) == 1:
        return TemperatureChoice(1.0, row_temperatures, initial_loss, initial_loss)
    if held_out_loss >= initial_loss:
        return TemperatureChoice(1.0, np.ones(len(labels)), initial_loss, held_out_loss)
    return TemperatureChoice(fit_temperature(scores, labels), row_temperatures, initial_loss, held_out_loss)


def select_member_temperatures(logits: NDArray[Any], labels: NDArray[Any], folds: NDArray[Any]) -> Floats:
    """Return temperatures (M,) of members' logits (M, N, C), each selected separately by `select_temperature`."""
    return np.array([select_temperature(scores, labels, folds).temperature for scores in logits])


def _log_loss(scores: NDArray[Any], labels: NDArray[Any], temperature: float) -> float:
    return pools.LogLinearLogLoss(scores[None], labels).value(np.array([1 / temperature]))
