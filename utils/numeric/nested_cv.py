"""Nested cross-validation that makes every fit once: selects a learner's setting and measures what the selection gives.

The copy for held-out fold k selects its setting by leaving out a second fold j of the others. A fit without k and j
serves the copies of k and of j alike; a fit without k predicts k and helps to select the setting of the final fit. So
K (K + 1) / 2 fits replace K * K + K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import numpy as np

from utils.core import engines
from utils.numeric.metrics import log_loss_per_row

FIT_THREADS = 1  # over which the sums of one fit are split; small as they are, a second thread costs time


class GridLearner(Protocol):
    """A learner with a grid of G settings, fitted on members' logits."""

    @property
    def thread_safe(self) -> bool:
        """Whether fits in concurrent threads give the same bytes; in processes they always do."""

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Return the G settings as JSON values; the first of equally good settings is selected."""

    def predictions(self, logits: Any, labels: np.ndarray, held_out: Any, /) -> np.ndarray:
        """Fit every setting on logits (M, N, C) and labels (N,).

        Returns probabilities float32 (G, H, C) for the held-out logits (M, H, C). A learner of embeddings takes
        `MemberOutputs` in place of both logits.
        """


@dataclass(frozen=True)
class NestedResult:
    """Result of `cross_validate`; rows keep the order of the input."""

    setting: int
    """Index of the setting of the final fit, selected on all rows."""
    setting_losses: np.ndarray
    """float64 (G,): cross-validated log-loss of each setting in nats; NaN where there is only one fold"""
    crossfit: np.ndarray
    """float32 (N, C): probabilities of the copies fitted without the row's fold, all under the final setting"""
    nested_crossfit: np.ndarray
    """float32 (N, C): probabilities of the same copies, each under the setting that it selected without the fold"""
    inner_crossfit: dict[int, tuple[np.ndarray, np.ndarray]]
    """{fold: (indices of the rows of the other folds, their probabilities)}, fitted without this fold and their own"""
    inner_nested: dict[int, dict[int, np.ndarray]]
    """{fold: {other fold: probabilities of the rows of `inner_crossfit`}}, under the setting of least loss without both

    `inner_crossfit` has the setting of least loss on all of its rows; here the rows of the other fold have no vote.
    """


def cross_validate(
    learner: GridLearner, logits: Any, labels: np.ndarray, folds: np.ndarray, *, n_jobs: int = 1
) -> NestedResult:
    """Run nested cross-validation over `folds` (N,) of logits (M, N, C) and labels (N,), `n_jobs` fits at a time.

    With two folds a copy has no inner fold to select by and takes the first setting; with one fold the final fit does.
    """
    fold_names = np.unique(folds).tolist()
    n_settings, n_classes = len(learner.settings()), logits.shape[2]
    pairs = list(combinations(fold_names, 2)) if len(fold_names) > 2 else []
    held_out_sets: list[tuple[int, ...]] = [*((name,) for name in fold_names), *pairs] if len(fold_names) > 1 else []
    all_fits = _all_fits(learner, logits, labels, folds, held_out_sets, n_jobs)
    fits = dict(zip(held_out_sets, all_fits, strict=True))

    def fold_predictions(fold: int, other: int | None = None) -> np.ndarray:
        """Probabilities (G, n, C) for the rows of `fold`, fitted without it and without `other`."""
        held_out = (fold,) if other is None else tuple(sorted((fold, other)))
        rows = folds[np.isin(folds, held_out)]
        return fits[held_out][:, rows == fold]

    shape = (len(labels), n_classes)
    if not fits:
        empty = np.full(shape, np.nan, dtype=np.float32)
        return NestedResult(0, np.full(n_settings, np.nan), empty, empty, {}, {})
    outer = np.empty((n_settings, *shape), dtype=np.float32)
    for name in fold_names:
        outer[:, folds == name] = fold_predictions(name)
    setting_losses = _losses(outer, labels)
    setting = int(setting_losses.argmin())
    nested_crossfit, inner_crossfit = np.empty(shape, dtype=np.float32), {}
    inner_nested: dict[int, dict[int, np.ndarray]] = {}
    for name in fold_names:
        selected = 0
        others = [other for other in fold_names if other != name] if pairs else []
        if others:
            rows = np.flatnonzero(folds != name)
            inner = np.empty((n_settings, len(rows), n_classes), dtype=np.float32)
            for other in others:
                inner[:, folds[rows] == other] = fold_predictions(other, name)
            selected = int(_losses(inner, labels[rows]).argmin())
            inner_crossfit[name] = (rows, inner[selected])
            inner_nested[name] = {
                other: inner[int(_losses(inner[:, voting], labels[rows][voting]).argmin())]
                for other in others
                for voting in [folds[rows] != other]
            }
        nested_crossfit[folds == name] = fold_predictions(name)[selected]
    return NestedResult(setting, setting_losses, outer[setting], nested_crossfit, inner_crossfit, inner_nested)


def evenly_spaced_epochs(epochs: int, count: int) -> list[int]:
    """Return `count` epochs evenly spaced up to the last one; fewer if `epochs` is smaller than `count`."""
    return sorted({max(1, round(epochs * (index + 1) / count)) for index in range(count)})


def _all_fits(
    learner: GridLearner,
    logits: Any,
    labels: np.ndarray,
    folds: np.ndarray,
    held_out_sets: Sequence[tuple[int, ...]],
    n_jobs: int,
) -> list[np.ndarray]:
    # One thread per fit: the same sums in the same order, whatever the number of cores.
    fits = engines.current().map(
        _fit,
        held_out_sets,
        shared=(learner, logits, labels, folds),
        description=f"fits of {type(learner).__name__.removesuffix('Learner').lower()}",
        **{"n_threads" if learner.thread_safe else "n_processes": n_jobs},
        threads_per_job=FIT_THREADS,
    )
    return list(fits)


def _fit(
    learner: GridLearner, logits: Any, labels: np.ndarray, folds: np.ndarray, held_out: tuple[int, ...]
) -> np.ndarray:
    """Return probabilities (G, H, C) for the rows of the held-out folds, fitted on the other rows."""
    is_held_out = np.isin(folds, held_out)
    return learner.predictions(logits[:, ~is_held_out], labels[~is_held_out], logits[:, is_held_out])


def _losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.array([log_loss_per_row(values, labels).mean() for values in probabilities])
