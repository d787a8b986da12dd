"""One-vs-rest rates of classes, and top-k hits; inputs are not validated."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


def binary_rates(confusion: Integers) -> dict[str, tuple[Integers, Integers]]:
    """Return {rate: (successes, rows)}, (C,) each, of each class against the rest, from a confusion matrix (C, C).

    Sensitivity is the recall of the class, and the positive predictive value its precision.
    """
    hits, support, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    rejected = confusion.sum() - support - predicted + hits
    return {
        "sensitivity": (hits, support),
        "specificity": (rejected, confusion.sum() - support),
        "positive_predictive_value": (hits, predicted),
        "negative_predictive_value": (rejected, confusion.sum() - predicted),
    }


def top_k_hits(scores: NDArray[np.float64], truth: Integers, k: int) -> NDArray[np.bool_]:
    """Return whether the classes `truth` (N,) are among the k highest of scores (N, C); ties go to the first class."""
    p_true = scores[np.arange(len(truth)), truth][:, None]
    is_equal_before = (scores == p_true) & (np.arange(scores.shape[1]) < truth[:, None])
    hits: NDArray[np.bool_] = ((scores > p_true) | is_equal_before).sum(axis=1) < k
    return hits
