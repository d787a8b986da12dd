"""Which views of test-time augmentation lower the log-loss of held-out rows, and what the choice itself is worth.

Averaging over views can turn right answers wrong (Shanmugam et al. 2021), and it makes answers less confident, which a
temperature does without further cost. So the log-losses that are compared are those after a temperature that is fitted
for each candidate, and views are used where every choice that leaves out one or two folds is the same: what the
networks then predict for a row is what a choice without the row's own label, and without another fold's, predicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.numeric.means import paired_interval, standard_error
from utils.numeric.metrics import log_loss_per_row, log_softmax, softmax
from utils.numeric.temperature import fit_temperature

Floats = NDArray[np.float64]
LEFT_OUT = 2  # folds at most, without which the choice has to be the same
ORIGINAL = "original"
"""Name of the image itself among the views"""


@dataclass(frozen=True)
class ViewOutputs:
    """Logits of M networks for N labelled rows, by group of views."""

    logits: Mapping[str, NDArray[Any]]
    """{`ORIGINAL` or name of a group: mean logits of its views (M, N, C)}"""
    counts: Mapping[str, int]
    """{group: number of its views}"""
    labels: NDArray[np.int64]
    """(N,)"""
    folds: NDArray[np.int64]
    """(N,)"""
    groups: NDArray[np.int64] | None = None
    """(N,): rows that are not independent; None where all are"""

    def mean_logits(self, chosen: Sequence[str]) -> NDArray[Any]:
        """Mean logits (M, N, C) of the image itself and the views of the chosen groups."""
        total = np.array(self.logits[ORIGINAL], dtype=np.float64)
        for name in chosen:
            total += self.counts[name] * np.asarray(self.logits[name], dtype=np.float64)
        return total / (1 + sum(self.counts[name] for name in chosen))


@dataclass(frozen=True)
class ViewChoice:
    """The groups of views to use, and the gain of the rule on rows whose labels it did not read."""

    views: tuple[str, ...]
    """In the order of the candidates; empty: the image alone"""
    on_all_rows: tuple[str, ...]
    """What the rows choose together; differs from `views` where choices without some folds differ."""
    gain: float
    """Log-loss without views minus log-loss with them, in nats; both after a temperature of the other folds"""
    gain_interval: tuple[float, float] | None
    """95%; None for too few rows or groups"""
    accuracy_gain: float

    def as_record(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "views": list(self.views),
            "chosen_on_all_rows": list(self.on_all_rows),
            "log_loss_gain": self.gain,
            "log_loss_gain_ci95": None if self.gain_interval is None else list(self.gain_interval),
            "accuracy_gain": self.accuracy_gain,
        }


def choose_views(outputs: ViewOutputs) -> ViewChoice:
    """Choose groups of views for the mean of the networks' probabilities.

    Groups are added one after the other, the one of lowest log-loss first, while the gain exceeds its standard error;
    the whole choice counts where it is the same without any one or two folds. The gain is cross-fitted: for each fold
    it is that of the choice, made by the same rule, on the other folds.
    """
    rule = _Rule(outputs)
    every = frozenset(np.unique(outputs.folds).tolist())
    gains, hits = np.zeros(len(outputs.labels)), np.zeros(len(outputs.labels))
    for fold in sorted(every) if len(every) > 1 else ():
        inside, others = outputs.folds == fold, every - {fold}
        losses, right = zip(*(rule.judged(views, others, inside) for views in ((), rule.stable(others))), strict=True)
        gains[inside], hits[inside] = losses[0] - losses[1], right[1].astype(float) - right[0]
    return ViewChoice(
        views=rule.stable(every),
        on_all_rows=rule.choice(every),
        gain=float(gains.mean()),
        gain_interval=paired_interval(gains, outputs.groups),
        accuracy_gain=float(hits.mean()),
    )


@dataclass
class _Rule:
    """The choice on the rows of some folds; each set of folds and each set of views is computed once."""

    outputs: ViewOutputs
    _scores: dict[tuple[str, ...], Floats] = field(default_factory=dict)
    _choices: dict[frozenset[int], tuple[str, ...]] = field(default_factory=dict)

    def stable(self, folds: frozenset[int]) -> tuple[str, ...]:
        """The choice on these folds where it is the same without any one or two of them; else none."""
        views = self.choice(folds)
        return views if views and all(self.choice(part) == views for part in _parts(folds)) else ()

    def choice(self, folds: frozenset[int]) -> tuple[str, ...]:
        """Groups of views, added while the gain on the rows of these folds exceeds its standard error."""
        if folds in self._choices:
            return self._choices[folds]
        candidates = [name for name in self.outputs.logits if name != ORIGINAL]
        rows = np.isin(self.outputs.folds, sorted(folds))
        groups = None if self.outputs.groups is None else self.outputs.groups[rows]
        chosen: tuple[str, ...] = ()
        lowest = self._losses(chosen, rows, rows)
        while len(chosen) < len(candidates):
            extended = [
                tuple(other for other in candidates if other in (*chosen, name))
                for name in candidates
                if name not in chosen
            ]
            losses = {views: self._losses(views, rows, rows) for views in extended}
            best = min(extended, key=lambda views: losses[views].mean())
            gains = lowest - losses[best]
            if not gains.mean() > standard_error(gains, groups):
                break
            chosen, lowest = best, losses[best]
        self._choices[folds] = chosen
        return chosen

    def judged(
        self, views: tuple[str, ...], folds: frozenset[int], rows: NDArray[np.bool_]
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """Losses and hits of some rows, after a temperature that is fitted on the rows of `folds`."""
        fitted = np.isin(self.outputs.folds, sorted(folds))
        hits = self._of(views)[rows].argmax(axis=1) == self.outputs.labels[rows]
        return self._losses(views, fitted, rows), hits

    def _losses(self, views: tuple[str, ...], fitted: NDArray[np.bool_], rows: NDArray[np.bool_]) -> Floats:
        scores, labels = self._of(views), self.outputs.labels
        temperature = fit_temperature(scores[fitted], labels[fitted])
        losses: Floats = log_loss_per_row(softmax(scores[rows] / temperature), labels[rows])
        return losses

    def _of(self, views: tuple[str, ...]) -> Floats:
        """Logarithm of the networks' mean probabilities (N, C)."""
        if views not in self._scores:
            logs = log_softmax(self.outputs.mean_logits(views))
            self._scores[views] = np.logaddexp.reduce(logs, axis=0) - np.log(len(logs))
        return self._scores[views]


def _parts(folds: frozenset[int]) -> Iterator[frozenset[int]]:
    """The folds without one, and without two, of them; at least one is left."""
    for left_out in range(1, min(LEFT_OUT, len(folds) - 1) + 1):
        for some in combinations(sorted(folds), left_out):
            yield folds - set(some)
