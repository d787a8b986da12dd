"""The contract of a combiner: members' logits in, class probabilities out, nothing else known."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np

from utils.core.config import Config
from utils.predictions.rows import MemberOutputs

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class MemberFacts:
    """What a recipe may know of M members beyond their outputs, in the order of the arrays."""

    names: tuple[str, ...]
    recorded_accuracy: np.ndarray
    """float64 (M,), a share; NaN where nothing is recorded"""
    latency_ms: np.ndarray
    """float64 (M,), milliseconds for one image; NaN where it was not measured"""
    size_mb: np.ndarray
    """float64 (M,), 10^6 bytes on disk; NaN where there is no file"""


@runtime_checkable
class Combiner(Protocol):
    """Turns the logits of M members into class probabilities.

    Arrays only: files, rows and honesty are the business of whoever calls. Members come in the order of their names,
    classes in the workspace's order. A combiner whose `learns` is false fits nothing, so every row is unseen. One that
    `reads_embeddings` gets `Outputs` wherever others get logits, and its module takes `(logits, embeddings)`, the
    second a list of M tensors float32 (B, D_m). One whose answer has steps (votes, trees, the best k experts) says so
    by `jumps = True`, so that an export is proved on both sides of a step; where it is missing there are none.
    """

    settings: ClassVar[tuple[str, ...]]
    """Places of the configuration that it depends on, such as `runs.score_ensemble.pool`."""
    learns: bool
    reads_embeddings: bool

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """An unfitted one with the settings of the configuration."""

    def fit(self, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> Self:
        """Fit on logits (M, N, C) and labels (N,), which come from networks that did not see the rows.

        `folds` (N,) are the workspace's folds of these rows: whatever is tuned, stopped early, calibrated or blended in
        here is decided by leaving one of them out, so that a copy fitted on all folds but one has read none of its
        labels. Fitting again starts anew.
        """

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities float64 (N, C) whose rows sum to 1."""

    def to_module(self) -> nn.Module:
        """The same map for export: logits float32 (B, M, C) -> probabilities float32 (B, C)."""

    def state(self) -> dict[str, np.ndarray]:
        """Everything fitted, as arrays of numbers."""

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """The combiner whose `state` this is; it answers, and is not fitted again."""

    def used(self, members: int) -> np.ndarray:
        """Which of the members the fitted combiner needs, bool (M,)."""

    def restricted(self, used: np.ndarray) -> Self:
        """The same map on the used members' logits alone."""

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """What a person wants to know of the fit, ready for JSON; `weights` {member: weight} where there are any."""


@runtime_checkable
class SharesFits(Combiner, Protocol):
    """A combiner whose cross-fitted copies and final fit have trainings in common."""

    def fit_crossfitted(self, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
        """Fit as `fit` does; gives the probabilities (N, C) of copies that were fitted without the row's fold."""


def seen_by(combiner: Combiner, outputs: np.ndarray | MemberOutputs) -> Any:
    """What a combiner gets of the members' outputs: all of them, or the logits alone."""
    return outputs.logits if isinstance(outputs, MemberOutputs) and not combiner.reads_embeddings else outputs


def below(state: Mapping[str, np.ndarray], start: str) -> dict[str, np.ndarray]:
    """The arrays of a part, kept among others under names that begin with `start`, by their own names."""
    return {name.removeprefix(start): values for name, values in state.items() if name.startswith(start)}


def fit_crossfitted(recipe: Combiner, logits: Any, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Fit a recipe on logits (M, N, C), labels (N,), folds (N,); gives its cross-fitted probabilities float32 (N, C).

    For a recipe that reads embeddings, `logits` are `Outputs`.
    The rows of one fold are answered by a copy of the whole recipe that was fitted on the other folds. What learns
    nothing answers as it will at inference.
    """
    if isinstance(recipe, SharesFits):
        return recipe.fit_crossfitted(logits, labels, folds).astype(np.float32)
    recipe.fit(logits, labels, folds)
    if not recipe.learns:
        return recipe.predict_proba(logits).astype(np.float32)
    probabilities = np.empty(logits.shape[1:], dtype=np.float32)
    for held_out in np.unique(folds):
        inside, outside = folds == held_out, folds != held_out
        copy = deepcopy(recipe).fit(logits[:, outside], labels[outside], folds[outside])
        probabilities[inside] = copy.predict_proba(logits[:, inside])
    return probabilities
