"""Select views of test-time augmentation that lower the log-loss of held-out rows, and measure the gain of the choice.

Averaging over views can turn correct predictions wrong (Shanmugam et al. 2021), and it lowers confidences, which a
temperature does without further cost. The compared log-losses are therefore those after a temperature is fitted for
each candidate. Views are used only if every choice that leaves out one or two folds is the same: the predictions for a
row then equal those of a choice that does not read the labels of the row's fold and of another fold.
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
LEFT_OUT = 2  # most folds without which the choice has to be the same
ORIGINAL = "original"
"""Name of the image itself among the views"""


@dataclass(frozen=True)
class ViewOutputs:
    """Logits of M networks for N labelled rows, per group of views."""

    logits: Mapping[str, NDArray[Any]]
    """{`ORIGINAL` or name of a group: mean logits of its views (M, N, C)}"""
    counts: Mapping[str, int]
    """{group: number of its views}"""
    labels: NDArray[np.int64]
    """(N,)"""
    folds: NDArray[np.int64]
    """(N,)"""
    groups: NDArray[np.int64] | None = None
    """(N,): rows of one group are not independent; None where all rows are independent"""

    def mean_logits(self, chosen: Sequence[str]) -> NDArray[Any]:
        """Return mean logits (M, N, C) of the image itself and the views of the chosen groups."""
        total = np.array(self.logits[ORIGINAL], dtype=np.float64)
        for name in chosen:
            total += self.counts[name] * np.asarray(self.logits[name], dtype=np.float64)
        return total / (1 + sum(self.counts[name] for name in chosen))


@dataclass(frozen=True)
class ViewChoice:
    """The groups of views to use, and the cross-fitted gain of the selection rule."""

    views: tuple[str, ...]
    """In the order of the candidates; empty where only the image itself is used"""
    on_all_rows: tuple[str, ...]
    """The choice on all rows; differs from `views` where choices without some folds differ."""
    gain: float
    """Log-loss without views minus log-loss with them, in nats; both after a temperature fitted on the other folds"""
    gain_interval: tuple[float, float] | None
    """95%; None for too few rows or groups"""
    accuracy_gain: float

    def as_record(self) -> dict[str, Any]:
        """Return the choice as JSON values."""
        return {
            "views": list(self.views),
            "chosen_on_all_rows": list(self.on_all_rows),
            "log_loss_gain": self.gain,
            "log_loss_gain_ci95": None if self.gain_interval is None else list(self.gain_interval),
            "accuracy_gain": self.accuracy_gain,
        }


def choose_views(outputs: ViewOutputs) -> ViewChoice:
    """Choose groups of views for the mean of the networks' probabilities.

    Groups are added one after the other, the one of lowest log-loss first, while the gain exceeds its standard error.
    The choice is used only if it is the same without any one or two folds. The gain is cross-fitted: for each fold it
    is that of the choice made on the other folds by the same rule.
    """
    rule = _Rule(outputs)
    all_folds = frozenset(np.unique(outputs.folds).tolist())
    gains, hits = np.zeros(len(outputs.labels)), np.zeros(len(outputs.labels))
    for fold in sorted(all_folds) if len(all_folds) > 1 else ():
        inside, others = outputs.folds == fold, all_folds - {fold}
        losses, correct = zip(*(rule.judged(views, others, inside) for views in ((), rule.stable(others))), strict=True)
        gains[inside], hits[inside] = losses[0] - losses[1], correct[1].astype(float) - correct[0]
    return ViewChoice(
        views=rule.stable(all_folds),
        on_all_rows=rule.choice(all_folds),
        gain=float(gains.mean()),
        gain_interval=paired_interval(gains, outputs.groups),
        accuracy_gain=float(hits.mean()),
    )


@dataclass
class _Rule:
    """The selection rule on the rows of some folds, with a cache of choices by folds and of scores by views."""

    outputs: ViewOutputs
    _scores: dict[tuple[str, ...], Floats] = field(default_factory=dict)
    _choices: dict[frozenset[int], tuple[str, ...]] = field(default_factory=dict)

    def stable(self, folds: frozenset[int]) -> tuple[str, ...]:
        """Return the choice on these folds if it is the same without any one or two of them; else no views."""
        views = self.choice(folds)
        return views if views and all(self.choice(part) == views for part in _parts(folds)) else ()

    def choice(self, folds: frozenset[int]) -> tuple[str, ...]:
        """Return groups of views, added while the gain on the rows of these folds exceeds its standard error."""
        if folds in self._choices:
            return self._choices[folds]
        candidates = [name for name in self.outputs.logits if name != ORIGINAL]
        rows = np.isin(self.outputs.folds, sorted(folds))
        groups = None if self.outputs.groups is None else self.outputs.groups[rows]
        selected: tuple[str, ...] = ()
        lowest = self._losses(selected, rows, rows)
        while len(selected) < len(candidates):
            extended = [
                tuple(other for other in candidates if other in (*selected, name))
                for name in candidates
                if name not in selected
            ]
            losses = {views: self._losses(views, rows, rows) for views in extended}
            best = min(extended, key=lambda views: losses[views].mean())
            gains = lowest - losses[best]
            if not gains.mean() > standard_error(gains, groups):
                break
            selected, lowest = best, losses[best]
        self._choices[folds] = selected
        return selected

    def judged(
        self, views: tuple[str, ...], folds: frozenset[int], rows: NDArray[np.bool_]
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """Return losses and hits of rows, bool (N,), after a temperature fitted on the rows of `folds`."""
        fitted = np.isin(self.outputs.folds, sorted(folds))
        hits = self._of(views)[rows].argmax(axis=1) == self.outputs.labels[rows]
        return self._losses(views, fitted, rows), hits

    def _losses(self, views: tuple[str, ...], fitted: NDArray[np.bool_], rows: NDArray[np.bool_]) -> Floats:
        scores, labels = self._of(views), self.outputs.labels
        temperature = fit_temperature(scores[fitted], labels[fitted])
        losses: Floats = log_loss_per_row(softmax(scores[rows] / temperature), labels[rows])
        return losses

    def _of(self, views: tuple[str, ...]) -> Floats:
        """Return the logarithm (N, C) of the networks' mean probabilities."""
        if views not in self._scores:
            logs = log_softmax(self.outputs.mean_logits(views))
            self._scores[views] = np.logaddexp.reduce(logs, axis=0) - np.log(len(logs))
        return self._scores[views]


def _parts(folds: frozenset[int]) -> Iterator[frozenset[int]]:
    """Yield the folds without each one and without each two of them; at least one fold is left."""
    for count in range(1, min(LEFT_OUT, len(folds) - 1) + 1):
        for left_out in combinations(sorted(folds), count):
            yield folds - set(left_out)
