"""How sure a score is: bootstrap intervals of all metrics at once, paired comparisons, exact tests.

A bootstrap sample is a row of counts, how often each row of the data was drawn, so that every metric of every sample is
a product of matrices. All ensembles are scored on the same samples, hence differences are paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.core.errors import UserError
from utils.numeric.metrics import (
    BINS,
    check_probabilities,
    confidence_bins,
    log_loss_per_row,
    order_by_confidence,
    row_losses,
)

REPLICATES = 2000
CONFIDENCE_LEVEL = 0.95
TAILS = ((1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2)
BLOCK = 8_000_000  # numbers that are held at a time in one array
CACHED = 100_000  # numbers that stay close to the processor
ROUNDING = 1e-12  # a mean difference that is none
REFLECTED_METRICS = ("ece", "ece_adaptive", "mce")
"""Metrics that a resample makes worse, see `interval`."""
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def bootstrap_counts(
    labels: ArrayLike, groups: ArrayLike | None = None, *, replicates: int = REPLICATES, seed: int = 42
) -> Iterator[NDArray[np.float32]]:
    """Blocks (b, N) of counts: how often each of N rows is drawn, one line for each bootstrap sample.

    Rows are drawn with replacement within their class `labels` (N,), so that each class keeps its size (stratified
    bootstrap, Efron and Tibshirani 1993). With `groups` (N,) whole groups are drawn, within the class that most of
    their rows have. A block holds 8 million counts.
    """
    classes = np.asarray(labels, dtype=np.int64)
    unit = np.arange(len(classes)) if groups is None else np.unique(groups, return_inverse=True)[1]
    per_unit = np.zeros((unit.max() + 1, classes.max() + 1), dtype=np.int64)
    np.add.at(per_unit, (unit, classes), 1)
    stratum = per_unit.argmax(axis=1)
    strata = [np.flatnonzero(stratum == number) for number in np.unique(stratum)]
    rng = np.random.default_rng(seed)
    step = max(1, min(replicates, BLOCK // len(classes)))
    for first in range(0, replicates, step):
        lines = min(step, replicates - first)
        counts = np.empty((lines, len(stratum)), dtype=np.float32)
        for members in strata:
            size = len(members)
            drawn = rng.integers(0, size, (lines, size), dtype=np.int32)
            drawn += (np.arange(lines, dtype=np.int32) * size)[:, None]
            counts[:, members] = np.bincount(drawn.ravel(), minlength=lines * size).reshape(lines, size)
        yield counts if groups is None else counts[:, unit]


def bootstrap_metrics(
    probabilities: Sequence[ArrayLike],
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    replicates: int = REPLICATES,
    seed: int = 42,
) -> dict[str, Floats]:
    """{metric: its value on every bootstrap sample (K, B)} of K probabilities (N, C) on the rows with labels (N,).

    Equal to the functions of `utils.numeric.metrics` on the rows drawn, within 1e-5 (sums are taken in float32), but
    for
    `roc_auc_ovr_macro`: ranking each sample anew would take minutes, so that its value is moved by the influence of
    each row instead (DeLong et al. 1988), which is exact in first order. It is missing where some class has no rows.
    Memory is bounded whatever K, N and B. UserError for what cannot be scored.
    """
    truth = np.asarray(labels)
    tables = [_Table(*check_probabilities(scores, truth)) for scores in probabilities]
    found: dict[str, Floats] = {}
    first = 0
    for counts in bootstrap_counts(truth, groups, replicates=replicates, seed=seed):
        block = slice(first, first + len(counts))
        first = block.stop
        for number, table in enumerate(tables):
            for metric, values in table.metrics(counts).items():
                found.setdefault(metric, np.empty((len(tables), replicates)))[number, block] = values
    return found


def bootstrap_means(values: Sequence[ArrayLike], labels: ArrayLike) -> Floats:
    """Means (K, B) of K values (N,) per row on the bootstrap samples of the rows with labels (N,), drawn together."""
    table = np.stack([np.asarray(each, dtype=np.float64) for each in values], axis=1)
    return np.concatenate([counts @ table for counts in bootstrap_counts(labels)]).T / len(table)


class _Table:
    """What the metrics of one set of probabilities need to know of each row."""

    def __init__(self, scores: Floats, truth: Integers) -> None:
        self.classes = scores.shape[1]
        self.truth = truth
        self.winner = scores.argmax(axis=1)
        confidence = scores.max(axis=1)
        self.bins = confidence_bins(confidence)
        self.order, self.ends, self.gaps = order_by_confidence(scores, truth)
        self.areas, influence = auc_influence(scores, truth)
        means = (log_loss_per_row(scores, truth), row_losses(scores, truth, "brier"), influence)
        self.means = np.stack(means, axis=1).astype(np.float32)

    def metrics(self, counts: NDArray[np.float32]) -> dict[str, Floats]:
        """{metric: its value (b,)} on samples of which counts (b, N) say how often they hold each row."""
        classes = self.classes
        edges = np.cumsum([classes, classes, classes, BINS, BINS])
        sums = np.zeros((len(counts), edges[-1] + self.means.shape[1]))
        step = max(1, BLOCK // sums.shape[1])
        for first in range(0, counts.shape[1], step):
            rows = slice(first, first + step)
            sums += counts[:, rows] @ self._columns(rows)
        support, predicted, hits, in_bin, gaps, means = np.split(sums, edges, axis=1)
        drawn = support.sum(axis=1)
        means /= drawn[:, None]
        by_class = {
            "precision": _ratio(hits, predicted),
            "recall": _ratio(hits, support),
            "f1": _ratio(2 * hits, predicted + support),
        }
        found = {"accuracy": hits.sum(axis=1) / drawn}
        for name, values in by_class.items():
            found[f"{name}_macro"] = values.mean(axis=1)
            found[f"{name}_weighted"] = (values * support).sum(axis=1) / drawn
        found |= {"log_loss": means[:, 0], "brier": means[:, 1], "ece": np.abs(gaps).sum(axis=1) / drawn}
        found |= {"ece_adaptive": self._ece_adaptive(counts, drawn), "mce": _ratio(np.abs(gaps), in_bin).max(axis=1)}
        if self.areas is not None:
            found["roc_auc_ovr_macro"] = np.clip(self.areas + means[:, 2] * drawn, 0, 1)
        return found

    def _columns(self, rows: slice) -> NDArray[np.float32]:
        """(n, columns): what is summed over the rows of a sample."""
        truth, winner, bins = self.truth[rows], self.winner[rows], self.bins[rows]
        everywhere, classes = np.arange(len(truth)), self.classes
        found = np.zeros((len(truth), 3 * classes + 2 * BINS + self.means.shape[1]), dtype=np.float32)
        found[everywhere, truth] = 1
        found[everywhere, classes + winner] = 1
        found[everywhere, 2 * classes + truth] = truth == winner
        found[everywhere, 3 * classes + bins] = 1
        found[everywhere, 3 * classes + BINS + bins] = self.gaps[rows]
        found[:, -self.means.shape[1] :] = self.means[rows]
        return found

    def _ece_adaptive(self, counts: NDArray[np.float32], drawn: Floats) -> Floats:
        """As `metrics.ece_adaptive`: bins have equal shares of the rows of each sample. (b,)"""
        found = np.empty(len(counts))
        lines = max(1, CACHED // counts.shape[1])
        gaps = self.gaps[self.order]
        for first in range(0, len(counts), lines):
            part = slice(first, first + lines)
            ordered = np.take(counts[part], self.order, axis=1).astype(np.float64)
            sums = np.cumsum(ordered * gaps, axis=1)
            rows = np.cumsum(ordered, axis=1, out=ordered)
            if len(self.ends) < counts.shape[1]:
                rows, sums = rows[:, self.ends], sums[:, self.ends]
            at_bounds = _interpolated(drawn[part, None] * np.arange(BINS + 1) / BINS, rows, sums)
            found[part] = np.abs(np.diff(at_bounds, axis=1)).sum(axis=1)
        return found / drawn


def _interpolated(at: Floats, rows: Floats, sums: Floats) -> Floats:
    """Sums (b, n) at some numbers of rows `at` (b, k), line by line, between those known; both begin with 0."""
    place = np.stack([np.searchsorted(line, wanted) for line, wanted in zip(rows, at, strict=True)])
    place = np.minimum(place, rows.shape[1] - 1)
    before, started = np.maximum(place - 1, 0), place > 0
    ends = [np.take_along_axis(values, place, axis=1) for values in (rows, sums)]
    starts = [np.take_along_axis(values, before, axis=1) * started for values in (rows, sums)]
    share = _ratio(at - starts[0], ends[0] - starts[0])
    found: Floats = starts[1] + share * (ends[1] - starts[1])
    return found


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def auc_influence(scores: Floats, truth: Integers) -> tuple[float | None, Floats]:
    """Mean area under the one-against-rest curves of probabilities (N, C), and what each row moves it by (N,).

    The structural components of DeLong et al. (1988), less the area, over the rows of the same side; they sum to 0.
    None and zeros where a class has no rows or no others.
    """
    rows, classes = scores.shape
    support = np.bincount(truth, minlength=classes)
    influence = np.zeros(rows)
    if not support.all() or support.max() == rows:
        return None, influence
    total = 0.0
    for number in range(classes):
        own = truth == number
        ours, others = scores[own, number], scores[~own, number]
        above = _share_below(ours, others)
        below = 1 - _share_below(others, ours)
        area = float(above.mean())
        influence[own] += (above - area) / len(ours)
        influence[~own] += (below - area) / len(others)
        total += area
    return total / classes, influence / classes


def _share_below(values: Floats, others: Floats) -> Floats:
    """For each value (n,) the share of the others (m,) below it, equals counting half."""
    ordered = np.sort(others)
    left, right = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    found: Floats = (left + right) / (2 * len(others))
    return found


def metric_interval(metric: str, value: float, samples: Floats, units: int) -> list[float]:
    """The 95 % interval [low, high] of a metric with its bootstrap samples (B,) of so many rows or groups.

    Percentiles. Where all or no rows are right, samples do not differ: accuracy then has the exact binomial bound
    (Clopper and Pearson 1934). Calibration errors are sums of absolute values, which the noise of a resample only adds
    to: their percentiles are reflected about the value, not below 0, and widened to hold it.
    """
    low, high = (float(bound) for bound in np.quantile(samples, TAILS))
    if metric == "accuracy" and value in (0, 1):
        reach = 1 - TAILS[0] ** (1 / units)
        return [1 - reach, 1.0] if value else [0.0, reach]
    if metric not in REFLECTED_METRICS:
        return [low, high]
    return [max(0.0, min(value, 2 * value - high)), max(value, 2 * value - low)]


def difference_interval(samples: Floats, others: Floats) -> list[float]:
    """The 95 % interval of samples (B,) less others (B,), drawn together: the paired bootstrap, by percentiles."""
    return [float(bound) for bound in np.quantile(samples - others, TAILS)]


def ratio_interval(parts: Floats, wholes: Floats) -> list[float | None]:
    """The 95 % interval of parts (B,) over wholes (B,), drawn together, by percentiles.

    Nulls where more than 2.5 % of the wholes are not above 0: any ratio goes with that (Fieller 1954).
    """
    tail, is_there = TAILS[0], wholes > ROUNDING
    if (~is_there).mean() > tail:
        return [None, None]
    return [float(bound) for bound in np.quantile(parts[is_there] / wholes[is_there], [tail, 1 - tail])]


def mcnemar(hits: ArrayLike, others: ArrayLike) -> float:
    """Two-sided exact p of McNemar's test (1947): are two classifiers right on equally many of the same rows?

    `hits` and `others` (N,) say which rows each is right on. 1 where they differ on none. UserError for other lengths.
    """
    from scipy.special import bdtr

    first, second = np.asarray(hits, dtype=bool), np.asarray(others, dtype=bool)
    if first.shape != second.shape:
        raise UserError(f"McNemar's test: found {first.shape} and {second.shape} rows; expected the same rows")
    alone, other_alone = int((first & ~second).sum()), int((second & ~first).sum())
    apart = alone + other_alone
    return min(1.0, 2 * float(bdtr(min(alone, other_alone), apart, 0.5))) if apart else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """{name: p corrected for the number of tests} by Holm's step-down method (1979)."""
    found: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - place)))
        found[name] = largest
    return found


def mean_interval(values: ArrayLike) -> list[float]:
    """The 95 % interval of the mean of values (N,) by the normal distribution; the mean alone for one value."""
    numbers = np.asarray(values, dtype=np.float64)
    error = 1.96 * float(numbers.std(ddof=1)) / len(numbers) ** 0.5 if len(numbers) > 1 else 0.0
    mean = float(numbers.mean())
    return [mean - error, mean + error]


def metric_intervals(
    metrics: Mapping[str, Any], samples: Mapping[str, Floats], number: int, units: int
) -> dict[str, list[float]]:
    """`ci95` {metric: [low, high]} of the one at `number` of what `bootstrap` gave, with its `metrics`."""
    return {
        name: metric_interval(name, metrics[name], values[number], units)
        for name, values in samples.items()
        if metrics.get(name) is not None
    }
