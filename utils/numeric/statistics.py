"""The bootstrap of all metrics at once, and correction for multiple tests.

A bootstrap sample is a vector of counts, how often each row of the data is drawn, so that the metrics of all samples
follow from matrix products. All ensembles are scored on the same samples, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.numeric.agreement import chance_corrected, column_distances
from utils.numeric.areas import mean_areas
from utils.numeric.metrics import (
    BINS,
    check_probabilities,
    confidence_bins,
    log_loss_per_row,
    macro_mean,
    order_by_confidence,
    ratio_or_zero,
    row_losses,
)

REPLICATES = 2000
CONFIDENCE_LEVEL = 0.95
TAILS = ((1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2)
"""Quantiles that bound the central interval."""
BLOCK = 8_000_000  # numbers per array at a time
CACHED = 100_000  # numbers that fit the processor's cache
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def bootstrap_counts(
    labels: ArrayLike, groups: ArrayLike | None = None, *, replicates: int = REPLICATES, seed: int = 42
) -> Iterator[NDArray[np.float32]]:
    """Yield blocks float32 (b, N) of counts, one line per bootstrap sample: how often each of N rows is drawn.

    Rows are drawn with replacement within their class `labels` (N,), so that each class keeps its size (stratified
    bootstrap, Efron and Tibshirani 1993). With `groups` (N,) whole groups are drawn, within the most frequent class of
    their rows. A block holds 8 million counts.
    """
    classes = np.asarray(labels, dtype=np.int64)
    unit_of_row = np.arange(len(classes)) if groups is None else np.unique(groups, return_inverse=True)[1]
    class_counts = np.zeros((unit_of_row.max() + 1, classes.max() + 1), dtype=np.int64)
    np.add.at(class_counts, (unit_of_row, classes), 1)
    stratum_of_unit = class_counts.argmax(axis=1)
    strata = [np.flatnonzero(stratum_of_unit == stratum) for stratum in np.unique(stratum_of_unit)]
    rng = np.random.default_rng(seed)
    step = max(1, min(replicates, BLOCK // len(classes)))
    for first in range(0, replicates, step):
        samples = min(step, replicates - first)
        counts = np.empty((samples, len(stratum_of_unit)), dtype=np.float32)
        for units in strata:
            size = len(units)
            draws = rng.integers(0, size, (samples, size), dtype=np.int32)
            draws += (np.arange(samples, dtype=np.int32) * size)[:, None]
            counts[:, units] = np.bincount(draws.ravel(), minlength=samples * size).reshape(samples, size)
        yield counts if groups is None else counts[:, unit_of_row]


def bootstrap_metrics(
    probabilities: Sequence[ArrayLike],
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    replicates: int = REPLICATES,
    seed: int = 42,
) -> dict[str, Floats]:
    """Return {metric: values (K, B) on B bootstrap samples} of K arrays of probabilities (N, C) with labels (N,).

    Values equal those of `utils.numeric.metrics` on the drawn rows within 1e-5, since sums are float32. Exceptions are
    `roc_auc_ovr_macro` and `average_precision_macro`: the value on all rows plus the influence of each drawn row
    (`areas`), a first-order approximation, because ranking each sample would take minutes. The former is missing if
    every row belongs to one class. Memory is bounded for all K, N and B. Raises UserError as
    `metrics.check_probabilities` does.
    """
    truth = np.asarray(labels)
    tables = [_RowStatistics(*check_probabilities(scores, truth)) for scores in probabilities]
    replicated: dict[str, Floats] = {}
    first = 0
    for counts in bootstrap_counts(truth, groups, replicates=replicates, seed=seed):
        block = slice(first, first + len(counts))
        first = block.stop
        for index, table in enumerate(tables):
            for metric, values in table.metrics(counts).items():
                replicated.setdefault(metric, np.empty((len(tables), replicates)))[index, block] = values
    return replicated


class _RowStatistics:
    """The statistics of each row, for one array of probabilities, whose sums give the metrics."""

    def __init__(self, scores: Floats, truth: Integers) -> None:
        winner = scores.argmax(axis=1)
        self.by_class = _class_indicators(truth, winner, scores.shape[1])
        confidence = scores.max(axis=1)
        self.bins = confidence_bins(confidence)
        self.order, self.ends, self.gaps = order_by_confidence(scores, truth)
        self.areas = mean_areas(scores, truth)
        means = (
            log_loss_per_row(scores, truth),
            row_losses(scores, truth, "brier"),
            self.areas.roc_auc_influence,
            self.areas.average_precision_influence,
            *column_distances(truth, winner),
        )
        self.means = np.stack(means, axis=1).astype(np.float32)

    def metrics(self, counts: NDArray[np.float32]) -> dict[str, Floats]:
        """Return {metric: values (b,)} on the bootstrap samples with counts (b, N)."""
        class_sums = (self.by_class @ counts.T).T.astype(np.float64)
        support, predicted, hits = np.split(class_sums, 3, axis=1)
        sums = np.zeros((len(counts), 2 * BINS + self.means.shape[1]))
        step = max(1, BLOCK // sums.shape[1])
        for first in range(0, counts.shape[1], step):
            rows = slice(first, first + step)
            sums += counts[:, rows] @ self._columns(rows)
        in_bin, gaps, means = np.split(sums, [BINS, 2 * BINS], axis=1)
        n_drawn = support.sum(axis=1)
        means /= n_drawn[:, None]
        by_class = {
            "precision": ratio_or_zero(hits, predicted),
            "recall": ratio_or_zero(hits, support),
            "f1": ratio_or_zero(2 * hits, predicted + support),
        }
        values = {"accuracy": hits.sum(axis=1) / n_drawn}
        for name, class_values in by_class.items():
            values[f"{name}_macro"] = macro_mean(class_values, support)
            values[f"{name}_weighted"] = (class_values * support).sum(axis=1) / n_drawn
        values |= {"log_loss": means[:, 0], "brier": means[:, 1], "ece": np.abs(gaps).sum(axis=1) / n_drawn}
        values["ece_adaptive"] = self._ece_adaptive(counts, n_drawn)
        values["mce"] = ratio_or_zero(np.abs(gaps), in_bin).max(axis=1)
        if self.areas.roc_auc is not None:
            values["roc_auc_ovr_macro"] = np.clip(self.areas.roc_auc + means[:, 2] * n_drawn, 0, 1)
        values["average_precision_macro"] = np.clip(self.areas.average_precision + means[:, 3] * n_drawn, 0, 1)
        distances = (means[:, 4] * n_drawn, means[:, 5] * n_drawn)
        return values | chance_corrected(support, predicted, hits.sum(axis=1), distances)

    def _columns(self, rows: slice) -> NDArray[np.float32]:
        """Return the statistics (n, columns) of rows, to be summed: indicators of bins, gaps and losses."""
        bins = self.bins[rows]
        all_rows = np.arange(len(bins))
        columns = np.zeros((len(bins), 2 * BINS + self.means.shape[1]), dtype=np.float32)
        columns[all_rows, bins] = 1
        columns[all_rows, BINS + bins] = self.gaps[rows]
        columns[:, -self.means.shape[1] :] = self.means[rows]
        return columns

    def _ece_adaptive(self, counts: NDArray[np.float32], n_drawn: Floats) -> Floats:
        """Return `metrics.ece_adaptive` of each sample (b,), with bins of equal numbers of the sample's rows."""
        errors = np.empty(len(counts))
        step = max(1, CACHED // counts.shape[1])
        gaps = self.gaps[self.order]
        for first in range(0, len(counts), step):
            block = slice(first, first + step)
            ordered = np.take(counts[block], self.order, axis=1).astype(np.float64)
            sums = np.cumsum(ordered * gaps, axis=1)
            rows = np.cumsum(ordered, axis=1, out=ordered)
            if len(self.ends) < counts.shape[1]:
                rows, sums = rows[:, self.ends], sums[:, self.ends]
            at_boundaries = _interpolated(n_drawn[block, None] * np.arange(BINS + 1) / BINS, rows, sums)
            errors[block] = np.abs(np.diff(at_boundaries, axis=1)).sum(axis=1)
        return errors / n_drawn


def _class_indicators(truth: Integers, winner: Integers, classes: int) -> Any:
    """Return a sparse matrix float32 (3 C, N): its product with counts is support, predictions and hits by class."""
    from scipy.sparse import csr_array

    rows, hits = np.arange(len(truth)), np.flatnonzero(truth == winner)
    lines = np.concatenate([truth, classes + winner, 2 * classes + truth[hits]])
    columns = np.concatenate([rows, rows, hits])
    return csr_array((np.ones(len(lines), dtype=np.float32), (lines, columns)), shape=(3 * classes, len(truth)))


def _interpolated(at: Floats, rows: Floats, sums: Floats) -> Floats:
    """Interpolate `sums` (b, n), given at numbers of `rows` (b, n), at numbers `at` (b, k), starting at (0, 0)."""
    index = np.stack([np.searchsorted(line, numbers) for line, numbers in zip(rows, at, strict=True)])
    index = np.minimum(index, rows.shape[1] - 1)
    previous, has_previous = np.maximum(index - 1, 0), index > 0
    ends = [np.take_along_axis(values, index, axis=1) for values in (rows, sums)]
    starts = [np.take_along_axis(values, previous, axis=1) * has_previous for values in (rows, sums)]
    fraction = ratio_or_zero(at - starts[0], ends[0] - starts[0])
    interpolated: Floats = starts[1] + fraction * (ends[1] - starts[1])
    return interpolated


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return {name: p-value adjusted for the number of tests} by Holm's step-down method (1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = largest
    return adjusted
