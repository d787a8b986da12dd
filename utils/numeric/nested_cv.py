"""Nested cross-validation that computes every fit once: selects a learner's setting and cross-fits the selection.

The copy for held-out fold k selects its setting by leaving out a second fold j of the others. A fit without k and j
serves the copies of both k and j; a fit without k predicts k and helps to select the setting of the final fit. So
K (K + 1) / 2 fits replace K * K + K. A class may be absent from the rows of a fit: learners return all C columns.
Fits along paths of settings stop where no selection needs them (`utils.numeric.setting_paths`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from utils.core import engines
from utils.numeric.metrics import log_loss_per_row
from utils.numeric.setting_paths import FIT_THREADS, PathFits, PathLearner, Predictions, Vote

FEWEST_FOLDS = 3  # of cross-fitting, so that a copy without one of them has two left
FOLDS_BY_ROW = 5


class GridLearner(Protocol):
    """A learner with a grid of G settings, fitted on members' logits."""

    @property
    def thread_safe(self) -> bool:
        """Whether fits in concurrent threads give the same bytes as in separate processes."""

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Return the G settings as JSON values; the first of equally good settings is selected."""

    def predictions(self, logits: Any, labels: np.ndarray, held_out: Any, /) -> np.ndarray:
        """Fit every setting on logits (M, N, C) and labels (N,).

        Returns probabilities float32 (G, H, C) for the held-out logits (M, H, C). A learner of embeddings takes
        `MemberOutputs` in place of both logits.
        """


@dataclass(frozen=True)
class HeldOut:
    """Predictions that select the setting of a fit and calibrate it: each row's by the fit without its inner fold."""

    rows: np.ndarray
    """int64 (n,): indices of the rows"""
    folds: np.ndarray
    """int64 (n,): inner fold of each row"""
    probabilities: np.ndarray
    """float32 (n, C): with the selected setting"""


@dataclass(frozen=True)
class NestedResult:
    """Result of `cross_validate`; rows keep the order of the input."""

    setting: int
    """Index of the setting of the final fit."""
    setting_losses: np.ndarray
    """float64 (G,): cross-validated log-loss of each setting in nats; NaN where no row can be held out, and for
    settings that the search along a path did not reach"""
    held_out: HeldOut | None
    """Predictions that selected the setting of the final fit; None where no row can be held out."""
    nested_crossfit: np.ndarray
    """float32 (N, C): probabilities of each row by the copy fitted without its fold, with the setting selected without
    this fold; NaN where there is only one fold"""
    inner_held_out: dict[int, HeldOut]
    """{fold: predictions that selected the setting of the copy fitted without this fold}"""
    inner_nested: dict[int, dict[int, np.ndarray]]
    """{fold: {other fold: probabilities (n, C) of the rows of `inner_held_out`}}, with the setting of least loss
    without both; empty with fewer than three folds

    `inner_held_out` uses the setting of least loss on all of its rows; here the rows of the other fold do not count.
    """


