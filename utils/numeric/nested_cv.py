"""Nested cross-validation that makes every fit once: selects a learner's setting and measures what the selection gives.

The copy for held-out fold k selects its setting by leaving out a second fold j of the others. A fit without k and j
serves the copies of k and of j alike; a fit without k predicts k and helps to select the setting of the final fit. So
K (K + 1) / 2 fits replace K * K + K. A class may be absent from the rows of a fit: learners return all C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from utils.core import engines
from utils.numeric.metrics import log_loss_per_row

FEWEST_FOLDS = 3  # of cross-fitting, for a copy without one of them to have two left
FOLDS_BY_ROW = 5
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
class HeldOut:
    """What selects the setting of a fit and calibrates it: predictions for its rows without their inner folds."""

    rows: np.ndarray
    """int64 (n,): indices of the rows"""
    folds: np.ndarray
    """int64 (n,): inner fold of each row"""
    probabilities: np.ndarray
    """float32 (n, C): under the selected setting"""


@dataclass(frozen=True)
class NestedResult:
    """Result of `cross_validate`; rows keep the order of the input."""

    setting: int
    """Index of the setting of the final fit."""
    setting_losses: np.ndarray
    """float64 (G,): cross-validated log-loss of each setting in nats; NaN where no row can be held out"""
    held_out: HeldOut | None
    """What selected the setting of the final fit; None where no row can be held out."""
    nested_crossfit: np.ndarray
    """float32 (N, C): probabilities of the copies fitted without the row's fold, each under the setting that it
    selected without the fold; NaN where there is only one fold"""
    inner_held_out: dict[int, HeldOut]
    """{fold: what selected the setting of the copy fitted without this fold}"""
    inner_nested: dict[int, dict[int, np.ndarray]]
    """{fold: {other fold: probabilities (n, C) of the rows of `inner_held_out`}}, under the setting of least loss
    without both; empty with fewer than three folds

    `inner_held_out` has the setting of least loss on all of its rows; here the rows of the other fold have no vote.
    """


def inner_folds(labels: np.ndarray, folds: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the folds (n,) by which a fit on the rows `inside` (N,), bool, selects and calibrates.

    They are the cross-fitting `folds` (N,) of these rows. Where there are fewer than three of those, a copy fitted
    without one of them has no two left: rows are then dealt out one by one within each class of `labels` (N,), for
    copies and for the final fit alike, so that both follow the same recipe. So they are where one fold alone is left.
    """
    if not selects_by_row(folds) and np.ptp(folds[inside]):
        return folds[inside]
    by_row = np.empty(np.count_nonzero(inside), dtype=np.int64)
    by_row[np.argsort(labels[inside], kind="stable")] = np.arange(len(by_row)) % FOLDS_BY_ROW
    return by_row


def selects_by_row(folds: np.ndarray) -> bool:
    """Return whether `inner_folds` deals out single rows because there are fewer than three folds."""
    return len(np.unique(folds)) < FEWEST_FOLDS


