"""Gradient-boosted trees on members' outputs: one training per kind of features, answered after several rounds.

Chen and Guestrin (2016), XGBoost. `utils.numeric.nested_cv` selects the number of rounds: early stopping on
rows that are held out, without a further split. Boosters are saved as XGBoost's JSON and answer without the library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from utils.combiners.stacking_features import STEPS, features
from utils.core.errors import UserError
from utils.numeric.nested_cv import evenly_spaced_epochs

if TYPE_CHECKING:
    import xgboost

    from utils.combiners.trees import BoosterProbabilities

STOPS = 10
BINS = 64  # of a feature's values: two to three times as fast as 256, and no worse
REBUILD = "Build it again: python ensemble_orchestrator.py stack --force"


@dataclass(frozen=True)
class Booster:
    """A fitted booster."""

    text: bytes
    """XGBoost's JSON."""
    classes: int

    @cached_property
    def module(self) -> BoosterProbabilities:
        """Features (B, F) -> probabilities (B, C) as gathers and comparisons."""
        from utils.combiners.trees import booster_module

        return booster_module(self.text, classes=self.classes, source="booster.json", remedy=REBUILD)

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        from utils.combiners.trees import probabilities

        return probabilities(self.module, features(logits, STEPS))


@dataclass(frozen=True)
class BoosterLearner:
    """One training of `n_estimators` rounds, answered after each of several."""

    n_estimators: int
    max_depth: int
    learning_rate: float
    seed: int
    thread_safe: ClassVar[bool] = True

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """The fewest rounds first."""
        return [{"features": STEPS, "rounds": stop} for stop in evenly_spaced_epochs(self.n_estimators, STOPS)]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Probabilities float32 (G, H, C) of held-out logits (M, H, C) after a training on logits (M, N, C)."""
        stops = [setting["rounds"] for setting in self.settings()]
        booster = self._train(logits, labels, max(stops))
        rows = _library().DMatrix(features(held_out, STEPS), nthread=1)
        shape = held_out.shape[1:]
        return np.stack([booster.predict(rows, iteration_range=(0, stop)).reshape(shape) for stop in stops])

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> Booster:
        """The booster of so many rounds."""
        booster = self._train(logits, labels, setting["rounds"])
        return Booster(bytes(booster.save_raw("json")), logits.shape[2])

    def _train(self, logits: np.ndarray, labels: np.ndarray, rounds: int) -> xgboost.Booster:
        options = {
            "objective": "multi:softprob",
            "num_class": logits.shape[2],
            "max_depth": self.max_depth,
            "eta": self.learning_rate,
            "seed": self.seed,
            "nthread": 1,  # trainings run side by side instead; the bytes depend on the number of threads
            "max_bin": BINS,
            "base_score": 0.5,  # releases of the library estimate it differently
            "verbosity": 0,
        }
        library = _library()
        rows = library.DMatrix(features(logits, STEPS), label=labels, nthread=1)
        return library.train(options, rows, num_boost_round=rounds)


def _library() -> Any:
    try:
        import xgboost
    except ImportError as error:
        raise UserError(
            f"xgboost cannot be imported ({error}). Install it: pip install -r requirements.txt; or leave xgb out of "
            "runs.stacking.meta_learners"
        ) from error
    return xgboost
