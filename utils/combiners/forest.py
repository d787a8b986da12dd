"""Random forests on members' outputs, their leaves drawn towards their parents, so that no probability is 0.

Breiman (2001), Random Forests; Agarwal et al. (2022), Hierarchical Shrinkage. How small a leaf may be and how far it is
drawn are what `utils.numeric.nested_cv` chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from utils.combiners.stacking_features import STEPS, features

if TYPE_CHECKING:
    from utils.combiners.trees import ForestProbabilities

TREES = 100
LEAVES = (1, 5)
SHRINKAGES = (1.0, 10.0, 50.0)


@dataclass(frozen=True)
class Forest:
    """A fitted forest."""

    arrays: Mapping[str, np.ndarray]
    """As `utils.combiners.trees.forest_arrays` gives them."""

    @cached_property
    def module(self) -> ForestProbabilities:
        """Features (B, F) -> probabilities (B, C) as gathers and comparisons."""
        from utils.combiners.trees import forest_module

        return forest_module(self.arrays)

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        from utils.combiners.trees import probabilities

        return probabilities(self.module, features(logits, STEPS))


@dataclass(frozen=True)
class ForestLearner:
    """Forests of several sizes of leaf, each under several shrinkages."""

    seed: int
    thread_safe: ClassVar[bool] = True

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Sizes of leaf by shrinkages, the smoothest last."""
        return [
            {"features": STEPS, "min_samples_leaf": leaf, "shrinkage": shrinkage}
            for leaf in LEAVES
            for shrinkage in SHRINKAGES
        ]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Probabilities float32 (G, H, C) of held-out logits (M, H, C) after fits on logits (M, N, C)."""
        from utils.combiners.trees import forest_arrays, forest_module, probabilities

        rows = features(held_out, STEPS)
        answers = []
        for leaf in LEAVES:
            grown = self._grow(logits, labels, leaf)
            for shrinkage in SHRINKAGES:
                arrays = forest_arrays(grown, classes=logits.shape[2], shrinkage=shrinkage)
                answers.append(probabilities(forest_module(arrays), rows).astype(np.float32))
        return np.stack(answers)

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> Forest:
        """The forest under one setting."""
        from utils.combiners.trees import forest_arrays

        grown = self._grow(logits, labels, setting["min_samples_leaf"])
        return Forest(forest_arrays(grown, classes=logits.shape[2], shrinkage=setting["shrinkage"]))

    def _grow(self, logits: np.ndarray, labels: np.ndarray, leaf: int) -> Any:
        from sklearn.ensemble import RandomForestClassifier

        grower = RandomForestClassifier(TREES, min_samples_leaf=leaf, random_state=self.seed, n_jobs=1)
        return grower.fit(features(logits, STEPS), labels)
