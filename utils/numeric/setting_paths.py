"""Settings that one training passes one after another, and where a search along them stops.

Strengths of a penalty, rounds of boosting and epochs are points of one path: a training goes from one to the next. The
loss on held-out rows falls and rises again along it. A vote, which is the rows that a selection reads, stops after
`PATIENCE` settings that are no better than the best before (early stopping, Prechelt 1998), and a training goes on as
long as a vote reads it. Each vote follows its own rows alone, so that nothing that it may not read decides where it
stops.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from utils.core import engines

PATIENCE = 2  # settings of a path that are no better than its best one, after which a vote stops
FIT_THREADS = 1  # over which the sums of one fit are split; small as they are, a second thread costs time


Shape = TypeVar("Shape", bound=Hashable)
Predictions = Mapping[int, np.ndarray]
"""{setting: probabilities float32 (H, C)} of one fit"""


class Training(Protocol):
    """Fits of one path that advance together."""

    def advance(self, wanted: Sequence[int]) -> list[np.ndarray]:
        """Go on to the next setting with the `wanted` of its fits, by their numbers from 0; the others never go on.

        Returns probabilities float32 (H, C) of the rows held out of each.
        """


@runtime_checkable
class PathLearner(Protocol):
    """A learner whose G settings lie on paths."""

    @property
    def thread_safe(self) -> bool:
        """Whether trainings depend on nothing of the process; otherwise on torch's number of threads."""

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Return the G settings as JSON values; the first of equally good settings is selected."""

    def paths(self) -> Sequence[Sequence[int]]:
        """Return the settings of each path by their indices, in the order in which a training passes them."""

    def trainings(
        self, path: int, logits: Any, labels: np.ndarray, held_out_sets: Sequence[np.ndarray], /
    ) -> Sequence[tuple[Sequence[int], Training]]:
        """Return the trainings of one path on logits (M, N, C) and labels (N,), each with the fits that it advances.

        A learner of embeddings takes `MemberOutputs` in place of logits.

        A fit leaves one of the sets out, bool (N,), and is named by the index of it. Which fits advance together
        depends on the data alone. Trainings may be advanced in concurrent threads.
        """


@dataclass
class Vote:
    """Losses of the settings on some rows, as far as the search has gone along each path."""

    losses: np.ndarray
    """float64 (G,): NaN where the search did not go"""
    open_paths: list[bool]

    def count(self, path: int, settings: Sequence[int], loss: float) -> None:
        """Note the loss of the next setting of a path, the last of `settings`; stop there if it has risen."""
        self.losses[settings[-1]] = loss
        since_best = len(settings) - 1 - int(self.losses[list(settings)].argmin())
        self.open_paths[path] = since_best < PATIENCE

    @property
    def selected(self) -> int:
        """The setting of least loss."""
        return int(np.nanargmin(self.losses))


class PathFits:
    """Predictions of every fit of a path learner, made as far as they are asked for."""

    def __init__(
        self,
        learner: PathLearner,
        logits: Any,
        labels: np.ndarray,
        held_out_sets: Sequence[np.ndarray],
        n_jobs: int,
    ) -> None:
        self.learner, self.paths, self.n_jobs = learner, learner.paths(), n_jobs
        self.by_fit: list[dict[int, np.ndarray]] = [{} for _ in held_out_sets]
        """Of each fit {setting: probabilities (H, C)}"""
        if not engines.current().shares_memory:
            self._fit_elsewhere(logits, labels, held_out_sets)
            return
        self.rows = logits, labels, list(held_out_sets)
        self.trainings: Sequence[tuple[Sequence[int], Training]] = []
        """Of the path that is searched"""

    def advance(self, path: int, step: int, wanted: set[int]) -> None:
        """Have the `step`-th setting of a path predicted by the fits that are wanted, one path after the other."""
        if not engines.current().shares_memory:
            return
        if step == 0:
            self.trainings = self.learner.trainings(path, *self.rows)
        jobs = []
        for fits, training in self.trainings:
            inside = [number for number, fit in enumerate(fits) if fit in wanted]
            if inside:
                jobs.append((training, inside, [fits[number] for number in inside]))
        with nullcontext() if self.learner.thread_safe else torch_threads(FIT_THREADS):
            results = engines.current().map(_advance, jobs, n_threads=self.n_jobs, threads_per_job=FIT_THREADS)
            for (_, _, fits), probabilities in zip(jobs, results, strict=True):
                for fit, values in zip(fits, probabilities, strict=True):
                    self.by_fit[fit][self.paths[path][step]] = values

    def _fit_elsewhere(self, logits: Any, labels: np.ndarray, held_out_sets: Sequence[np.ndarray]) -> None:
        """Make whole trainings where no state can be kept between two steps of them."""
        learner = self.learner
        units = [
            (path, number)
            for path in range(len(self.paths))
            for number in range(len(learner.trainings(path, logits, labels, held_out_sets)))
        ]
        results = engines.current().map(
            whole_training, units, shared=(learner, logits, labels, list(held_out_sets)), threads_per_job=FIT_THREADS
        )
        for fitted in results:
            for fit, by_setting in fitted.items():
                self.by_fit[fit] |= by_setting


def whole_training(
    learner: PathLearner,
    logits: Any,
    labels: np.ndarray,
    held_out_sets: Sequence[np.ndarray],
    unit: tuple[int, int],
) -> dict[int, dict[int, np.ndarray]]:
    """Return {fit: {setting: probabilities (H, C)}} of one training, `unit` being its path and its number."""
    path, number = unit
    with nullcontext() if learner.thread_safe else torch_threads(FIT_THREADS):
        fits, training = learner.trainings(path, logits, labels, held_out_sets)[number]
        by_fit: dict[int, dict[int, np.ndarray]] = {fit: {} for fit in fits}
        for setting in learner.paths()[path]:
            for fit, values in zip(fits, training.advance(range(len(fits))), strict=True):
                by_fit[fit][setting] = values
    return by_fit


def path_predictions(learner: PathLearner, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Return probabilities float32 (G, H, C) of held-out logits (M, H, C) after trainings on logits (M, N, C)."""
    return joined_path_predictions(learner, np.concatenate([logits, held_out], axis=1), labels)