def cross_validate(
    learner: GridLearner, logits: Any, labels: np.ndarray, folds: np.ndarray, *, n_jobs: int = 1
) -> NestedResult:
    """Run nested cross-validation over `folds` (N,) of logits (M, N, C) and labels (N,), `n_jobs` fits at a time.

    The final fit and each copy select their setting by `inner_folds`. A fit on one row takes the first setting.
    """
    outer = {name: folds == name for name in np.unique(folds).tolist()}
    outer = {name: mask for name, mask in outer.items() if not mask.all()}
    final = _Scope(labels, folds, np.zeros(len(labels), dtype=bool))
    scopes = {name: _Scope(labels, folds, mask) for name, mask in outer.items()}
    masks = [*outer.values(), *(mask for scope in (final, *scopes.values()) for mask in scope.masks.values())]
    held_out_sets = {mask.tobytes(): mask for mask in masks}
    all_fits = _all_fits(learner, logits, labels, list(held_out_sets.values()), n_jobs)
    fits = dict(zip(held_out_sets, all_fits, strict=True))

    def predictions(held_out: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Probabilities (G, n, C) of `rows` (n,) by the fit without `held_out` (N,), which has them."""
        return fits[held_out.tobytes()][:, np.searchsorted(np.flatnonzero(held_out), rows)]

    def held_out_predictions(scope: _Scope) -> np.ndarray:
        """Probabilities (G, n, C) of the rows of a scope, each by the fit without its inner fold."""
        inner = np.empty((len(learner.settings()), len(scope.rows), logits.shape[2]), dtype=np.float32)
        for name, mask in scope.masks.items():
            inside = scope.folds == name
            inner[:, inside] = predictions(mask, scope.rows[inside])
        return inner

    setting, setting_losses, held_out = 0, np.full(len(learner.settings()), np.nan), None
    if final.masks:
        inner = held_out_predictions(final)
        setting_losses = _losses(inner, labels)
        setting = int(setting_losses.argmin())
        held_out = HeldOut(final.rows, final.folds, inner[setting])
    nested_crossfit = np.full((len(labels), logits.shape[2]), np.nan, dtype=np.float32)
    inner_held_out: dict[int, HeldOut] = {}
    inner_nested: dict[int, dict[int, np.ndarray]] = {}
    for name, mask in outer.items():
        selected, scope = 0, scopes[name]
        if scope.masks:
            inner, of_rows = held_out_predictions(scope), labels[scope.rows]
            selected = int(_losses(inner, of_rows).argmin())
            inner_held_out[name] = HeldOut(scope.rows, scope.folds, inner[selected])
            if not selects_by_row(folds):
                inner_nested[name] = {
                    other: inner[int(_losses(inner[:, voting], of_rows[voting]).argmin())]
                    for other in scope.masks
                    for voting in [scope.folds != other]
                }
        nested_crossfit[mask] = predictions(mask, np.flatnonzero(mask))[selected]
    return NestedResult(setting, setting_losses, held_out, nested_crossfit, inner_held_out, inner_nested)


class _Scope:
    """The rows of one fit, and which rows are held out of each fit that helps to select its setting."""

    def __init__(self, labels: np.ndarray, folds: np.ndarray, held_out: np.ndarray) -> None:
        self.rows = np.flatnonzero(~held_out)
        self.folds = inner_folds(labels, folds, ~held_out)
        names = np.unique(self.folds).tolist()
        self.masks: dict[int, np.ndarray] = {}
        """{inner fold: rows that are held out, bool (N,)}; empty where no row is left to fit on"""
        for name in names if len(names) > 1 else ():
            mask = held_out.copy()
            mask[self.rows[self.folds == name]] = True
            self.masks[name] = mask


def evenly_spaced_epochs(epochs: int, count: int) -> list[int]:
    """Return `count` epochs evenly spaced up to the last one; fewer if `epochs` is smaller than `count`."""
    return sorted({max(1, round(epochs * (index + 1) / count)) for index in range(count)})


def _all_fits(
    learner: GridLearner, logits: Any, labels: np.ndarray, held_out_sets: Sequence[np.ndarray], n_jobs: int
) -> list[np.ndarray]:
    # One thread per fit: the same sums in the same order, whatever the number of cores.
    fits = engines.current().map(
        _fit,
        held_out_sets,
        shared=(learner, logits, labels),
        description=f"fits of {type(learner).__name__.removesuffix('Learner').lower()}",
        **{"n_threads" if learner.thread_safe else "n_processes": n_jobs},
        threads_per_job=FIT_THREADS,
    )
    return list(fits)


def _fit(learner: GridLearner, logits: Any, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Return probabilities (G, H, C) for the rows held out, bool (N,), fitted on the other rows."""
    return learner.predictions(logits[:, ~held_out], labels[~held_out], logits[:, held_out])


def _losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.array([log_loss_per_row(values, labels).mean() for values in probabilities])
