"""Temperature scaling: one number that divides the scores before the softmax (Guo et al. 2017).

It is fitted after pooling, as Rahaman and Thiery (2021) advise. The log-loss is convex in 1/T, which is the weight of a
log-linear pool of one member, so that T has the bounds and the prior of that weight: a fit on N rows minimises the mean
log-loss plus (1/T + ln T) / N. Held-out losses, which decide whether a temperature is kept, do not include the prior.
Scores are logits or log-probabilities.

The small fits of a selection run together, as one problem with a leading dimension. A fit has the same result alone and
with any others, except that rows of folds of unequal size are padded, which may change the last digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.numeric import pools, weight_search

MAX_TEMPERATURE = 1 / pools.SUM_BOUNDS[0]
MIN_TEMPERATURE = 1 / pools.SUM_BOUNDS[1]
MAX_BATCHED = 100_000
"""Most numbers (fits x rows x classes) that are processed together, so that they stay in the cache."""
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
    return float(_fit_all(scores[None], labels, [np.arange(len(labels))])[0, 0])


def select_temperature(scores: NDArray[Any], labels: NDArray[Any], folds: NDArray[Any]) -> TemperatureChoice:
    """Fit a temperature to scores (N, C) and labels (N,); 1 unless it lowers the log-loss of held-out `folds` (N,)."""
    return select_temperatures(scores[None], labels, folds)[0]


def select_temperatures(scores: NDArray[Any], labels: NDArray[Any], folds: NDArray[Any]) -> list[TemperatureChoice]:
    """Return the choice of `select_temperature` for each of B sets of scores (B, N, C) of the same rows."""
    fold_names, fold_of_row = np.unique(folds, return_inverse=True)
    initial = np.array([_log_loss(each, labels, np.ones(len(labels))) for each in scores])
    ones = np.ones((len(scores), len(labels)))
    if len(fold_names) == 1:
        return [TemperatureChoice(1.0, *each) for each in zip(ones, initial, initial, strict=True)]
    fitted = _fit_all(scores, labels, [np.flatnonzero(fold_of_row != fold) for fold in range(len(fold_names))])
    fitted = fitted[:, fold_of_row]
    held_out = np.array([_log_loss(each, labels, divisors) for each, divisors in zip(scores, fitted, strict=True)])
    is_better = held_out < initial
    temperatures = np.ones(len(scores))
    temperatures[is_better] = _fit_all(scores[is_better], labels, [np.arange(len(labels))])[:, 0]
    row_temperatures = np.where(is_better[:, None], fitted, ones)
    return [
        TemperatureChoice(float(divisor), rows, float(before), float(after))
        for divisor, rows, before, after in zip(temperatures, row_temperatures, initial, held_out, strict=True)
    ]


def select_member_temperatures(logits: NDArray[Any], labels: NDArray[Any], folds: NDArray[Any]) -> Floats:
    """Return temperatures (M,) of members' logits (M, N, C), each selected separately by `select_temperature`."""
    return np.array([choice.temperature for choice in select_temperatures(logits, labels, folds)])


def _log_loss(scores: NDArray[Any], labels: NDArray[Any], divisors: Floats) -> float:
    """Return the log-loss of scores (N, C), each row divided by its temperature (N,)."""
    scaled = np.asarray(scores, dtype=np.float64) / divisors[:, None]
    scaled -= scaled[np.arange(len(labels)), labels][:, None]
    largest = scaled.max(axis=1)
    return float((np.log(np.exp(scaled - largest[:, None]).sum(axis=1)) + largest).mean())


def _fit_all(scores: NDArray[Any], labels: NDArray[Any], subsets: Sequence[NDArray[np.int64]]) -> Floats:
    """Fit temperatures (B, K) to scores (B, N, C) and labels (N,) on each of K subsets of rows, given by indices."""
    n_rows, n_classes = max(map(len, subsets)), scores.shape[2]
    if n_rows * n_classes > MAX_BATCHED:
        weights = [
            [pools.fit_log_linear(each[None, rows], labels[rows]).weights[0] for rows in subsets] for each in scores
        ]
        return 1 / np.array(weights).reshape(len(scores), len(subsets))
    counts = np.array([len(rows) for rows in subsets])
    is_row = np.arange(n_rows) < counts[:, None]  # (K, n): others are padding
    padded = np.zeros((len(subsets), n_rows), dtype=np.int64)
    padded[is_row] = np.concatenate(subsets)
    inverse, length = np.empty(len(scores) * len(subsets)), MAX_BATCHED // (n_rows * n_classes)
    for start in range(0, len(inverse), length):
        sets, chosen = np.divmod(np.arange(start, min(start + length, len(inverse))), len(subsets))
        rows = padded[chosen]  # (F, n)
        values = np.asarray(scores[sets[:, None], rows], dtype=np.float64)  # (F, n, C)
        values -= np.take_along_axis(values, labels[rows][:, :, None], axis=2)
        margins = np.ascontiguousarray(values.transpose(2, 0, 1))
        inverse[start : start + length] = _inverse_temperatures(margins, is_row[chosen], counts[chosen])
    return 1 / inverse.reshape(len(scores), len(subsets))


def _inverse_temperatures(margins: Floats, is_row: NDArray[np.bool_], counts: NDArray[np.int64]) -> Floats:
    """Return the inverse temperatures (F,) of F fits to margins (C, F, n), of which `is_row` (F, n) marks `counts`."""
    found = np.ones(len(counts))
    lower, upper = (np.full(len(counts), bound) for bound in pools.SUM_BOUNDS)
    running = np.arange(len(counts))
    for _ in range(weight_search.MAX_STEPS):
        slopes, curvatures = _derivatives(margins, is_row, counts, found[running])
        gaps = found[running] * slopes - np.minimum(pools.SUM_BOUNDS[0] * slopes, pools.SUM_BOUNDS[1] * slopes)
        candidates, lower, upper = weight_search.newton_candidates(
            found[running], slopes, curvatures, lower, upper, pools.SUM_BOUNDS
        )
        goes_on = (gaps > weight_search.TOLERANCE) & (candidates != found[running])
        found[running[goes_on]] = candidates[goes_on]
        if goes_on.all():
            continue
        if not goes_on.any():
            break
        margins = margins[:, goes_on]
        is_row, counts, lower, upper, running = (values[goes_on] for values in (is_row, counts, lower, upper, running))
    return found


def _derivatives(
    margins: Floats, is_row: NDArray[np.bool_], counts: NDArray[np.int64], inverse: Floats
) -> tuple[Floats, Floats]:
    """Return first and second derivatives (F,) of the mean log-loss plus prior at inverse temperatures (F,)."""
    shares = margins * inverse[:, None]
    shares -= shares.max(axis=0)
    np.exp(shares, out=shares)
    shares /= shares.sum(axis=0)
    means = (margins * shares).sum(axis=0)
    deviations = margins - means
    deviations *= deviations  # centred before squaring: a difference of two sums may be negative
    variances = (deviations * shares).sum(axis=0)
    slopes = (means * is_row).sum(axis=1) + 1 - 1 / inverse
    curvatures = (variances * is_row).sum(axis=1) + 1 / inverse**2
    return slopes / counts, curvatures / counts
