"""One number that divides scores before the soft-max: what makes probabilities neither too sure nor too timid.

Guo et al. (2017); fitted after pooling, as Rahaman and Thiery (2021) advise. The log-loss is convex in 1/T, which is
the weight of a log-linear pool of one member, and T is bounded as that weight is. Scores are logits or
log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.numeric import pools

HIGHEST = 1 / pools.SCALES[0]
LOWEST = 1 / pools.SCALES[1]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """A temperature, and what it does to rows that it was not fitted on."""

    temperature: float
    """Fitted on all rows; 1 where held-out rows do not gain."""
    of_rows: Floats
    """(N,): for each row the temperature fitted on the other folds; 1 where held-out rows do not gain."""
    before: float
    """Log-loss at temperature 1, in nats."""
    held_out: float
    """Log-loss with each row's temperature fitted on the other folds; `before` where there is one fold only."""


def fit(scores: NDArray[Any], labels: NDArray[Any]) -> float:
    """The temperature of least log-loss for scores (N, C) with labels (N,), within `LOWEST` and `HIGHEST`."""
    return 1 / float(pools.log_linear(scores[None], labels).weights[0])


def choose(scores: NDArray[Any], labels: NDArray[Any], folds: NDArray[Any]) -> Choice:
    """A temperature for scores (N, C), kept only where rows of left-out `folds` (N,) gain by it."""
    numbers = np.unique(folds)
    before = _log_loss(scores, labels, 1.0)
    of_rows, held_out = np.ones(len(labels)), 0.0
    for number in numbers if len(numbers) > 1 else ():
        inside = folds == number
        found = fit(scores[~inside], labels[~inside])
        of_rows[inside] = found
        held_out += _log_loss(scores[inside], labels[inside], found) * inside.mean()
    if len(numbers) == 1:
        return Choice(1.0, of_rows, before, before)
    if held_out >= before:
        return Choice(1.0, np.ones(len(labels)), before, held_out)
    return Choice(fit(scores, labels), of_rows, before, held_out)


def choose_per_member(logits: NDArray[Any], labels: NDArray[Any], folds: NDArray[Any]) -> Floats:
    """Temperatures (M,) of members' logits (M, N, C), each chosen by itself as `choose` does."""
    return np.array([choose(scores, labels, folds).temperature for scores in logits])


def _log_loss(scores: NDArray[Any], labels: NDArray[Any], temperature: float) -> float:
    return pools.LogLinearLogLoss(scores[None], labels).value(np.array([1 / temperature]))
