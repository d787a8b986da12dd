"""The contract of a combiner: members' logits in, class probabilities out, nothing else known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from torch import nn


@runtime_checkable
class Combiner(Protocol):
    """Turns the logits of M members into class probabilities.

    Arrays only: names, files, rows and honesty are the business of whoever calls. Members come in the order of their
    names, classes in the workspace's order. A combiner whose `learns` is false fits nothing, so every row is unseen.
    """

    learns: ClassVar[bool]

    def fit(self, logits: np.ndarray, labels: np.ndarray) -> Self:
        """Fit on logits (M, N, C) and labels (N,), which come from networks that did not see the rows."""

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities float64 (N, C) whose rows sum to 1."""

    def to_module(self) -> nn.Module:
        """The same map for export: logits float32 (B, M, C) -> probabilities float32 (B, C)."""

    def state(self) -> dict[str, np.ndarray]:
        """Everything fitted, as arrays."""

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """The combiner whose `state` this is."""
