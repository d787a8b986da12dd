"""Stacking: a learner on the members' out-of-fold outputs, tuned by nested cross-validation, mixed with their mean.

Wolpert (1992), Stacked Generalization. Features, strength, number of epochs, temperature and the weight of the members'
mean are selected on held-out folds of the rows of `fit`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np

from utils.combiners.fit_demand import EstimatesDemand, FitDemand
from utils.combiners.logistic import Coefficients, LogisticLearner
from utils.combiners.perceptron import Layers, PerceptronLearner
from utils.combiners.protocol import Combiner, Inputs, MemberFacts, NestedPredictions, sub_state, unsaved
from utils.combiners.stacking_features import KINDS, STEPS
from utils.core.config import Config
from utils.core.worker_processes import n_side_by_side
from utils.numeric import nested_cv, pools, temperature
from utils.numeric.metrics import clipped_log, log_loss, softmax
from utils.numeric.setting_paths import FIT_THREADS
from utils.numeric.setting_search import GridLearner
from utils.predictions.rows import MemberOutputs

if TYPE_CHECKING:
    from torch import nn


class Model(Protocol):
    """A fitted learner."""

    def predict_proba(self, logits: Inputs, /) -> np.ndarray:
        """Return probabilities (N, C) for logits (M, N, C)."""


class Learner(GridLearner, Protocol):
    """A learner that a stacker trains."""

    def fit(self, logits: Inputs, labels: np.ndarray, setting: Mapping[str, Any], /) -> Model:
        """Fit one setting on logits (M, N, C) and labels (N,)."""


@dataclass(frozen=True)
class Calibration:
    """Post-processing of a learner's probabilities: a temperature, then a mixture with the members' calibrated mean."""

    temperature: float = 1.0
    weight: float = 1.0
    """Weight of the learner's probabilities; that of the members' mean is 1 - weight."""
    mean_temperature: float = 1.0
    """Temperature of the members' mean; 1 in ensembles of earlier versions."""

    def apply(self, probabilities: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Return probabilities (N, C) from the learner's probabilities (N, C) and the members' mean (N, C)."""
        calibrated = mean if self.mean_temperature == 1 else softmax(clipped_log(mean) / self.mean_temperature)
        return self.weight * softmax(clipped_log(probabilities) / self.temperature) + (1 - self.weight) * calibrated


def calibrate(
    probabilities: np.ndarray,
    mean: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    *,
    use_temperature: bool,
    fallback: bool,
) -> Calibration:
    """Fit temperatures and weight to out-of-sample probabilities (N, C), labels (N,) and folds (N,).

    The weight is that of least log-loss in the mixture with the members' mean (N, C), which has a separate temperature;
    without `fallback` it is 1.
    """
    sources = np.stack([probabilities, mean]) if fallback else probabilities[None]
    divisors = [1.0] * len(sources)
    if use_temperature:
        choices = temperature.select_temperatures(clipped_log(sources), labels, folds)
        divisors = [choice.temperature for choice in choices]
    if not fallback:
        return Calibration(divisors[0])
    divisor, mean_divisor = divisors
    parts = [Calibration(divisor, weight, mean_divisor).apply(probabilities, mean) for weight in (1.0, 0.0)]
    both = np.stack(parts)[:, np.arange(len(labels)), labels]
    return Calibration(divisor, float(pools.fit_linear(both).weights[0]), mean_divisor)


@dataclass
class Stacker(Combiner):
    """Base class of stackers; a subclass defines its learner and how its model becomes arrays and a torch module."""

    settings: ClassVar[tuple[str, ...]] = (
        *("runs.stacking.fallback", "runs.stacking.fit_rows", "runs.stacking.inference_members"),
        "runs.score_ensemble.temperature",
    )
    learns: ClassVar[bool] = True

    learner: Learner | None = unsaved()
    use_temperature: bool = unsaved(True)
    fallback: bool = unsaved(True)
    n_jobs: int = unsaved(1)
    model: Model | None = unsaved()
    calibration: Calibration = unsaved(factory=Calibration)
    facts: dict[str, Any] = unsaved(factory=dict)
    """Facts about the fit, for the report."""

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """Return an unfitted stacker with the settings of `runs.stacking` and as many jobs as there are cores."""
        from joblib import cpu_count

        return cls(
            learner=cls.make_learner(config),
            use_temperature=config.runs.score_ensemble.temperature != "off",
            fallback=config.runs.stacking.fallback,
            n_jobs=cpu_count(),
        )

    @classmethod
    @abstractmethod
    def make_learner(cls, config: Config) -> Learner:
        """Return the learner with the settings of the configuration."""

    def _fit(self, logits: Inputs, labels: np.ndarray, folds: np.ndarray) -> None:
        """Select the setting and fit on logits (M, N, C), labels (N,), folds (N,)."""
        self._fit_nested(logits, labels, folds)

    def _fit_nested(self, logits: Inputs, labels: np.ndarray, folds: np.ndarray) -> NestedPredictions:
        """Fit, and return the predictions of copies without one fold and without two folds, from the same fits.

        The final fit and each copy select setting, temperature and weight of the members' mean by the rows of
        `nested_cv.cross_validate`. For a copy without two folds, they are selected by fits without the first and a
        third fold, which have read labels of the second; only rows of neither fold count in the selection. With two
        folds there are no such copies.
        """
        assert self.learner is not None, "a stacker that was read from a file is not fitted again"
        mean = mean_probabilities(logits)
        n_jobs = min(self.n_jobs, self.fit_demand(*logits.shape).max_at_a_time(n_side_by_side()))
        result = nested_cv.cross_validate(self.learner, logits, labels, folds, n_jobs=n_jobs)
        crossfit = np.full(result.nested_crossfit.shape, np.nan)
        for fold in np.unique(folds):
            inside = folds == fold
            calibration = self._calibrate_by(result.inner_held_out.get(fold), mean, labels)
            if not np.isnan(result.nested_crossfit[inside]).any():
                crossfit[inside] = calibration.apply(result.nested_crossfit[inside], mean[inside])
        inner = {
            fold: self._inner_predictions(result, fold, crossfit, mean, labels, folds) for fold in result.inner_nested
        }
        setting = self.learner.settings()[result.setting]
        self.model = self.learner.fit(logits, labels, setting)
        self.calibration = self._calibrate_by(result.held_out, mean, labels)
        self.facts = {
            "setting": dict(setting),
            "settings_tried": result.n_tried,
            "cross_validated_log_loss": None if result.held_out is None else float(np.nanmin(result.setting_losses)),
            "selection_score": log_loss(self._mixed(self._predict(logits)), labels),
            "threads": None if self.learner.thread_safe else FIT_THREADS,  # of a torch training
        }
        return NestedPredictions(crossfit, inner)

    def fit_demand(self, members: int, rows: int, classes: int) -> FitDemand:
        """Return what one fit on logits (M, N, C) of this size takes; nothing if the learner gives no estimate."""
        if isinstance(self.learner, EstimatesDemand):
            return self.learner.demand(members, rows, classes)
        return FitDemand(0.0, 0.0)

    def _calibrate_by(self, held_out: nested_cv.HeldOut | None, mean: np.ndarray, labels: np.ndarray) -> Calibration:
        """Calibrate a fit by the predictions that selected its setting; mean (N, C) and labels (N,) cover all rows."""
        if held_out is None:
            return Calibration()
        rows = held_out.rows
        return self._calibrate(held_out.probabilities, mean[rows], labels[rows], held_out.folds)

    def _inner_predictions(
        self,
        result: nested_cv.NestedResult,
        fold: int,
        crossfit: np.ndarray,
        mean: np.ndarray,
        labels: np.ndarray,
        folds: np.ndarray,
    ) -> np.ndarray:
        """Return the probabilities (N, C) of copies without `fold` and the row's fold; `crossfit` on rows of `fold`.

        They are NaN for rows of folds that have no part in the selection of the copy without `fold`.
        """
        rows = result.inner_held_out[fold].rows
        predictions = np.where((folds == fold)[:, None], crossfit, np.nan)
        for other, probabilities in result.inner_nested[fold].items():
            held_out = folds[rows] == other
            others = rows[~held_out]
            inner = nested_cv.inner_folds(labels, folds, np.isin(np.arange(len(folds)), others))
            calibration = self._calibrate(probabilities[~held_out], mean[others], labels[others], inner)
            predictions[rows[held_out]] = calibration.apply(probabilities[held_out], mean[rows[held_out]])
        return predictions

    def _predict_proba(self, logits: Inputs) -> np.ndarray:
        """Return probabilities (N, C) for logits (M, N, C)."""
        return self._predict(logits)

    def _predict(self, inputs: Inputs) -> np.ndarray:
        """Return probabilities (N, C) for the learner's inputs of N rows."""
        assert self.model is not None, "not fitted"
        return self.calibration.apply(self.model.predict_proba(inputs), mean_probabilities(inputs))

    def _to_module(self) -> nn.Module:
        """Return the torch module: logits (B, M, C) -> probabilities (B, C)."""
        from utils.combiners.stacking_heads import TemperedBlend

        return TemperedBlend(self._learner_module(), *astuple(self.calibration))

    def fitted_arrays(self) -> dict[str, np.ndarray]:
        """Return the model's arrays, temperatures (1,) and the weight (1,), which is named `share`."""
        names = ("temperature", "share", "mean_temperature")
        calibration = zip(names, astuple(self.calibration), strict=True)
        return {name: np.array([value]) for name, value in calibration} | self._arrays()

    def set_fitted_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set the model, temperatures and weight."""
        saved = [arrays.get(name, np.ones(1)) for name in ("temperature", "share", "mean_temperature")]
        self.calibration = Calibration(*(float(value[0]) for value in saved))
        self.model = self._model(arrays)

    def restricted(self, used: np.ndarray) -> Self:
        """Return itself, since it uses all members."""
        return self

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return the selected setting, its losses, temperature and weight; members have no weights."""
        names = ("temperature", "share_of_stacker", "mean_temperature")
        calibration = dict(zip(names, astuple(self.calibration), strict=True))
        return {**self.facts, **calibration, "weights": None}

    def _calibrate(
        self, probabilities: np.ndarray, mean: np.ndarray, labels: np.ndarray, folds: np.ndarray
    ) -> Calibration:
        use_temperature, fallback = self.use_temperature, self.fallback
        return calibrate(probabilities, mean, labels, folds, use_temperature=use_temperature, fallback=fallback)

    @abstractmethod
    def _learner_module(self) -> nn.Module:
        """Return the torch module of the model: logits (B, M, C) -> probabilities (B, C)."""

    @abstractmethod
    def _arrays(self) -> dict[str, np.ndarray]:
        """Return the model as numeric arrays; the name of a text, which is saved as bytes, ends in `.json`."""

    @classmethod
    @abstractmethod
    def _model(cls, state: Mapping[str, np.ndarray]) -> Model:
        """Return the model whose `_arrays` are in `state`."""


class StackingLogistic(Stacker):
    """Multinomial logistic regression, plain or shrunk towards the log-linear pool, selected on held-out rows."""

    @classmethod
    def make_learner(cls, config: Config) -> Learner:
        return LogisticLearner(KINDS)

    def _learner_module(self) -> nn.Module:
        from utils.combiners.stacking_heads import LogisticOnFeatures

        assert isinstance(self.model, Coefficients)
        return LogisticOnFeatures(self.model.kind, self.model.weights, self.model.matrix, self.model.bias)

    def _arrays(self) -> dict[str, np.ndarray]:
        assert isinstance(self.model, Coefficients)
        kind = np.array([KINDS.index(self.model.kind)])
        return {"kind": kind, "weights": self.model.weights, "matrix": self.model.matrix, "bias": self.model.bias}

    @classmethod
    def _model(cls, state: Mapping[str, np.ndarray]) -> Model:
        return Coefficients(KINDS[int(state["kind"][0])], state["weights"], state["matrix"], state["bias"])


class StackingPerceptron(Stacker):
    """A small neural network on the members' outputs."""

    settings = (*Stacker.settings, "runs.stacking.mlp_config")

    @classmethod
    def make_learner(cls, config: Config) -> Learner:
        shape = config.runs.stacking.mlp_config
        kinds = ("log_probabilities", "probabilities")
        return PerceptronLearner(kinds, shape.hidden_dims, shape.epochs, shape.lr, shape.dropout, config.seed)

    def _learner_module(self) -> nn.Module:
        from utils.combiners.stacking_heads import PerceptronOnFeatures

        assert isinstance(self.model, Layers)
        return PerceptronOnFeatures(self.model.kind, self.model.matrices, self.model.biases)

    def _arrays(self) -> dict[str, np.ndarray]:
        assert isinstance(self.model, Layers)
        arrays = {"kind": np.array([KINDS.index(self.model.kind)])}
        for index, (matrix, bias) in enumerate(zip(self.model.matrices, self.model.biases, strict=True)):
            arrays |= {f"matrix{index}": matrix, f"bias{index}": bias}
        return arrays

    @classmethod
    def _model(cls, state: Mapping[str, np.ndarray]) -> Model:
        layers = range(sum(name.startswith("matrix") for name in state))
        matrices, biases = (tuple(state[f"{name}{index}"] for index in layers) for name in ("matrix", "bias"))
        return Layers(KINDS[int(state["kind"][0])], matrices, biases)


class StackingBooster(Stacker):
    """Gradient-boosted trees on the members' outputs."""

    is_discontinuous = True

    settings = (*Stacker.settings, "runs.stacking.xgb_config")

    @classmethod
    def make_learner(cls, config: Config) -> Learner:
        from utils.combiners.boosting import BoosterLearner

        shape = config.runs.stacking.xgb_config
        return BoosterLearner(shape.n_estimators, shape.max_depth, shape.learning_rate, config.seed)

    def _learner_module(self) -> nn.Module:
        from utils.combiners.boosting import Booster
        from utils.combiners.stacking_heads import OnFeatures

        assert isinstance(self.model, Booster)
        return OnFeatures(STEPS, self.model.module)

    def _arrays(self) -> dict[str, np.ndarray]:
        from utils.combiners.boosting import Booster

        assert isinstance(self.model, Booster)
        text = np.frombuffer(self.model.text, dtype=np.uint8)
        return {"classes": np.array([self.model.classes]), "booster.json": text}

    @classmethod
    def _model(cls, state: Mapping[str, np.ndarray]) -> Model:
        from utils.combiners.boosting import Booster

        return Booster(state["booster.json"].tobytes(), int(state["classes"][0]))


class StackingForest(Stacker):
    """A random forest on the members' outputs."""

    is_discontinuous = True

    @classmethod
    def make_learner(cls, config: Config) -> Learner:
        from utils.combiners.forest import ForestLearner

        return ForestLearner(config.seed)

    def _learner_module(self) -> nn.Module:
        from utils.combiners.forest import Forest
        from utils.combiners.stacking_heads import OnFeatures

        assert isinstance(self.model, Forest)
        return OnFeatures(STEPS, self.model.module)

    def _arrays(self) -> dict[str, np.ndarray]:
        from utils.combiners.forest import Forest

        assert isinstance(self.model, Forest)
        return {f"forest_{name}": values for name, values in self.model.arrays.items()}

    @classmethod
    def _model(cls, state: Mapping[str, np.ndarray]) -> Model:
        from utils.combiners.forest import Forest

        return Forest(sub_state(state, "forest_"))


def mean_probabilities(outputs: np.ndarray | MemberOutputs) -> np.ndarray:
    """Return the mean (N, C) of the members' probabilities, from logits (M, N, C) or `MemberOutputs`."""
    return softmax(outputs.logits if isinstance(outputs, MemberOutputs) else outputs).mean(axis=0)


COMBINERS: dict[str, type[Stacker]] = {
    "stacking_lr": StackingLogistic,
    "stacking_xgb": StackingBooster,
    "stacking_rf": StackingForest,
    "stacking_mlp": StackingPerceptron,
}
