"""Nested cross-validation with every fit made once: which setting of a learner to use, and what that choice is worth.

A copy for held-out fold k chooses its setting by leaving out a second fold j of the others. What is fitted without k
and j serves the copy of k and the copy of j alike, and what is fitted without k answers k and helps to choose the
setting of the final fit: K (K + 1) / 2 fits in place of K * K + K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import numpy as np

from utils.core import engines
from utils.numeric.metrics import log_loss_per_row


class Learner(Protocol):
    """Something that is fitted on members' logits under one of G settings."""

    threads: bool
    """Whether fits may run side by side in threads and still give the same bytes; in processes they always do."""

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """The G settings, ready for JSON; of equally good ones the first is taken."""

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Fit on logits (M, N, C) under every setting; probabilities float32 (G, H, C) of held-out logits (M, H, C)."""


@dataclass(frozen=True)
class Nested:
    """The outcome; rows in the order in which they were given."""

    setting: int
    """The setting of the final fit, chosen on all rows."""
    losses: np.ndarray
    """float64 (G,): cross-validated log-loss of each setting in nats; NaN where there is one fold only"""
    answers: np.ndarray
    """float32 (N, C): of copies without the row's fold, under the final setting"""
    unseen: np.ndarray
    """float32 (N, C): of copies without the row's fold, under the setting that each chose without it"""
    inner: dict[int, tuple[np.ndarray, np.ndarray]]
    """{fold: (places of the rows of the other folds, their probabilities)} without a label of this fold or their own"""


def cross_validate(
    learner: Learner, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray, *, jobs: int = 1
) -> Nested:
    """Nested cross-validation over `folds` (N,) of logits (M, N, C), labels (N,); `jobs` fits run side by side.

    With two folds a copy has nothing left to choose by and takes the first setting; with one fold so does the final
    fit.
    """
    names = np.unique(folds).tolist()
    count, classes = len(learner.settings()), logits.shape[2]
    pairs = list(combinations(names, 2)) if len(names) > 2 else []
    without = [(name,) for name in names] + pairs if len(names) > 1 else []
    found = dict(zip(without, _all_fits(learner, logits, labels, folds, without, jobs), strict=True))

    def answers_to(fold: int, other: int | None = None) -> np.ndarray:
        """(G, n, C) for the rows of `fold`, fitted without it and without `other`."""
        held_out = (fold,) if other is None else tuple(sorted((fold, other)))
        rows = folds[np.isin(folds, held_out)]
        return found[held_out][:, rows == fold]

    shape = (len(labels), classes)
    if not found:
        empty = np.full(shape, np.nan, dtype=np.float32)
        return Nested(0, np.full(count, np.nan), empty, empty, {})
    outer = np.empty((count, *shape), dtype=np.float32)
    for name in names:
        outer[:, folds == name] = answers_to(name)
    losses = _losses(outer, labels)
    setting = int(losses.argmin())
    unseen, inner = np.empty(shape, dtype=np.float32), {}
    for name in names:
        chosen = 0
        others = [other for other in names if other != name] if pairs else []
        if others:
            places = np.flatnonzero(folds != name)
            without_name = np.empty((count, len(places), classes), dtype=np.float32)
            for other in others:
                without_name[:, folds[places] == other] = answers_to(other, name)
            chosen = int(_losses(without_name, labels[places]).argmin())
            inner[name] = (places, without_name[chosen])
        unseen[folds == name] = answers_to(name)[chosen]
    return Nested(setting, losses, outer[setting], unseen, inner)


def spread_stops(epochs: int, count: int) -> list[int]:
    """`count` epochs, fewer where there are not as many, evenly spread up to the last."""
    return sorted({max(1, round(epochs * (place + 1) / count)) for place in range(count)})


def _all_fits(
    learner: Learner,
    logits: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    without: Sequence[tuple[int, ...]],
    jobs: int,
) -> list[np.ndarray]:
    # One thread per fit: the same sums in the same order, whatever the number of cores.
    fits = engines.current().each(
        _fit,
        without,
        shared=(learner, logits, labels, folds),
        what=f"fits of {type(learner).__name__.removesuffix('Learner').lower()}",
        **{"side_by_side" if learner.threads else "apart": jobs},
        threads=1,
    )
    return list(fits)


def _fit(
    learner: Learner, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray, held_out: tuple[int, ...]
) -> np.ndarray:
    """(G, H, C) for the rows of the folds that are held out, fitted on the others."""
    out = np.isin(folds, held_out)
    return learner.predictions(logits[:, ~out], labels[~out], logits[:, out])


def _losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.array([log_loss_per_row(values, labels).mean() for values in probabilities])
