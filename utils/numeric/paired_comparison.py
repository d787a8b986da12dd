"""Comparison of two models on the same rows, in accuracy and in log-loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.numeric.means import LEVEL, paired_interval
from utils.numeric.metrics import log_loss_per_row
from utils.numeric.proportions import difference_interval

CANNOT_TELL = "cannot be told apart"


@dataclass(frozen=True)
class PairedComparison:
    """Gains of one model over another with their intervals; a gain is above 0 where the first is better."""

    accuracy: float
    accuracy_interval: tuple[float, float] | None
    """None where rows or groups are too few"""
    log_loss: float
    """In nats"""
    log_loss_interval: tuple[float, float] | None
    """None where rows or groups are too few"""

    @property
    def better(self) -> list[str]:
        """The metrics whose interval lies above 0."""
        return [name for name, bounds in self._intervals() if bounds is not None and bounds[0] > 0]

    @property
    def worse(self) -> list[str]:
        """The metrics whose interval lies below 0."""
        return [name for name, bounds in self._intervals() if bounds is not None and bounds[1] < 0]

    def _intervals(self) -> list[tuple[str, tuple[float, float] | None]]:
        return [("accuracy", self.accuracy_interval), ("log-loss", self.log_loss_interval)]

    def as_record(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {
            "accuracy_gain": self.accuracy,
            "accuracy_gain_interval": None if self.accuracy_interval is None else list(self.accuracy_interval),
            "log_loss_gain": self.log_loss,
            "log_loss_gain_interval": None if self.log_loss_interval is None else list(self.log_loss_interval),
        }


def compare_losses(
    hits: tuple[ArrayLike, ArrayLike],
    losses: tuple[NDArray[np.float64], NDArray[np.float64]],
    groups: ArrayLike | None = None,
    *,
    comparisons: int = 1,
) -> PairedComparison:
    """Compare two models by their hits and losses (N,) on the same rows, whose groups (N,) are independent.

    The intervals of both metrics and of `comparisons` comparisons hold jointly with a probability of 95% (Bonferroni).
    """
    level = 1 - (1 - LEVEL) / (2 * comparisons)
    first, second = (np.asarray(model_hits, dtype=bool) for model_hits in hits)
    gains = losses[1] - losses[0]
    return PairedComparison(
        float(first.mean() - second.mean()),
        difference_interval(first, second, groups, level=level),
        float(gains.mean()),
        paired_interval(gains, groups, level=level),
    )


def compare_models(
    first: NDArray[Any], second: NDArray[Any], labels: NDArray[np.int64], groups: ArrayLike | None = None
) -> PairedComparison:
    """Compare two models by their probabilities (N, C) on rows with labels (N,); see `compare_losses`."""
    models = (first, second)
    hits = tuple(model.argmax(axis=1) == labels for model in models)
    losses = tuple(log_loss_per_row(model, labels) for model in models)
    return compare_losses((hits[0], hits[1]), (losses[0], losses[1]), groups)
