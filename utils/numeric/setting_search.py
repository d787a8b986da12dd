"""Selection of settings for several fits at once, by predictions of rows that other fits leave out.

A learner with several paths of settings is searched in two rounds, a form of racing (Maron and Moore 1993). In the
first, each selection follows all paths by few fits only, its screening. A path whose best setting there is worse than
the best of all by more than `SCREENING_ERRORS` standard errors of the paired differences is left out; the second round
follows the other paths on all inner folds. A selection reads its own rows only, in both rounds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from utils.core import engines
from utils.numeric.metrics import log_loss_per_row
from utils.numeric.setting_paths import FIT_THREADS, PathFits, PathLearner, Predictions, Vote, fits_of

SCREENING_FOLDS = 2  # inner folds that the first round reads
SCREENING_ERRORS = 2.0  # standard errors: a path that is as good as the best one is left out in about 2% of the cases


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


class Selection:
    """The selection of one fit's setting: its rows, the fits that predict them, and its votes.

    A vote that selects for a copy without one more fold excludes the rows of that fold.
    """

    def __init__(
        self,
        rows: np.ndarray,
        folds: np.ndarray,
        masks: Mapping[int, np.ndarray],
        paths: Sequence[Sequence[int]],
        excluded: Iterable[int],
    ) -> None:
        """Take indices of the rows (n,), their inner folds (n,) and {inner fold: rows that its fit leaves out, (N,)}.

        `excluded` are the inner folds that each have a vote without their rows.
        """
        self.rows, self.folds, self.masks, self.paths = rows, folds, masks, paths
        self.vote = Vote.on(paths)
        self.votes_without = {name: Vote.on(paths) for name in excluded}
        """{inner fold: the vote of the rows of the other inner folds}"""
        self.row_losses: dict[int, np.ndarray] = {}
        """{setting: losses (n,) of the rows}"""
        self.tried: set[int] = set()
        """Settings whose losses were computed, in either round"""

    @classmethod
    def without(
        cls,
        held_out: np.ndarray,
        folds: np.ndarray,
        paths: Sequence[Sequence[int]],
        *,
        are_nested: bool,
        only: Set[int] | None = None,
    ) -> Selection:
        """Return the selection for the fit without `held_out`, bool (N,), given the inner folds (n,) of other rows.

        There are no masks where no row is left to fit on. With `are_nested`, each inner fold has a vote without it.
        `only` are the inner folds whose rows select, if not all.
        """
        rows = np.flatnonzero(~held_out)
        if only is not None:
            is_read = np.isin(folds, list(only))
            rows, folds = rows[is_read], folds[is_read]
        names = np.unique(folds).tolist()
        masks: dict[int, np.ndarray] = {}
        for name in names if len(names) > 1 else ():
            masks[name] = held_out.copy()
            masks[name][rows[folds == name]] = True
        return cls(rows, folds, masks, paths, masks if are_nested else ())

    def on_folds(self, names: Set[int]) -> Selection:
        """Return a selection with the same votes on the rows of some inner folds."""
        inside = np.isin(self.folds, list(names))
        masks = {name: mask for name, mask in self.masks.items() if name in names}
        return Selection(self.rows[inside], self.folds[inside], masks, self.paths, self.votes_without)

    def keep_near_best(self, screening: Selection) -> None:
        """Restrict each vote to settings that it has read in the first round, on paths that are not left out."""
        self.tried = screening.tried
        self.vote = screening.near_best(screening.vote, np.ones(len(screening.rows), dtype=bool))
        for name, vote in screening.votes_without.items():
            self.votes_without[name] = screening.near_best(vote, screening.folds != name)

    def near_best(self, vote: Vote, inside: np.ndarray) -> Vote:
        """Return a new vote on the settings read by `vote`, whose rows are `inside`, bool (n,), on near-best paths."""
        least = self.row_losses[vote.selected][inside]
        remaining = []
        for path in self.paths:
            reached = [setting for setting in path if np.isfinite(vote.losses[setting])]
            best = min(reached, key=lambda setting: float(vote.losses[setting]))
            differences = self.row_losses[best][inside] - least
            error = float(differences.std()) / np.sqrt(len(differences))
            is_near = float(differences.mean()) <= SCREENING_ERRORS * error
            remaining.append(len(reached) if is_near else 0)
        return Vote(np.full(len(vote.losses), np.nan), remaining)

    def reads(self, path: int, *, is_first: bool) -> bool:
        """Return whether any vote has not stopped on a path; without votes, whether the setting `is_first` of all."""
        if not self.masks:
            return is_first
        return any(vote.remaining[path] for vote in (self.vote, *self.votes_without.values()))

    def predictions(self, fits: FitPredictions, setting: int) -> np.ndarray:
        """Return probabilities float32 (n, C) of the rows under a setting, each by the fit without its inner fold."""
        by_fold = [fits.of(mask, self.rows[self.folds == name], setting) for name, mask in self.masks.items()]
        values = np.empty((len(self.rows), by_fold[0].shape[1]), dtype=np.float32)
        for name, predicted in zip(self.masks, by_fold, strict=True):
            values[self.folds == name] = predicted
        return values

    def count(self, path: int, settings: Sequence[int], losses: np.ndarray) -> None:
        """Add the losses (n,) of the last of a path's `settings` to the votes that have not stopped on this path."""
        self.row_losses[settings[-1]] = losses
        self.tried.add(settings[-1])
        if self.vote.remaining[path]:
            self.vote.count(path, settings, float(losses.mean()))
        for name, vote in self.votes_without.items():
            if vote.remaining[path]:
                vote.count(path, settings, float(losses[self.folds != name].mean()))


