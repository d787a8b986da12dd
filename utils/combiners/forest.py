"""Random forests on members' outputs with leaves shrunk towards their parents, so that no probability is 0.

Breiman (2001), Random Forests; Agarwal et al. (2022), Hierarchical Shrinkage. `utils.numeric.nested_cv` selects the
shrinkage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from utils.combiners.fit_demand import FitDemand
from utils.combiners.stacking_features import STEPS, features

if TYPE_CHECKING:
    from utils.combiners.trees import ForestProbabilities

TREES = 100
SAMPLE = 0.7  # of the rows, which each tree draws with replacement: quicker than all, with as low a log-loss
SHRINKAGES = (1.0, 10.0, 50.0)
SPLIT_NUMBERS = 4e8  # numbers of classes that are compared per second, on one core


@dataclass(frozen=True)
class Forest:
    """A fitted forest."""

    arrays: Mapping[str, np.ndarray]
    """Arrays of `utils.combiners.trees.forest_arrays`."""

    @cached_property
    def module(self) -> ForestProbabilities:
        """Module from features (B, F) to probabilities (B, C), of gathers and comparisons."""
        from utils.combiners.trees import forest_module

        return forest_module(self.arrays)

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        from utils.combiners.trees import probabilities

        return probabilities(self.module, features(logits, STEPS))


@dataclass(frozen=True)
class ForestLearner:
    """A forest with several shrinkages."""

    seed: int
    thread_safe: ClassVar[bool] = True

    def demand(self, members: int, rows: int, classes: int) -> FitDemand:
        """Return memory and time of a fit: a number for each node and class, three times; impurities at each split."""
        drawn = SAMPLE * rows
        numbers = 1.5 * TREES * drawn * classes
        splits = TREES * drawn * np.log2(drawn + 1) * np.sqrt(members * classes)
        return FitDemand(24.0 * numbers, splits * classes / SPLIT_NUMBERS)

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Return the settings: one for each shrinkage, the smoothest last."""
        return [{"features": STEPS, "shrinkage": shrinkage} for shrinkage in SHRINKAGES]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Return probabilities float32 (G, H, C) of held-out logits (M, H, C) after a fit on logits (M, N, C)."""
        from utils.combiners.trees import forest_arrays, forest_module, probabilities

        rows = features(held_out, STEPS)
        forest = self._grow(logits, labels)
        by_setting = []
        for shrinkage in SHRINKAGES:
            arrays = forest_arrays(forest, classes=logits.shape[2], shrinkage=shrinkage)
            by_setting.append(probabilities(forest_module(arrays), rows).astype(np.float32))
        return np.stack(by_setting)

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> Forest:
        """Return the forest under one setting, fitted on logits (M, N, C) and labels (N,)."""
        from utils.combiners.trees import forest_arrays

        forest = self._grow(logits, labels)
        return Forest(forest_arrays(forest, classes=logits.shape[2], shrinkage=setting["shrinkage"]))

    def _grow(self, logits: np.ndarray, labels: np.ndarray) -> Any:
        from sklearn.ensemble import RandomForestClassifier

        drawn = max(1, round(SAMPLE * len(labels)))
        grower = RandomForestClassifier(TREES, max_samples=drawn, random_state=self.seed, n_jobs=1)
        return grower.fit(features(logits, STEPS), labels)