def inner_folds(labels: np.ndarray, folds: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the folds (n,) by which a fit on the rows `inside` (N,), bool, selects and calibrates.

    They are the cross-fitting `folds` (N,) of these rows. With fewer than three of these folds, a copy fitted without
    one of them has fewer than two left: the rows are then assigned to folds in turn within each class of `labels` (N,),
    for copies and for the final fit, so that both follow the same procedure. The same holds where only one fold is
    left.
    """
    if not selects_by_row(folds) and np.ptp(folds[inside]):
        return folds[inside]
    by_row = np.empty(np.count_nonzero(inside), dtype=np.int64)
    by_row[np.argsort(labels[inside], kind="stable")] = np.arange(len(by_row)) % FOLDS_BY_ROW
    return by_row


def selects_by_row(folds: np.ndarray) -> bool:
    """Return whether `inner_folds` assigns rows to folds in turn because there are fewer than three folds."""
    return len(np.unique(folds)) < FEWEST_FOLDS


def cross_validate(
    learner: GridLearner, logits: Any, labels: np.ndarray, folds: np.ndarray, *, n_jobs: int = 1
) -> NestedResult:
    """Run nested cross-validation over `folds` (N,) of logits (M, N, C) and labels (N,), `n_jobs` fits at a time.

    The final fit and each copy select their setting by `inner_folds`. A fit on one row uses the first setting.
    """
    outer = {name: folds == name for name in np.unique(folds).tolist()}
    outer = {name: mask for name, mask in outer.items() if not mask.all()}
    n_settings, classes = len(learner.settings()), logits.shape[2]
    paths = learner.paths() if isinstance(learner, PathLearner) else [[setting] for setting in range(n_settings)]
    final = _Scope(labels, folds, np.zeros(len(labels), dtype=bool), n_settings, len(paths))
    scopes = {name: _Scope(labels, folds, mask, n_settings, len(paths)) for name, mask in outer.items()}
    if not selects_by_row(folds):
        for scope in scopes.values():
            scope.add_votes_without()
    masks = [*outer.values(), *(mask for scope in (final, *scopes.values()) for mask in scope.masks.values())]
    held_out_sets = {mask.tobytes(): mask for mask in masks}
    number_of = {key: number for number, key in enumerate(held_out_sets)}
    needed = [(final, final.fits(number_of))]
    needed += [
        (scopes[name], {number_of[mask.tobytes()]} | scopes[name].fits(number_of)) for name, mask in outer.items()
    ]
    by_fit = _search(learner, logits, labels, held_out_sets, number_of, paths, needed, n_jobs)

    def predictions(held_out: np.ndarray, rows: np.ndarray, setting: int) -> np.ndarray:
        """Return probabilities (n, C) of `rows` (n,) by the fit without `held_out` (N,), which includes these rows."""
        values = by_fit[number_of[held_out.tobytes()]][setting]
        return values[np.searchsorted(np.flatnonzero(held_out), rows)]

    def held_out_predictions(scope: _Scope, setting: int) -> np.ndarray:
        """Return probabilities (n, C) of the rows of a scope, each by the fit without its inner fold."""
        return scope.predictions(by_fit, number_of, setting, classes)

    setting, setting_losses, held_out = 0, np.full(n_settings, np.nan), None
    if final.masks:
        setting, setting_losses = final.vote.selected, final.vote.losses
        held_out = HeldOut(final.rows, final.folds, held_out_predictions(final, setting))
    nested_crossfit = np.full((len(labels), classes), np.nan, dtype=np.float32)
    inner_held_out: dict[int, HeldOut] = {}
    inner_nested: dict[int, dict[int, np.ndarray]] = {}
    for name, mask in outer.items():
        selected, scope = 0, scopes[name]
        if scope.masks:
            selected = scope.vote.selected
            inner_held_out[name] = HeldOut(scope.rows, scope.folds, held_out_predictions(scope, selected))
            if not selects_by_row(folds):
                inner_nested[name] = {
                    other: held_out_predictions(scope, vote.selected) for other, vote in scope.votes_without.items()
                }
        nested_crossfit[mask] = predictions(mask, np.flatnonzero(mask), selected)
    return NestedResult(setting, setting_losses, held_out, nested_crossfit, inner_held_out, inner_nested)


def _search(
    learner: GridLearner,
    logits: Any,
    labels: np.ndarray,
    held_out_sets: Mapping[bytes, np.ndarray],
    number_of: Mapping[bytes, int],
    paths: Sequence[Sequence[int]],
    needed: Sequence[tuple[_Scope, set[int]]],
    n_jobs: int,
) -> Sequence[Predictions]:
    """Record the votes of the scopes along the paths; return {setting: probabilities (H, C)} for each fit.

    `number_of` maps each mask of `held_out_sets` to its index, the number of its fit. `needed` are the scopes with the
    numbers of the fits that they read or select for. Without a vote the first setting is used.
    """
    masks = list(held_out_sets.values())
    fits = PathFits(learner, logits, labels, masks, n_jobs) if isinstance(learner, PathLearner) else None
    by_fit: Sequence[Predictions]
    if fits is not None:
        by_fit = fits.by_fit
    else:
        all_predictions = _all_fits(learner, logits, labels, masks, n_jobs)
        by_fit = [dict(enumerate(by_setting)) for by_setting in all_predictions]
    for number, path in enumerate(paths):
        for step, setting in enumerate(path):
            active = [entry for entry in needed if entry[0].looks_at(number, is_first=setting == 0)]
            if not active:
                break
            if fits is not None:
                fits.advance(number, step, set().union(*(numbers for _, numbers in active)))
            for scope, _ in active:
                if scope.masks:
                    values = scope.predictions(by_fit, number_of, setting, logits.shape[2])
                    scope.count(number, path[: step + 1], log_loss_per_row(values, labels[scope.rows]))
    return by_fit


class _Scope:
    """The rows of one fit, the rows held out of each fit that helps to select its setting, and the votes.

    A vote that selects for a copy without one more fold excludes the rows of that fold.
    """

    def __init__(
        self, labels: np.ndarray, folds: np.ndarray, held_out: np.ndarray, n_settings: int, n_paths: int
    ) -> None:
        self.rows = np.flatnonzero(~held_out)
        self.folds = inner_folds(labels, folds, ~held_out)
        names = np.unique(self.folds).tolist()
        self.masks: dict[int, np.ndarray] = {}
        """{inner fold: rows that are held out, bool (N,)}; empty where no row is left to fit on"""
        for name in names if len(names) > 1 else ():
            mask = held_out.copy()
            mask[self.rows[self.folds == name]] = True
            self.masks[name] = mask
        self.shape = n_settings, n_paths
        self.vote = self._new_vote()
        self.votes_without: dict[int, Vote] = {}
        """{inner fold: the vote of the rows of the other inner folds}"""

    def add_votes_without(self) -> None:
        """Add a vote for each inner fold, of the rows of all other inner folds."""
        self.votes_without = {name: self._new_vote() for name in self.masks}

    def fits(self, number_of: Mapping[bytes, int]) -> set[int]:
        """Return the numbers of the fits that leave out one of the inner folds."""
        return {number_of[mask.tobytes()] for mask in self.masks.values()}

    def looks_at(self, path: int, *, is_first: bool) -> bool:
        """Return whether any vote has not stopped on a path; without votes, whether the setting `is_first` of all."""
        if not self.masks:
            return is_first
        return any(vote.open_paths[path] for vote in (self.vote, *self.votes_without.values()))

    def predictions(
        self,
        by_fit: Sequence[Predictions],
        number_of: Mapping[bytes, int],
        setting: int,
        classes: int,
    ) -> np.ndarray:
        """Return probabilities float32 (n, C) of the rows under a setting, each by the fit without its inner fold.

        `by_fit` has the predictions of all fits.
        """
        values = np.empty((len(self.rows), classes), dtype=np.float32)
        for name, mask in self.masks.items():
            inside = self.folds == name
            positions = np.searchsorted(np.flatnonzero(mask), self.rows[inside])
            values[inside] = by_fit[number_of[mask.tobytes()]][setting][positions]
        return values

    def count(self, path: int, settings: Sequence[int], losses: np.ndarray) -> None:
        """Add the losses (n,) of the last of a path's `settings` to the votes that have not stopped on this path."""
        if self.vote.open_paths[path]:
            self.vote.count(path, settings, float(losses.mean()))
        for name, vote in self.votes_without.items():
            if vote.open_paths[path]:
                vote.count(path, settings, float(losses[self.folds != name].mean()))

    def _new_vote(self) -> Vote:
        n_settings, n_paths = self.shape
        return Vote(np.full(n_settings, np.nan), [True] * n_paths)


def evenly_spaced_epochs(epochs: int, count: int) -> list[int]:
    """Return `count` epochs evenly spaced up to the last one; fewer if `epochs` is smaller than `count`."""
    return sorted({max(1, round(epochs * (index + 1) / count)) for index in range(count)})


def _all_fits(
    learner: GridLearner, logits: Any, labels: np.ndarray, held_out_sets: Sequence[np.ndarray], n_jobs: int
) -> list[np.ndarray]:
    # One thread per fit: the same order of summation for any number of cores.
    fits = engines.current().map(
        _fit,
        held_out_sets,
        shared=(learner, logits, labels),
        description=f"fits of {type(learner).__name__.removesuffix('Learner').lower()}",
        n_threads=n_jobs if learner.thread_safe else 1,
        n_processes=1 if learner.thread_safe else n_jobs,
        threads_per_job=FIT_THREADS,
    )
    return list(fits)


def _fit(learner: GridLearner, logits: Any, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Return probabilities (G, H, C) for the `held_out` rows, bool (N,), of the settings fitted on the other rows."""
    return learner.predictions(logits[:, ~held_out], labels[~held_out], logits[:, held_out])
