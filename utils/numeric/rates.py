"""Rates of classes against the rest, and rows whose class is among the most probable; nothing is checked."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


def binary_rates(confusion: Integers) -> dict[str, tuple[Integers, Integers]]:
    """Return {rate: (successes, rows)} of each class (C,) against the rest, from counts (C, C); unchecked.

    Sensitivity is the recall, and the positive predictive value the precision of the class.
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
    """Return whether the class of each row (N,) is among the k most probable ones, the first of equals; unchecked."""
    p_true = scores[np.arange(len(truth)), truth][:, None]
    is_equal_before = (scores == p_true) & (np.arange(scores.shape[1]) < truth[:, None])
    hits: NDArray[np.bool_] = ((scores > p_true) | is_equal_before).sum(axis=1) < k
    return hits
