"""Simulated workspaces: labels, groups and logits of models whose true scores are known.

A model sees one noisy number per class of a row: `signal` for the true class and 0 for the others, plus Gaussian noise
of variance 1. Its logits are the exact posterior, so that its probabilities are calibrated, unless it was trained with
label smoothing. Most of the noise is shared by the models, as images are hard for all networks; within a group, most of
it is shared by the rows. Splits are stratified: every class has a fixed number of groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

SHARED_BY_MODELS = 0.6
"""Fraction of the variance of the noise that all models share."""
SHARED_BY_GROUP = 0.7
"""Fraction of the variance of the noise that all rows of a group share."""
RARE_SHARE = 0.015
"""Fraction of the rows that are of each rare class."""
POPULATION = 200_000
"""Rows of which true scores are computed."""


@dataclass(frozen=True)
class SimulatedWorkspace:
    """What rows of a workspace look like; every split of it has as many rows."""

    title: str
    rows: int
    classes: int
    signal: float
    """Mean of the number that a model sees for the true class, in standard deviations of the noise"""
    group: int = 1
    """Rows of each group"""
    rare: int = 0
    """Number of rare classes, the last ones"""
    smoothing: float = 0.0
    """Label smoothing of the models' training"""

    def class_counts(self) -> np.ndarray:
        """Number of groups of each class, int64 (C,); at least 1."""
        groups = self.rows // self.group
        shares = np.full(self.classes, (1 - self.rare * RARE_SHARE) / (self.classes - self.rare))
        shares[self.classes - self.rare :] = RARE_SHARE
        counts = np.maximum(1, np.floor(shares * groups).astype(np.int64))
        counts[: groups - counts.sum()] += 1
        while counts.sum() != groups:
            counts[counts.argmax()] += np.sign(groups - counts.sum())
        return counts

    def population(self) -> SimulatedWorkspace:
        """The same with many independent rows, whose classes have nearly the same shares."""
        return replace(self, rows=POPULATION, group=1)


@dataclass(frozen=True)
class Draw:
    """One sample of K models' answers."""

    labels: np.ndarray
    """int64 (N,)"""
    groups: np.ndarray | None
    """int64 (N,); None where every row is a group of its own"""
    logits: np.ndarray
    """float64 (K, N, C)"""


def draw(
    workspace: SimulatedWorkspace,
    random: np.random.Generator,
    models: int,
    *,
    signals: Sequence[float] | None = None,
    shares: np.ndarray | None = None,
) -> Draw:
    """Draw rows and the answers of models; `signals` (K,) replace the workspace's.

    `shares` (C,) are the numbers of groups per class in proportion to which rows are drawn, those of the workspace
    unless given.
    """
    counts = workspace.class_counts()
    if shares is not None:
        counts = np.maximum(1, np.round(shares / shares.sum() * (workspace.rows // workspace.group)).astype(np.int64))
    class_of_group = random.permutation(np.repeat(np.arange(workspace.classes), counts))
    groups = np.repeat(np.arange(len(class_of_group)), workspace.group)
    labels = class_of_group[groups]
    by_group = SHARED_BY_GROUP if workspace.group > 1 else 0.0
    noise = np.sqrt(1 - by_group) * _noise(random, models, (len(labels), workspace.classes))
    if by_group:
        noise += np.sqrt(by_group) * _noise(random, models, (len(class_of_group), workspace.classes))[:, groups]
    strengths = np.asarray([workspace.signal] * models if signals is None else signals)
    logits = strengths[:, None, None] * noise + np.log(counts / counts.sum())
    logits[:, np.arange(len(labels)), labels] += (strengths**2)[:, None]
    if workspace.smoothing:
        highest = logits.max(axis=2, keepdims=True)
        probabilities = np.exp(logits - highest)
        probabilities /= probabilities.sum(axis=2, keepdims=True)
        logits = np.log((1 - workspace.smoothing) * probabilities + workspace.smoothing / workspace.classes)
    return Draw(labels, groups if workspace.group > 1 else None, logits)


def draw_population(workspace: SimulatedWorkspace, random: np.random.Generator, *, signal: float | None = None) -> Draw:
    """Many independent rows of one model, with the workspace's exact shares of classes."""
    signals = None if signal is None else [signal]
    return draw(workspace.population(), random, 1, signals=signals, shares=workspace.class_counts())


def _noise(random: np.random.Generator, models: int, shape: tuple[int, int]) -> np.ndarray:
    """Noise (K, N, C) of variance 1, correlated between the models."""
    shared = random.standard_normal(shape)
    apart = random.standard_normal((models, *shape))
    noise: np.ndarray = np.sqrt(SHARED_BY_MODELS) * shared + np.sqrt(1 - SHARED_BY_MODELS) * apart
    return noise


WORKSPACES = {
    "A": SimulatedWorkspace("60 rows, 2 classes", 60, 2, 1.6),
    "B": SimulatedWorkspace("60 rows, 8 classes", 60, 8, 2.6),
    "C": SimulatedWorkspace("200 rows, 6 classes, 2 of them rare", 200, 6, 2.6, rare=2),
    "D": SimulatedWorkspace("360 rows, 10 classes, 99% accuracy", 360, 10, 4.7),
    "E": SimulatedWorkspace("400 rows in 40 groups, 3 classes", 400, 3, 2.0, group=10),
    "F": SimulatedWorkspace("96 rows in 6 groups, 2 classes", 96, 2, 1.6, group=16),
    "G": SimulatedWorkspace("600 rows, 20 classes, label smoothing 0.1", 600, 20, 3.0, smoothing=0.1),
    "H": SimulatedWorkspace(
        "2,000 rows in 400 groups, 8 classes, 2 of them rare, label smoothing 0.1",
        *(2000, 8, 2.6),
        group=5,
        rare=2,
        smoothing=0.1,
    ),
    "I": SimulatedWorkspace("2,000 rows, 10 classes, 3 of them rare", 2000, 10, 2.7, rare=3),
}
"""By the letter that heads their column."""
