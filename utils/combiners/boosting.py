"""Gradient-boosted trees on members' outputs, evaluated after several numbers of rounds.

Chen and Guestrin (2016), XGBoost. `utils.numeric.nested_cv` selects the number of rounds: early stopping on held-out
rows, without a further split. Boosters are saved as XGBoost's JSON, and inference does not need the library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from utils.combiners.fit_demand import FitDemand
from utils.combiners.stacking_features import STEPS, features
from utils.core.errors import UserError
from utils.numeric.nested_cv import evenly_spaced_epochs
from utils.numeric.setting_paths import path_predictions

if TYPE_CHECKING:
    import xgboost

    from utils.combiners.trees import BoosterProbabilities

STOPS = 10
BINS = 32  # per feature: three to four times as fast as 256, with no higher loss
ROW_SHARE = 0.5  # drawn for each tree: stochastic gradient boosting (Friedman 2002)
FEATURE_SHARE = 0.5  # drawn for each tree; members' outputs are correlated
MIN_CHILD_WEIGHT = 4.0  # sum of the Hessian in a leaf, 2 p (1 - p) of each row
NODE_BYTES = 300  # of a node in the text of a booster, and parsed
READ_NUMBERS = 2.5e8  # features of rows that are read per second, on one core
REBUILD = "Build it again: python ensemble_orchestrator.py stack --force"


@dataclass(frozen=True)
class Booster:
    """A fitted booster."""

    text: bytes
    """XGBoost's JSON."""
    classes: int

    @cached_property
    def module(self) -> BoosterProbabilities:
        """Module from features (B, F) to probabilities (B, C), of gathers and comparisons."""
        from utils.combiners.trees import booster_module

        return booster_module(self.text, classes=self.classes, source="booster.json", remedy=REBUILD)

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        from utils.combiners.trees import probabilities

        return probabilities(self.module, features(logits, STEPS))


@dataclass(frozen=True)
class BoosterLearner:
    """One training of `n_estimators` rounds, evaluated after several numbers of rounds."""

    n_estimators: int
    max_depth: int
    learning_rate: float
    seed: int
    thread_safe: ClassVar[bool] = True

    def demand(self, members: int, rows: int, classes: int) -> FitDemand:
        """Return memory and time of a fit: a tree per round and class reads all features; its JSON text is parsed."""
        trees, numbers = self.n_estimators * classes, rows * members * classes
        return FitDemand(12.0 * numbers + trees * 2**self.max_depth * NODE_BYTES, trees * numbers / READ_NUMBERS)

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Return the settings, the fewest rounds first."""
        return [{"features": STEPS, "rounds": stop} for stop in evenly_spaced_epochs(self.n_estimators, STOPS)]

    def paths(self) -> Sequence[Sequence[int]]:
        """Return one path of all settings."""
        return [range(len(self.settings()))]

    def trainings(
        self, path: int, logits: np.ndarray, labels: np.ndarray, held_out_sets: Sequence[np.ndarray]
    ) -> list[tuple[Sequence[int], _Training]]:
        """Return one training per fit; features are computed once for all of them."""
        table = features(logits, STEPS).astype(np.float32)
        stops = [setting["rounds"] for setting in self.settings()]
        options = self._options(logits.shape[2])
        return [
            ([number], _Training(options, table, labels, held_out, stops))
            for number, held_out in enumerate(held_out_sets)
        ]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Return probabilities float32 (G, H, C) of held-out logits (M, H, C) after training on logits (M, N, C)."""
        return path_predictions(self, logits, labels, held_out)

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> Booster:
        """Return the booster of the setting's number of rounds, fitted on logits (M, N, C) and labels (N,)."""
        table = features(logits, STEPS).astype(np.float32)
        held_out = np.zeros(len(labels), dtype=bool)
        training = _Training(self._options(logits.shape[2]), table, labels, held_out, [setting["rounds"]])
        return Booster(bytes(training.train_on().save_raw("json")), logits.shape[2])

    def _options(self, classes: int) -> dict[str, Any]:
        return {
            "objective": "multi:softprob",
            "num_class": classes,
            "max_depth": self.max_depth,
            "eta": self.learning_rate,
            "seed": self.seed,
            "nthread": 1,  # trainings run in parallel instead; the bytes depend on the number of threads
            "max_bin": BINS,
            "subsample": ROW_SHARE,
            "colsample_bytree": FEATURE_SHARE,
            "min_child_weight": MIN_CHILD_WEIGHT,
            "seed_per_iteration": True,  # the state of the generator would depend on other trainings in the thread
            "base_score": 0.5,  # fixed, since releases of the library estimate it differently
            "verbosity": 0,
        }


@dataclass
class _Training:
    """One fit, which advances from one number of rounds to the next."""

    options: Mapping[str, Any]
    table: np.ndarray
    """float32 (N, F)"""
    labels: np.ndarray
    held_out: np.ndarray
    """bool (N,)"""
    stops: Sequence[int]
    done: int = 0
    """Number of stops reached"""
    booster: Any = None
    inside: Any = None
    """Rows of the fit in bins alone: a third of the memory of a `DMatrix`, as all fits of a path are kept"""

    def advance(self, wanted: Sequence[int]) -> list[np.ndarray]:
        booster, stop = self.train_on(), self.stops[self.done - 1]
        predictions = booster.inplace_predict(self.table[self.held_out], iteration_range=(0, stop))
        return [predictions.reshape(np.count_nonzero(self.held_out), -1)]

    def train_on(self) -> xgboost.Booster:
        """Train to the next stop and return the booster."""
        if self.booster is None:
            fitted = ~self.held_out
            rows, labels = self.table[fitted], self.labels[fitted]
            self.inside = _library().QuantileDMatrix(rows, label=labels, nthread=1, max_bin=BINS)
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
