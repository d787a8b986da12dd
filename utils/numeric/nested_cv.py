"""Nested cross-validation that computes every fit once: selects a learner's setting and cross-fits the selection.

The copy for held-out fold k selects its setting by leaving out a second fold j of the others. A fit without k and j
serves the copies of both k and j; a fit without k predicts k and helps to select the setting of the final fit. So
K (K + 1) / 2 fits replace K * K + K. With many rows a copy leaves out two of the other folds only, which takes 2 K fits
(`selecting_folds`). A class may be absent from the rows of a fit: learners return all C columns. Fits follow only the
settings that a selection reads (`utils.numeric.setting_search`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.numeric.setting_search import SCREENING_FOLDS, GridLearner, Search, Selection, paths_of, search

FEWEST_FOLDS = 3  # of cross-fitting, so that a copy without one of them has two left
FOLDS_BY_ROW = 5
ENOUGH_ROWS = 1_000
"""Held-out rows from which a copy selects by two folds: with more, losses differed by at most 0.0012 nats."""


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
    settings that the search along a path did not reach or whose path was left out after the first round"""
    n_tried: int
    """Number of settings with predictions of any held-out row."""
    held_out: HeldOut | None
    """Predictions that selected the setting of the final fit; None where no row can be held out."""
    nested_crossfit: np.ndarray
    """float32 (N, C): probabilities of each row by the copy fitted without its fold, with the setting selected without
    this fold; NaN where there is only one fold"""
    inner_held_out: dict[int, HeldOut]
    """{fold: predictions that selected the setting of the copy fitted without this fold}"""
    inner_nested: dict[int, dict[int, np.ndarray]]
    """{fold: {other fold: probabilities (n, C) of the rows of `inner_held_out`}} for its `selecting_folds`, with the
    setting of least loss without both; empty with fewer than three folds

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


def selecting_folds(folds: np.ndarray) -> dict[int, set[int]]:
    """Return the folds that select and calibrate for the copy without each fold: {fold: other folds}.

    They are all others, in K (K - 1) / 2 fits without two of the K folds of rows (N,). Where the two neighbours of each
    fold, in a circle of all folds, have `ENOUGH_ROWS` rows, they are these neighbours, in K fits. If one fold selects
    for the copy without another one, the other selects for its copy.
    """
    names, counts = (values.tolist() for values in np.unique(folds, return_counts=True))
    neighbours = {name: _neighbours(name, names) for name in names}
    rows_of = dict(zip(names, counts, strict=True))
    if min(sum(rows_of[other] for other in others) for others in neighbours.values()) >= ENOUGH_ROWS:
        return neighbours
    return {name: set(names) - {name} for name in names}


def n_fits(folds: np.ndarray) -> int:
    """Return the number of fits under several settings of a nested cross-validation over at least three folds (N,)."""
    selecting = selecting_folds(folds)
    return len(selecting) + sum(map(len, selecting.values())) // 2


def cross_validate(
    learner: GridLearner, logits: Any, labels: np.ndarray, folds: np.ndarray, *, n_jobs: int = 1
) -> NestedResult:
    """Run nested cross-validation over `folds` (N,) of logits (M, N, C) and labels (N,), `n_jobs` fits at a time.

    The final fit and each copy select their setting by `inner_folds`; with at least three folds, a copy by its
    `selecting_folds`. A fit on one row uses the first setting.
    """
    outer = {name: folds == name for name in np.unique(folds).tolist()}
    outer = {name: mask for name, mask in outer.items() if not mask.all()}
    paths, classes = paths_of(learner), logits.shape[2]
    nobody = np.zeros(len(labels), dtype=bool)
    final = Selection.without(nobody, inner_folds(labels, folds, ~nobody), paths, are_nested=False)
    are_nested = not selects_by_row(folds)
    selecting = selecting_folds(folds) if are_nested else {}
    copies = {
        name: Selection.without(
            mask, inner_folds(labels, folds, ~mask), paths, are_nested=are_nested, only=selecting.get(name)
        )
        for name, mask in outer.items()
    }
    masks = [*outer.values(), *(mask for each in (final, *copies.values()) for mask in each.masks.values())]
    searches = [Search(final, _screening_by_pairs(final, outer) if are_nested else _screening_by_first_folds(final))]
    for name, mask in outer.items():
        copy = copies[name]
        screening = copy.on_folds(_neighbours(name, list(outer))) if are_nested else _screening_by_first_folds(copy)
        searches.append(Search(copy, screening, mask))
    distinct = list({mask.tobytes(): mask for mask in masks}.values())
    fits = search(learner, logits, labels, distinct, searches, n_jobs=n_jobs)

    setting, setting_losses, held_out = 0, np.full(len(learner.settings()), np.nan), None
    if final.masks:
        setting, setting_losses = final.vote.selected, final.vote.losses
        held_out = HeldOut(final.rows, final.folds, final.predictions(fits, setting))
    nested_crossfit = np.full((len(labels), classes), np.nan, dtype=np.float32)
    inner_held_out: dict[int, HeldOut] = {}
    inner_nested: dict[int, dict[int, np.ndarray]] = {}
    for name, mask in outer.items():
        selected, copy = 0, copies[name]
        if copy.masks:
            selected = copy.vote.selected
            inner_held_out[name] = HeldOut(copy.rows, copy.folds, copy.predictions(fits, selected))
            if are_nested:
                inner_nested[name] = {
                    other: copy.predictions(fits, vote.selected) for other, vote in copy.votes_without.items()
                }
        nested_crossfit[mask] = fits.of(mask, np.flatnonzero(mask), selected)
    return NestedResult(
        setting, setting_losses, len(final.tried), held_out, nested_crossfit, inner_held_out, inner_nested
    )


def _screening_by_first_folds(selection: Selection) -> Selection:
    return selection.on_folds(set(list(selection.masks)[:SCREENING_FOLDS]))


def _screening_by_pairs(final: Selection, outer: Mapping[int, np.ndarray]) -> Selection:
    """Return the screening of the final fit: each row by the fit without its fold and the next one of the circle.

    The copies' screenings need these fits anyway. `outer` are {fold: its rows, bool (N,)}.
    """
    names = list(outer)
    following = dict(zip(names, [*names[1:], *names[:1]], strict=True))
    masks = {name: outer[name] | outer[following[name]] for name in names}
    return Selection(final.rows, final.folds, masks, final.paths, ())


def _neighbours(name: int, names: Sequence[int]) -> set[int]:
    """Return the neighbours of a fold in a circle of all folds `names`, which are in order.

    If each copy screens by these, the first round takes K of the fits without two folds.
    """
    place = names.index(name)
    return {names[(place + 1) % len(names)], names[place - 1]}


def evenly_spaced_epochs(epochs: int, count: int) -> list[int]:
    """Return `count` epochs evenly spaced up to the last one; fewer if `epochs` is smaller than `count`."""
    return sorted({max(1, round(epochs * (index + 1) / count)) for index in range(count)})
