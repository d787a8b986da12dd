"""Paths of settings that one training run covers in sequence, with early stopping of the search along them.

Penalty strengths, boosting rounds and epochs are points of one path: a training continues from one to the next. The
loss on held-out rows first falls and then rises along it. A vote, the losses on the rows that a selection may read,
stops after `PATIENCE` settings that are no better than the best before (early stopping, Prechelt 1998), and a training
continues while any vote needs it. Each vote depends on its own rows only, so that no other row decides where it stops.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from utils.core import engines

PATIENCE = 2  # settings of a path no better than its best one, after which a vote stops
FIT_THREADS = 1  # per fit; the operations are so small that a second thread costs time


Shape = TypeVar("Shape", bound=Hashable)
Predictions = Mapping[int, np.ndarray]
"""{setting: probabilities float32 (H, C)} of one fit"""


class Training(Protocol):
    """Fits of one path that advance together."""

    def advance(self, wanted: Sequence[int]) -> list[np.ndarray]:
        """Advance the fits with the indices `wanted` to the next setting; the other fits are never advanced again.

        Returns for each advanced fit the probabilities float32 (H, C) of its held-out rows.
        """


@runtime_checkable
class PathLearner(Protocol):
    """A learner whose G settings lie on paths."""

    @property
    def thread_safe(self) -> bool:
        """Whether trainings are independent of process state; if not, they depend on torch's number of threads."""

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Return the G settings as JSON values; the first of equally good settings is selected."""

    def paths(self) -> Sequence[Sequence[int]]:
        """Return the indices of the settings of each path, in the order of training."""

    def trainings(
        self, path: int, logits: Any, labels: np.ndarray, held_out_sets: Sequence[np.ndarray], /
    ) -> Sequence[tuple[Sequence[int], Training]]:
        """Return the trainings of one path on logits (M, N, C) and labels (N,), each with the fits that it advances.

        A learner of embeddings takes `MemberOutputs` in place of logits. Each fit leaves out one of the
        `held_out_sets`, bool (N,), and is identified by the index of that set. Which fits advance together depends only
        on the data. Trainings may be advanced in concurrent threads.
        """


@dataclass
class Vote:
    """Losses of the settings on some rows, up to the point that the search has reached on each path."""

    losses: np.ndarray
    """float64 (G,): NaN for settings that the search did not reach"""
    remaining: list[int]
    """Number of settings of each path that the search may still read; 0 where it has stopped"""

    @classmethod
    def on(cls, paths: Sequence[Sequence[int]]) -> Vote:
        """Return a vote that may read all settings of the paths."""
        return cls(np.full(sum(len(path) for path in paths), np.nan), [len(path) for path in paths])

    def count(self, path: int, settings: Sequence[int], loss: float) -> None:
        """Record the loss of the last of a path's `settings`; stop after `PATIENCE` settings without gain."""
        self.losses[settings[-1]] = loss
        since_best = len(settings) - 1 - int(self.losses[list(settings)].argmin())
        self.remaining[path] = self.remaining[path] - 1 if since_best < PATIENCE else 0

    @property
    def selected(self) -> int:
        """The setting of least loss."""
        return int(np.nanargmin(self.losses))


