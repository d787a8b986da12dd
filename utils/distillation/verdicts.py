"""Tests whether a student differs from the same network trained without a teacher, and words the result.

A comparison of one training per arm applies to these two networks: its intervals are over the rows. With several seeds
per arm the intervals include the variation between trainings; with at least `RECIPE_SEEDS` they apply to the recipe.
Two metrics are compared, so each interval has the level 1 - 0.05 / 2 (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.numeric.metrics import log_loss_per_row
from utils.numeric.paired_comparison import CANNOT_TELL, compare_models

METRICS = ("accuracy", "log_loss")
LEVEL = 1 - 0.05 / len(METRICS)
NEGLIGIBLE = 1e-4
"""Difference in accuracy or nats that is never reported; it exceeds the effect of fitted temperatures."""
RECIPE_SEEDS = 3
"""Minimum number of trainings per arm for a verdict on the recipe."""
SHORT_SCHEDULE = 0.05
"""Relative decrease of the control's val log-loss over the last tenth of its epochs that marks a schedule as short."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """Advantage of one arm over the other in one metric, positive if it is better."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 if the whole interval is above `NEGLIGIBLE`, -1 if it is below -`NEGLIGIBLE`, else 0."""
        return int(self.low > NEGLIGIBLE) - int(self.high < -NEGLIGIBLE)

    def as_record(self) -> dict[str, Any]:
        """The record, JSON-ready; without an interval if there are too few rows or groups."""
        bounds = [self.low, self.high] if np.isfinite(self.low) and np.isfinite(self.high) else None
        return {"value": self.value, "interval": bounds, "level": LEVEL}


def row_scores(probabilities: np.ndarray, labels: np.ndarray, metric: str) -> Floats:
    """Scores (K, N) of K trainings' probabilities (K, N, C): 1 for a hit, or the log-likelihood in nats."""
    if metric == "accuracy":
        hits: Floats = (probabilities.argmax(axis=2) == labels).astype(np.float64)
        return hits
    return -np.stack([log_loss_per_row(each, labels) for each in probabilities])


def difference(
    arm: np.ndarray, other: np.ndarray, labels: np.ndarray, metric: str, groups: np.ndarray | None = None
) -> Difference:
    """Advantage of the trainings `arm` (K, N, C) over `other` (L, N, C) on the same N rows, with its interval.

    Rows with equal `groups` (N,) are dependent; without groups, rows are independent. `compare_models` compares single
    trainings. With several per arm, the variance is the sum of that of the mean paired difference over rows or groups
    and that of the trainings' means (Welch 1947; its degrees of freedom by Satterthwaite 1946).
    """
    from scipy.stats import t

    if len(arm) == len(other) == 1:
        compared = compare_models(arm[0], other[0], labels, groups)
        value, bounds = (
            (compared.accuracy, compared.accuracy_interval)
            if metric == "accuracy"
            else (compared.log_loss, compared.log_loss_interval)
        )
        return Difference(value, *(bounds or (-np.inf, np.inf)))
    scores, other_scores = row_scores(arm, labels, metric), row_scores(other, labels, metric)
    paired = scores.mean(axis=0) - other_scores.mean(axis=0)
    value, count = float(paired.mean()), len(paired)
    _, unit_of_row = np.unique(np.arange(count) if groups is None else groups, return_inverse=True)
    sums = np.bincount(unit_of_row, weights=paired - value)
    row_variance = len(sums) * sums.var(ddof=1) / count**2 if len(sums) > 1 else np.inf
    repeated = [each.mean(axis=1) for each in (scores, other_scores) if len(each) > 1]
    summands = [(means.var(ddof=1) / len(means), len(means) - 1) for means in repeated]
    variance = row_variance + sum(summand for summand, _ in summands)
    squares = sum(summand**2 / freedom for summand, freedom in summands)
    freedom = variance**2 / squares if squares > 0 else np.inf
    half = float(t.ppf((1 + LEVEL) / 2, freedom) * variance**0.5)
    return Difference(value, value - half, value + half)


def outcome(differences: Mapping[str, Difference], *, seeds: int) -> str:
    """Sentence on the differences: about the recipe with `RECIPE_SEEDS` trainings per arm, else about this network."""
    metric_names = {metric: metric.replace("_", "-") for metric in METRICS}
    improved = [metric_names[metric] for metric in METRICS if differences[metric].sign > 0]
    worse = [metric_names[metric] for metric in METRICS if differences[metric].sign < 0]
    is_recipe = seeds >= RECIPE_SEEDS
    subject = f"with {seeds} seeds per arm the recipe" if is_recipe else "for this network distillation"
    if not improved and not worse:
        subject = f"the recipe, with {seeds} seeds per arm," if is_recipe else "this network"
        return f"{subject} {CANNOT_TELL} from the same network trained without a teacher"
    parts = [f"helped in {' and '.join(improved)}"] if improved else []
    parts += [f"harmed {' and '.join(worse)}"] if worse else []
    return f"{subject} {' and '.join(parts)}"


def difference_text(differences: Mapping[str, Difference]) -> str:
    """Text of the advantages with their intervals."""
    parts = [
        f"{metric.replace('_', '-')} {each.value:+.4f} "
        + (f"[{each.low:+.4f}, {each.high:+.4f}]" if np.isfinite(each.low) else "(too few rows for an interval)")
        for metric, each in differences.items()
    ]
    return f"advantage in {', '.join(parts)}"


def speed_text(costs: Mapping[str, Mapping[str, Any]], student: str, teacher: str, points: float) -> str | None:
    """`12 times faster than the teacher, 0.2 points behind`; None if a latency is unknown.

    `costs` are those of the record, whose entry `student` has the student's latency; `points` is the student's
    advantage in accuracy in percentage points.
    """
    times = [(costs[key].get("latency_ms") or {}).get("batch_1", {}).get("p50") for key in (student, teacher)]
    if not all(times):
        return None
    ratio = times[1] / times[0]
    speed = f"{ratio:.1f} times faster" if ratio < 10 else f"{ratio:.0f} times faster"
    if ratio < 1:
        speed = f"{1 / ratio:.1f} times slower"
    position = "ahead" if points > 0 else "behind"
    return f"{speed} than the teacher, {abs(points):.1f} points {position}"


def schedule_note(history: Sequence[Mapping[str, float]], epochs: int) -> str | None:
    """A note if the network trained alone was still improving at the end, which hides the effect of a teacher.

    `history` has the control's `val_log_loss` by epoch; `epochs` is the configured number. None for a schedule that is
    long enough.
    """
    losses = [row["val_log_loss"] for row in history]
    last = max(1, len(losses) // 10)
    if len(losses) < 2 or losses[-1] >= (1 - SHORT_SCHEDULE) * losses[-1 - last]:
        return None
    return (
        f"the network trained without a teacher was still improving (val log-loss {losses[-1 - last]:.4f} to "
        f"{losses[-1]:.4f} over the last {last} of {len(losses)} epochs): the schedule is too short to show what a "
        f"teacher adds; try --set distillation.epochs={2 * epochs}"
    )
