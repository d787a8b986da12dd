"""Stacking: a learner on the members' out-of-fold outputs, its settings chosen in nested folds, held to the plain mean.

Wolpert (1992), Stacked Generalization. Whatever is chosen (features, strength, length of a training, temperature, share
of the plain mean) is chosen by rows that the fit did not see, all within the rows that `fit` is given.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np

from utils.combiners.logistic import Coefficients, LogisticLearner
from utils.combiners.perceptron import Layers, PerceptronLearner
from utils.combiners.protocol import Combiner, Inputs, MemberFacts, unsaved
from utils.combiners.stacking_features import KINDS, STEPS
from utils.core.config import Config
from utils.numeric import nested_cv, pools, temperature
from utils.numeric.metrics import SMALLEST_PROBABILITY, log_loss, softmax
from utils.predictions.rows import MemberOutputs

if TYPE_CHECKING:
    from torch import nn


class Model(Protocol):
    """A fitted learner."""

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""


class Learner(nested_cv.GridLearner, Protocol):
    """What a stacker trains."""

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> Model:
        """The model under one setting, on logits (M, N, C) and labels (N,)."""


@dataclass(frozen=True)
class Calibration:
    """What is done to a learner's probabilities: a temperature, then a mixture with the members' plain mean."""

    temperature: float = 1.0
    weight: float = 1.0
    """Weight of the learner's probabilities; the members' mean has the rest."""

    def apply(self, probabilities: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Learner's probabilities (N, C) and the members' mean (N, C) -> probabilities (N, C)."""
        return self.weight * softmax(_logs(probabilities) / self.temperature) + (1 - self.weight) * mean


def calibrate(
    probabilities: np.ndarray,
    mean: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    *,
    use_temperature: bool,
    fallback: bool,
) -> Calibration:
    """Temperature and share for probabilities (N, C) of copies that did not see the rows.

    The share is the one of least log-loss beside the plain mean (N, C); without `fallback` it is 1.
    """
    divisor = (
        temperature.select_temperature(_logs(probabilities), labels, folds).temperature if use_temperature else 1.0
    )
    if not fallback:
        return Calibration(divisor)
    rows = np.arange(len(labels))
    both = np.stack([Calibration(divisor).apply(probabilities, mean)[rows, labels], mean[rows, labels]])
    return Calibration(divisor, float(pools.fit_linear(np.maximum(both, SMALLEST_PROBABILITY)).weights[0]))


