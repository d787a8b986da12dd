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
from utils.numeric.setting_paths import path_predictions

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

    def paths(self) -> Sequence[Sequence[int]]:
        """One path."""
        return [range(len(self.settings()))]

    def trainings(
        self, path: int, logits: np.ndarray, labels: np.ndarray, held_out_sets: Sequence[np.ndarray]
    ) -> list[tuple[Sequence[int], _Training]]:
        """A training per fit; features are computed once for all of them."""
        table = features(logits, STEPS).astype(np.float32)
        stops = [setting["rounds"] for setting in self.settings()]
        options = self._options(logits.shape[2])
        return [
            ([number], _Training(options, table, labels, held_out, stops))
            for number, held_out in enumerate(held_out_sets)
        ]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Probabilities float32 (G, H, C) of held-out logits (M, H, C) after a training on logits (M, N, C)."""
        return path_predictions(self, logits, labels, held_out)

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> Booster:
        """The booster of so many rounds."""
        table = features(logits, STEPS).astype(np.float32)
        everything = np.zeros(len(labels), dtype=bool)
        training = _Training(self._options(logits.shape[2]), table, labels, everything, [setting["rounds"]])
        return Booster(bytes(training.train_on().save_raw("json")), logits.shape[2])

    def _options(self, classes: int) -> dict[str, Any]:
        return {
            "objective": "multi:softprob",
            "num_class": classes,
            "max_depth": self.max_depth,
            "eta": self.learning_rate,
            "seed": self.seed,
            "nthread": 1,  # trainings run side by side instead; the bytes depend on the number of threads
            "max_bin": BINS,
            "base_score": 0.5,  # releases of the library estimate it differently
            "verbosity": 0,
        }


@dataclass
class _Training:
    """One fit, from one number of rounds to the next."""

    options: Mapping[str, Any]
    table: np.ndarray
    """float32 (N, F)"""
    labels: np.ndarray
    held_out: np.ndarray
    """bool (N,)"""
    stops: Sequence[int]
    done: int = 0
    """Stops that were reached"""
    booster: Any = None
    inside: Any = None
    """The rows of the fit, in the library's form"""
    outside: Any = None

    def advance(self, wanted: Sequence[int]) -> list[np.ndarray]:
        booster, stop = self.train_on(), self.stops[self.done - 1]
        if self.outside is None:
            self.outside = _library().DMatrix(self.table[self.held_out], nthread=1)
        answers = booster.predict(self.outside, iteration_range=(0, stop))
        return [answers.reshape(np.count_nonzero(self.held_out), -1)]

    def train_on(self) -> xgboost.Booster:
        """Go on to the next stop."""
        if self.booster is None:
            fitted = ~self.held_out
            self.inside = _library().DMatrix(self.table[fitted], label=self.labels[fitted], nthread=1)
            self.booster = _library().Booster(dict(self.options), [self.inside])
        for number in range(self.stops[self.done - 1] if self.done else 0, self.stops[self.done]):
            self.booster.update(self.inside, number)
        self.done += 1
        return self.booster


def _library() -> Any:
    try:
        import xgboost
    except ImportError as error:
        raise UserError(
            f"xgboost cannot be imported ({error}). Install it: pip install -r requirements.txt; or leave xgb out of "
            "runs.stacking.meta_learners"
        ) from error
    return xgboost
