"""Mixture of fitted probabilities with the uniform distribution, so that no prediction has probability 0 or 1.

After a fit on n rows, p becomes (1 - e) p + e / C with e = C / (10 (C - 1) (n + 2)). The order of the classes of a row
and of the confidences of rows is preserved, no probability is below 1 / (10 (C - 1) (n + 2)), and the loss of a correct
prediction increases by at most 1 / (10 (n + 2)) nats. The term n + 2 is from Laplace's rule of succession.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.numeric.metrics import Floats

DIVISOR = 10
"""Divides the weight by the rule of succession: a tenth of it costs well-fitted probabilities almost nothing."""


def uniform_weight(rows: int, classes: int) -> float:
    """Return the weight e of the uniform distribution after a fit on `rows` rows; 0 with one class, at most 1."""
    if classes < 2:
        return 0.0
    return min(1.0, classes / (DIVISOR * (classes - 1) * (rows + 2)))


def mixed_with_uniform(probabilities: NDArray[Any], weight: float | NDArray[Any]) -> Floats:
    """Return probabilities float64 (N, C) mixed with the uniform distribution by a weight, or one per row (N,)."""
    exact = np.asarray(probabilities, dtype=np.float64)
    weights = np.asarray(weight, dtype=np.float64)[..., None]
    # Added as a difference, so that the sum of a row and the last digits of large probabilities are preserved.
    mixed: Floats = exact + weights * (1 / exact.shape[1] - exact)
    return mixed


def without_uniform(probabilities: NDArray[Any], weight: float) -> Floats:
    """Return the inverse of `mixed_with_uniform` for probabilities (N, C) and a weight below 1; no value is below 0."""
    exact = np.asarray(probabilities, dtype=np.float64)
    before: Floats = np.maximum(exact - weight / exact.shape[1], 0) / (1 - weight)
    return before