@dataclass(frozen=True)
class FitPredictions:
    """Predictions of each fit for the rows that it leaves out."""

    masks: Sequence[np.ndarray]
    """Rows that each fit leaves out, bool (N,)"""
    by_fit: Sequence[Predictions]
    """{setting: probabilities (H, C)} of each fit"""

    def of(self, held_out: np.ndarray, rows: np.ndarray, setting: int) -> np.ndarray:
        """Return probabilities (n, C) of `rows` (n,) by the fit without `held_out`, bool (N,), which includes them."""
        (number,) = self.numbers([held_out])
        return self.by_fit[number][setting][np.searchsorted(np.flatnonzero(held_out), rows)]

    def numbers(self, masks: Iterable[np.ndarray]) -> set[int]:
        """Return the indices of the fits without these rows."""
        return {self._number_of[mask.tobytes()] for mask in masks}

    @cached_property
    def _number_of(self) -> Mapping[bytes, int]:
        return {mask.tobytes(): number for number, mask in enumerate(self.masks)}


@dataclass(frozen=True)
class Search:
    """What `search` selects for one fit, and which fits that takes."""

    selection: Selection
    screening: Selection
    """The selection of the first round, by fewer or other fits"""
    held_out: np.ndarray | None = None
    """Rows to predict with the selected setting, by the fit without them, bool (N,)"""


def search(
    learner: GridLearner,
    logits: Any,
    labels: np.ndarray,
    masks: Sequence[np.ndarray],
    searches: Sequence[Search],
    *,
    n_jobs: int,
) -> FitPredictions:
    """Record the votes of the selections; return the predictions of the fits without `masks`, bool (N,) each.

    The masks are distinct, and those of all `searches` are among them. Without a vote the first setting is used.
    """
    paths = paths_of(learner)
    if isinstance(learner, PathLearner):
        fits = PathFits(learner, logits, labels, masks, n_jobs)
        found = FitPredictions(masks, fits.by_fit)
    else:
        fits = None
        by_fit = _all_fits(learner, logits, labels, masks, n_jobs)
        found = FitPredictions(masks, [dict(enumerate(by_setting)) for by_setting in by_fit])
    needed = []
    for each in searches:
        own = [] if each.held_out is None else [each.held_out]
        needed.append(found.numbers([*each.selection.masks.values(), *own]))
    selections, later = [each.selection for each in searches], set(range(len(masks)))
    if fits is not None and len(paths) > 1:
        screenings = [each.screening for each in searches]
        screening_fits = [found.numbers(screening.masks.values()) for screening in screenings]
        first = set().union(*screening_fits)
        wanted = [own | (later_own & first) for own, later_own in zip(screening_fits, needed, strict=True)]
        _follow(fits, found, labels, screenings, wanted)
        for selection, screening in zip(selections, screenings, strict=True):
            if selection.masks:
                selection.keep_near_best(screening)
        later -= first
    _follow(fits, found, labels, selections, [numbers & later for numbers in needed])
    return found


def paths_of(learner: GridLearner) -> Sequence[Sequence[int]]:
    """Return the paths of a learner; each setting is one where the learner has none."""
    return learner.paths() if isinstance(learner, PathLearner) else [[each] for each in range(len(learner.settings()))]


def _follow(
    fits: PathFits | None,
    found: FitPredictions,
    labels: np.ndarray,
    selections: Sequence[Selection],
    needed: Sequence[set[int]],
) -> None:
    """Follow the paths as far as any selection reads, with the fits that are `needed` for each of the selections."""
    for number, path in enumerate(selections[0].paths):
        for step, setting in enumerate(path):
            active = [index for index, each in enumerate(selections) if each.reads(number, is_first=setting == 0)]
            if not active:
                break
            if fits is not None:
                fits.advance(number, step, set().union(*(needed[index] for index in active)))
            for selection in (selections[index] for index in active):
                if selection.masks:
                    values = selection.predictions(found, setting)
                    selection.count(number, path[: step + 1], log_loss_per_row(values, labels[selection.rows]))


def _all_fits(
    learner: GridLearner, logits: Any, labels: np.ndarray, masks: Sequence[np.ndarray], n_jobs: int
) -> list[np.ndarray]:
    # One thread per fit: the same order of summation for any number of cores. Torch networks have paths.
    # Threads of scikit-learn's forests replace the process's warning filters, and may restore those of another thread.
    with warnings.catch_warnings():
        return list(
            engines.current().map(
                _fit,
                masks,
                shared=(learner, logits, labels),
                description=fits_of(learner),
                n_threads=n_jobs if learner.thread_safe else 1,
                threads_per_job=FIT_THREADS,
            )
        )


def _fit(learner: GridLearner, logits: Any, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Return probabilities (G, H, C) for the `held_out` rows, bool (N,), of the settings fitted on the other rows."""
    return learner.predictions(logits[:, ~held_out], labels[~held_out], logits[:, held_out])