class BatchedNetworks(Protocol):
    """Networks that are trained in one batch."""

    def run_to(self, epoch: int) -> None:
        """Train until the end of an epoch."""

    def keep(self, numbers: Sequence[int]) -> None:
        """Keep the networks at these indices and drop all others."""

    def predict(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Return the probabilities float32 (n, C) of one network for rows, int64 (n,)."""


Networks = TypeVar("Networks", bound=BatchedNetworks)


class BatchedFits(Generic[Networks]):
    """A `Training` of one or several networks per fit, in one batch, from one stop to the next."""

    def __init__(
        self,
        start: Callable[[Sequence[np.ndarray]], Networks],
        held_out_sets: Sequence[np.ndarray],
        stops: Sequence[int],
        networks_per_fit: int = 1,
    ) -> None:
        """Take a function from the rows of each fit, int64 (n,), to the networks of all, and the epochs to stop at."""
        self.start, self.held_out_sets, self.stops = start, held_out_sets, list(stops)
        self.networks_per_fit = networks_per_fit
        self.networks: Networks | None = None
        self.going_on = list(range(len(held_out_sets)))
        """Indices of the fits still in training"""

    @classmethod
    def grouped(
        cls,
        start: Callable[[Sequence[np.ndarray]], Networks],
        held_out_sets: Sequence[np.ndarray],
        stops: Sequence[int],
        shapes: Sequence[Hashable],
        most: int,
    ) -> list[tuple[Sequence[int], BatchedFits[Networks]]]:
        """Return trainings of at most `most` fits of equal shape each, with the fits that each of them advances."""
        return [
            (fits, cls(start, [held_out_sets[fit] for fit in fits], stops))
            for _, fits in fits_side_by_side(shapes, most)
        ]

    def advance(self, wanted: Sequence[int]) -> list[np.ndarray]:
        """Return the `wanted` fits' mean held-out probabilities at the next stop, and drop the other fits."""
        networks, predictions = self.advanced(wanted), []
        for index, fit in enumerate(wanted):
            rows = np.flatnonzero(self.held_out_sets[fit])
            of_networks = np.stack([networks.predict(number, rows) for number in self.numbers(index)])
            predictions.append(of_networks.mean(axis=0))
        return predictions

    def advanced(self, wanted: Sequence[int]) -> Networks:
        """Return the networks of the `wanted` fits at the next stop, and drop those of the others.

        Where this raises, it may be called again.
        """
        if self.networks is None:
            self.networks = self.start([np.flatnonzero(~self.held_out_sets[fit]) for fit in self.going_on])
        indices = [self.going_on.index(fit) for fit in wanted]
        self.networks.keep([number for index in indices for number in self.numbers(index)])
        self.going_on = list(wanted)
        self.networks.run_to(self.stops[0])
        del self.stops[0]
        return self.networks

    def numbers(self, index: int) -> range:
        """Return the indices among all networks of those of the fit at `index` of `going_on`."""
        return range(index * self.networks_per_fit, (index + 1) * self.networks_per_fit)


def trained_on_all(start: Callable[[Sequence[np.ndarray]], Networks], n_rows: int, epoch: int) -> Networks:
    """Return the network of one fit on all rows at the end of an epoch."""
    with torch_threads(FIT_THREADS):
        networks = start([np.arange(n_rows)])
        networks.run_to(epoch)
    return networks


class PathFits:
    """Predictions of every fit of a path learner, computed on request."""

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
        """{setting: probabilities (H, C)} of each fit"""
        if not engines.current().shares_memory:
            self._fit_elsewhere(logits, labels, held_out_sets)
            return
        self.rows = logits, labels
        self.held_out_sets = held_out_sets
        self.trainings: list[tuple[Sequence[int], Training]] = []
        """Trainings of the path that is being searched"""

    def advance(self, path: int, step: int, wanted: set[int]) -> None:
        """Predict the `step`-th setting of a path by the fits in `wanted`.

        Call for one path after the other, and for later steps with fits that were wanted in the first one.
        """
        if not engines.current().shares_memory or not wanted:
            return
        if step == 0:
            numbers = sorted(wanted)
            trainings = self.learner.trainings(path, *self.rows, [self.held_out_sets[number] for number in numbers])
            self.trainings = [([numbers[fit] for fit in fits], training) for fits, training in trainings]
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
        """Run complete trainings in worker processes, which keep no state between two steps."""
        learner = self.learner
        units = [
            (path, number)
            for path in range(len(self.paths))
            for number in range(len(learner.trainings(path, logits, labels, held_out_sets)))
        ]
        results = engines.current().map(
            whole_training,
            units,
            shared=(learner, logits, labels, list(held_out_sets)),
            description=fits_of(learner),
            threads_per_job=FIT_THREADS,
        )
        for fitted in results:
            for fit, by_setting in fitted.items():
                self.by_fit[fit] |= by_setting


def fits_of(learner: object) -> str:
    """Return how progress messages name a learner's fits."""
    return f"fits of {type(learner).__name__.removesuffix('Learner').lower()}"


def whole_training(
    learner: PathLearner,
    logits: Any,
    labels: np.ndarray,
    held_out_sets: Sequence[np.ndarray],
    unit: tuple[int, int],
) -> dict[int, dict[int, np.ndarray]]:
    """Return {fit: {setting: probabilities (H, C)}} of one training; `unit` is its path and its index."""
    path, number = unit
    with nullcontext() if learner.thread_safe else torch_threads(FIT_THREADS):
        fits, training = learner.trainings(path, logits, labels, held_out_sets)[number]
        by_fit: dict[int, dict[int, np.ndarray]] = {fit: {} for fit in fits}
        for setting in learner.paths()[path]:
            for fit, values in zip(fits, training.advance(range(len(fits))), strict=True):
                by_fit[fit][setting] = values
    return by_fit


def path_predictions(learner: PathLearner, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Return probabilities float32 (G, H, C) of held-out logits (M, H, C) after training on logits (M, N, C)."""
    return joined_path_predictions(learner, np.concatenate([logits, held_out], axis=1), labels)


def joined_path_predictions(learner: PathLearner, joined: Any, labels: np.ndarray) -> np.ndarray:
    """Return probabilities float32 (G, H, C) of the last H rows after training on the first N.

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
    """Split the settings into consecutive paths of equal length."""
    return [range(first, first + length) for first in range(0, n_settings, length)]


def fits_side_by_side(shapes: Sequence[Shape], most: int) -> list[tuple[Shape, list[int]]]:
    """Group fits of equal shape, given one shape per fit: return (shape, indices of at most `most` fits) per group."""
    fits_of: dict[Shape, list[int]] = {}
    for number, shape in enumerate(shapes):
        fits_of.setdefault(shape, []).append(number)
    return [
        (shape, fits[first : first + most]) for shape, fits in fits_of.items() for first in range(0, len(fits), most)
    ]


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Set torch's number of threads within a block, for threads that are started in it as well."""
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
