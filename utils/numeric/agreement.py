"""Agreement of predicted and true classes beyond chance: Matthews correlation and Cohen's kappas.

All are computed from the numbers of true and of predicted rows of each class, so that the cost is linear in the number
of classes and the bootstrap scores all samples at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CHANCE_CORRECTED = ("matthews_corrcoef", "cohen_kappa", "cohen_kappa_linear", "cohen_kappa_quadratic")
"""Metrics between -1 and 1 that are 0 for predictions by chance"""


def chance_corrected(
    support: NDArray[Any], predicted: NDArray[Any], hits: NDArray[Any], distances: tuple[NDArray[Any], NDArray[Any]]
) -> dict[str, Floats]:
    """Return {metric of `CHANCE_CORRECTED`: values (...,)}; a kappa is NaN where chance alone always agrees.

    `support` and `predicted` (..., C) are the numbers of rows per true and per predicted class, `hits` (...,) the
    numbers of correct rows, and `distances` the sums (...,) over rows of the distance between the columns of the true
    and the predicted class, and of its square.

    The Matthews correlation is the multiclass one (Gorodkin 2004), 0 where all rows have one predicted or true class.
    Kappa (Cohen 1960) weights all errors equally; the weighted kappas (Cohen 1968) weight them by the distance between
    the classes, or by its square, and are meaningful only for ordered classes.
    """
    true, predictions = (np.asarray(values, dtype=np.float64) for values in (support, predicted))
    rows = true.sum(axis=-1)
    expected = (true * predictions).sum(axis=-1)
    covariance = hits * rows - expected
    spreads = (rows**2 - (predictions**2).sum(axis=-1)) * (rows**2 - (true**2).sum(axis=-1))
    correlation = np.divide(covariance, np.sqrt(spreads), out=np.zeros(np.shape(rows)), where=spreads > 0)
    columns = np.arange(true.shape[-1], dtype=np.float64)
    true_below, predictions_below = (np.cumsum(values, axis=-1) for values in (true, predictions))
    linear = true_below * (rows[..., None] - predictions_below) + predictions_below * (rows[..., None] - true_below)
    squares = ((true + predictions) * columns**2).sum(axis=-1)
    quadratic = rows * squares - 2 * (true * columns).sum(axis=-1) * (predictions * columns).sum(axis=-1)
    return {
        "matthews_corrcoef": correlation,
        "cohen_kappa": _kappa(rows - hits, rows**2 - expected, rows),
        "cohen_kappa_linear": _kappa(distances[0], linear.sum(axis=-1), rows),
        "cohen_kappa_quadratic": _kappa(distances[1], quadratic, rows),
    }


def _kappa(observed: NDArray[Any], expected: Floats, rows: Floats) -> Floats:
    """Return 1 - observed / (expected / rows) of summed disagreements; NaN where none is expected."""
    kappa: Floats = 1 - np.divide(observed * rows, expected, out=np.full(np.shape(rows), np.nan), where=expected > 0)
    return kappa


def column_distances(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return the distance (N,) between the columns of the true and the predicted class of each row, and its square."""
    distance = np.abs(truth - predicted).astype(np.float64)
    return distance, distance**2