@dataclass
class Stacker(Combiner):
    """What the stackers share; a subclass names its learner and how its model becomes arrays and a torch module."""

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
    """What the fit found out, for the report."""

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """With the settings of `runs.stacking` and as many fits side by side as there are cores."""
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
        """The learner that the configuration describes."""

    def fit(self, logits: Inputs, labels: np.ndarray, folds: np.ndarray) -> Self:
        """Choose and fit on logits (M, N, C), labels (N,), folds (N,)."""
        self.fit_crossfitted(logits, labels, folds)
        return self

    def fit_crossfitted(self, logits: Inputs, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
        """Fit, and give the cross-fitted probabilities (N, C) that the same fits make; NaN where there is one fold."""
        assert self.learner is not None, "a stacker that was read from a file is not fitted again"
        mean = mean_probabilities(logits)
        found = nested_cv.cross_validate(self.learner, logits, labels, folds, n_jobs=self.n_jobs)
        unseen = np.full(found.nested_crossfit.shape, np.nan)
        for fold in np.unique(folds):
            copy = Calibration()
            if fold in found.inner_crossfit:
                places, answers = found.inner_crossfit[fold]
                copy = self._calibrated(answers, mean[places], labels[places], folds[places])
            inside = folds == fold
            if not np.isnan(found.nested_crossfit[inside]).any():
                unseen[inside] = copy.apply(found.nested_crossfit[inside], mean[inside])
        setting = self.learner.settings()[found.setting]
        self.model = self.learner.fit(logits, labels, setting)
        tested = len(np.unique(folds)) > 1
        self.calibration = self._calibrated(found.crossfit, mean, labels, folds) if tested else Calibration()
        self.facts = {
            "setting": dict(setting),
            "settings_tried": len(found.setting_losses),
            "cross_validated_log_loss": log_loss(found.crossfit, labels) if tested else None,
            "selection_score": log_loss(self._answer(logits), labels),
        }
        return unseen

    def predict_proba(self, logits: Inputs) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        return self._answer(logits)

    def _answer(self, seen: Any) -> np.ndarray:
        """Probabilities (N, C) for what the learner sees of N rows."""
        assert self.model is not None, "not fitted"
        return self.calibration.apply(self.model.predict_proba(seen), mean_probabilities(seen))

    def to_module(self) -> nn.Module:
        """Logits (B, M, C) -> probabilities (B, C)."""
        from utils.combiners.stacking_heads import TemperedBlend

        return TemperedBlend(self._module(), self.calibration.temperature, self.calibration.weight)

    def fitted_arrays(self) -> dict[str, np.ndarray]:
        """The model's arrays, temperature and share (1,)."""
        kept = {"temperature": self.calibration.temperature, "share": self.calibration.weight}
        return {name: np.array([value]) for name, value in kept.items()} | self._arrays()

    def set_fitted_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set the model, temperature and share."""
        self.calibration = Calibration(float(arrays["temperature"][0]), float(arrays["share"][0]))
        self.model = self._model(arrays)

    def restricted(self, used: np.ndarray) -> Self:
        """Itself, since it uses all."""
        return self

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The chosen setting, its losses, temperature and share; there are no weights of members."""
        kept = {"temperature": self.calibration.temperature, "share_of_stacker": self.calibration.weight}
        return {**self.facts, **kept, "weights": None}

    def _calibrated(self, answers: np.ndarray, mean: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> Calibration:
        return calibrate(answers, mean, labels, folds, use_temperature=self.use_temperature, fallback=self.fallback)

    @abstractmethod
    def _module(self) -> nn.Module:
        """Logits (B, M, C) -> the learner's probabilities (B, C)."""

    @abstractmethod
    def _arrays(self) -> dict[str, np.ndarray]:
        """The model as arrays of numbers, and texts as bytes under a name that ends in `.json`."""

    @classmethod
    @abstractmethod
    def _model(cls, state: Mapping[str, np.ndarray]) -> Model:
        """The model whose `_arrays` are in `state`."""


class StackingLogistic(Stacker):
    """Multinomial logistic regression, plain or shrunk to the log-linear pool, whichever held-out rows prefer."""

    @classmethod
    def make_learner(cls, config: Config) -> Learner:
        return LogisticLearner(KINDS)

    def _module(self) -> nn.Module:
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

    def _module(self) -> nn.Module:
        from utils.combiners.stacking_heads import PerceptronOnFeatures

        assert isinstance(self.model, Layers)
        return PerceptronOnFeatures(self.model.kind, self.model.matrices, self.model.biases)

    def _arrays(self) -> dict[str, np.ndarray]:
        assert isinstance(self.model, Layers)
        found = {"kind": np.array([KINDS.index(self.model.kind)])}
        for place, (matrix, bias) in enumerate(zip(self.model.matrices, self.model.biases, strict=True)):
            found |= {f"matrix{place}": matrix, f"bias{place}": bias}
        return found

    @classmethod
    def _model(cls, state: Mapping[str, np.ndarray]) -> Model:
        places = range(sum(name.startswith("matrix") for name in state))
        matrices, biases = (tuple(state[f"{name}{place}"] for place in places) for name in ("matrix", "bias"))
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

    def _module(self) -> nn.Module:
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

    def _module(self) -> nn.Module:
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

        own = {name.removeprefix("forest_"): values for name, values in state.items() if name.startswith("forest_")}
        return Forest(own)


def mean_probabilities(outputs: np.ndarray | MemberOutputs) -> np.ndarray:
    """Mean over the members of their probabilities, (N, C), from logits (M, N, C) or outputs that hold them."""
    return softmax(outputs.logits if isinstance(outputs, MemberOutputs) else outputs).mean(axis=0)


def _logs(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, SMALLEST_PROBABILITY))


COMBINERS: dict[str, type[Combiner]] = {
    "stacking_lr": StackingLogistic,
    "stacking_xgb": StackingBooster,
    "stacking_rf": StackingForest,
    "stacking_mlp": StackingPerceptron,
}