def joined_path_predictions(learner: PathLearner, joined: Any, labels: np.ndarray) -> np.ndarray:
    """Return probabilities float32 (G, H, C) of the last H rows after trainings on the first N.

    Takes logits (M, N + H, C), or `MemberOutputs` of that shape, and the labels (N,) of the first rows.
    """
    rows = joined.shape[1]
    truth = np.concatenate([labels, np.zeros(rows - len(labels), dtype=np.asarray(labels).dtype)])
    held_out = np.arange(rows) >= len(labels)
    by_setting: dict[int, np.ndarray] = {}
    for path in range(len(learner.paths())):
        by_setting |= whole_training(learner, joined, truth, [held_out], (path, 0))[0]
    return np.stack([by_setting[setting] for setting in range(len(learner.settings()))])


def paths_of_length(n_settings: int, length: int) -> list[range]:
    """Paths of equal length, one after the other, as many as the settings make."""
    return [range(first, first + length) for first in range(0, n_settings, length)]


def fits_side_by_side(shapes: Sequence[Shape], most: int) -> list[tuple[Shape, list[int]]]:
    """Groups of up to `most` fits whose shapes, one per fit, are equal, with the numbers of the fits."""
    fits_of: dict[Shape, list[int]] = {}
    for number, shape in enumerate(shapes):
        fits_of.setdefault(shape, []).append(number)
    return [
        (shape, fits[first : first + most]) for shape, fits in fits_of.items() for first in range(0, len(fits), most)
    ]


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """A block in which torch's operations use so many threads, in threads that are started there as well."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _advance(job: tuple[Training, list[int], list[int]]) -> list[np.ndarray]:
    training, inside, _ = job
    return training.advance(inside)
