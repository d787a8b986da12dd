"""The mixture of fitted probabilities with the uniform distribution: no fit on n rows makes an answer certain.

p becomes (1 - e) p + e / C with e = C / (10 (C - 1) (n + 2)). The order of the classes of a row and of the confidences
of rows stays, no probability is below 1 / (10 (C - 1) (n + 2)), and a correct answer costs at most 1 / (10 (n + 2))
nats more, as many as ten rows in a hundred n could tell. Laplace's rule of succession is behind n + 2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.numeric.metrics import Floats

DIVISOR = 10
"""Part of the rule of succession's doubt that is kept: a tenth costs well-fitted probabilities next to nothing."""


def uniform_weight(rows: int, classes: int) -> float:
    """Return the weight e of the uniform distribution after a fit on so many rows; 0 with one class, 1 at most."""
    if classes < 2:
        return 0.0
    return min(1.0, classes / (DIVISOR * (classes - 1) * (rows + 2)))


def mixed_with_uniform(probabilities: NDArray[Any], weight: float | NDArray[Any]) -> Floats:
    """Return float64 probabilities (N, C) mixed with the uniform ones by a weight, or one of each row (N,)."""
    exact = np.asarray(probabilities, dtype=np.float64)
    weights = np.asarray(weight, dtype=np.float64)[..., None]
    # As a difference, so that rows keep their sum and large probabilities their last digits.
    mixed: Floats = exact + weights * (1 / exact.shape[1] - exact)
    return mixed


def without_uniform(probabilities: NDArray[Any], weight: float) -> Floats:
    """Return the probabilities (N, C) that `mixed_with_uniform` mixed by a weight below 1; none below 0."""
    exact = np.asarray(probabilities, dtype=np.float64)
    before: Floats = np.maximum(exact - weight / exact.shape[1], 0) / (1 - weight)
    return before
