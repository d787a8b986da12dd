"""The base class of combiners: members' logits in, class probabilities out; it accesses no file and no workspace."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import cached_property
from inspect import getattr_static
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeAlias, final, runtime_checkable

import numpy as np

from utils.core.config import Config
from utils.numeric.nested_cv import FEWEST_FOLDS, inner_folds, selecting_folds
from utils.numeric.uniform_mixture import mixed_with_uniform, uniform_weight
from utils.predictions.rows import MemberOutputs

if TYPE_CHECKING:
    from torch import nn

Inputs: TypeAlias = Any
"""Input of a combiner: logits float32 (M, N, C), or `MemberOutputs` where it `reads_embeddings`."""
SETTINGS = "settings"
"""Key in a state of the JSON text of all saved fields but arrays; an array NAME has the key `settings/NAME`."""
UNIFORM_WEIGHT = "uniform_weight"
"""Key of float64 (1,) in the state of a combiner whose probabilities are mixed with the uniform distribution."""
_UNSAVED = "unsaved"


@dataclass(frozen=True)
class MemberFacts:
    """Facts about M members beyond their outputs that a combiner may use, in the order of the arrays."""

    names: tuple[str, ...]
    recorded_accuracy: np.ndarray
    """float64 (M,), from 0 to 1; NaN where none is recorded"""
    latency_ms: np.ndarray
    """float64 (M,), milliseconds per image; NaN where it was not measured"""
    size_mb: np.ndarray
    """float64 (M,), 10^6 bytes on disk; NaN where there is no file"""


def unsaved(default: Any = None, *, factory: Callable[[], Any] | None = None) -> Any:
    """Declare a dataclass field of a combiner that `state` leaves out.

    For settings that only `fit` reads, and for fitted values that `fitted_arrays` saves.
    """
    metadata = {_UNSAVED: True}
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)


@dataclass
class Combiner(ABC):
    """Turns the outputs of M members into class probabilities.

    Members are in the order of their names, classes in the workspace's order. Every subclass is a dataclass. `state`
    saves each of its fields that is not declared by `unsaved`; a field is a number, a string, a tuple of these, or an
    array. `from_state` rebuilds the combiner with these values, so that no setting is lost.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    """Configuration keys that the combiner depends on, such as `runs.score_ensemble.pool`."""

    uniform_weight: float = field(default=0.0, kw_only=True, metadata={_UNSAVED: True})
    """Weight of the uniform distribution in the probabilities (`utils.numeric.uniform_mixture`), set by `fit`.

    0 for a combiner that learns nothing, and for one that an earlier version has saved.
    """

    @property
    def learns(self) -> bool:
        """Whether `fit` reads labels. If not, every row is out-of-sample."""
        return False

    @property
    def reads_embeddings(self) -> bool:
        """Whether the input is `MemberOutputs` instead of logits; the module then takes `(logits, embeddings)`.

        `embeddings` is a list of M tensors float32 (B, D_m).
        """
        return False

    @property
    def is_discontinuous(self) -> bool:
        """Whether a small change of the logits can change the probabilities by a step, as for votes and trees.

        An exported file of such a combiner is compared on both sides of each step.
        """
        return False

    @classmethod
    @abstractmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """Return an unfitted combiner with the settings of the configuration."""

    @final
    def fit(self, logits: Inputs, labels: np.ndarray, folds: np.ndarray) -> Self:
        """Fit on logits (M, N, C), by networks that were not trained on the rows, and labels (N,).

        `folds` (N,) are the workspace's folds of these rows: tuning, early stopping, calibration and blending are
        decided by leaving one of them out, so that a copy fitted without one fold has read none of its labels. Fitting
        again starts from scratch.
        """
        self._set_uniform_weight(labels, logits)
        self._fit(logits, labels, folds)
        return self

    @final
    def predict_proba(self, logits: Inputs) -> np.ndarray:
        """Logits (M, N, C) -> probabilities float64 (N, C) whose rows sum to 1."""
        return self._mixed(self._predict_proba(logits))

    @final
    def to_module(self) -> nn.Module:
        """Return the same map for export: logits float32 (B, M, C) -> probabilities float32 (B, C)."""
        if not self.uniform_weight:
            return self._to_module()
        from utils.combiners.heads import MixedWithUniform

        return MixedWithUniform(self._to_module(), self.uniform_weight)

    @abstractmethod
    def _fit(self, logits: Inputs, labels: np.ndarray, folds: np.ndarray) -> object:
        """Fit as `fit` describes."""

    @abstractmethod
    def _predict_proba(self, logits: Inputs) -> np.ndarray:
        """Return probabilities (N, C) before the mixture with the uniform distribution."""

    @abstractmethod
    def _to_module(self) -> nn.Module:
        """Return `_predict_proba` as a torch module."""

    def _set_uniform_weight(self, labels: np.ndarray, logits: Inputs) -> None:
        """Set the weight for a fit on labels (N,) and logits (M, N, C)."""
        self.uniform_weight = uniform_weight(len(labels), logits.shape[2]) if self.learns else 0.0

    def _mixed(self, probabilities: np.ndarray) -> np.ndarray:
        return mixed_with_uniform(probabilities, self.uniform_weight) if self.uniform_weight else probabilities

    @final
    def state(self) -> dict[str, np.ndarray]:
        """Return everything that inference needs as numeric arrays: the saved fields and `fitted_arrays`.

        Raises TypeError for an attribute that is not a field, and for a field of a type that cannot be saved.
        """
        saved = saved_fields(type(self))
        _check_declared(self)
        values = {name: getattr(self, name) for name in saved}
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        others = {name: value for name, value in values.items() if name not in arrays}
        saved_arrays = {f"{SETTINGS}/{name}": value for name, value in arrays.items()}
        if others:
            saved_arrays[SETTINGS] = _encoded(others, type(self).__name__)
        if self.uniform_weight:
            saved_arrays[UNIFORM_WEIGHT] = np.array([self.uniform_weight])
        return saved_arrays | self.fitted_arrays()

    @final
    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """Restore a combiner from its `state`, for inference only.

        A field that is missing in the state, such as one of a later version, gets its default.
        """
        values: dict[str, Any] = _decoded(state[SETTINGS]) if SETTINGS in state else {}
        values |= sub_state(state, f"{SETTINGS}/")
        combiner = cls(**values)
        if UNIFORM_WEIGHT in state:
            combiner.uniform_weight = float(state[UNIFORM_WEIGHT][0])
        common = (SETTINGS, UNIFORM_WEIGHT)
        fitted = {name: array for name, array in state.items() if name.partition("/")[0] not in common}
        combiner.set_fitted_arrays(fitted)
        return combiner

    def fitted_arrays(self) -> dict[str, np.ndarray]:
        """Return the fitted values of fields that are `unsaved`, as numeric arrays by name."""
        return {}

    def set_fitted_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore the fitted values from `fitted_arrays`. Raises ValueError for unexpected arrays."""
        if arrays:
            raise ValueError(f"{type(self).__name__} has no fitted arrays, got {', '.join(sorted(arrays))}")

    def used(self, members: int) -> np.ndarray:
        """Return which of the members the fitted combiner needs, bool (M,)."""
        return np.ones(members, dtype=bool)

    @abstractmethod
    def restricted(self, used: np.ndarray) -> Self:
        """Return the same map on the logits of the used members, bool (M,), only."""

    @abstractmethod
    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return facts about the fit as JSON values, with `weights` {member: weight} if the combiner has weights."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("state", "from_state"):
            if name in vars(cls):
                raise TypeError(
                    f"{cls.__name__} overrides {name}, which saves every field. Declare fitted values by unsaved() and "
                    "save them in fitted_arrays and set_fitted_arrays"
                )
        for name in ("fit", "predict_proba", "to_module"):
            if name in vars(cls):
                raise TypeError(
                    f"{cls.__name__} overrides {name}, which takes care of the mixture with the uniform distribution. "
                    f"Define _{name}"
                )


@dataclass(frozen=True)
class NestedPredictions:
    """Probabilities of N rows by copies fitted without one fold, and by copies fitted without two folds."""

    crossfit: np.ndarray
    """float (N, C): by the copy fitted without the row's fold; NaN with a single fold"""
    inner: Mapping[int, np.ndarray]
    """{fold: (N, C)}: by the copy fitted without this fold and the row's fold; empty with fewer than three folds

    NaN for rows of folds that are neither this fold nor among its `nested_cv.selecting_folds`. All other rows of an
    entry are thus out-of-sample, and independent of the labels of its fold: a combination of several combiners can be
    fitted on the rows of other folds and applied to the rows of the fold.
    """


@runtime_checkable
class CrossfitsItself(Protocol):
    """A combiner whose cross-fitted copies and final fit share trainings."""

    def _fit_nested(self, logits: Inputs, labels: np.ndarray, folds: np.ndarray) -> NestedPredictions:
        """Fit as `_fit` does; return the predictions of copies fitted without one and without two folds.

        They are not mixed with the uniform distribution, which the function `fit_nested` does.
        """


def saved_fields(kind: type[Combiner]) -> tuple[str, ...]:
    """Return the names of the fields whose values `state` saves."""
    return tuple(entry.name for entry in fields(kind) if not entry.metadata.get(_UNSAVED))


def combiner_inputs(combiner: Combiner, outputs: np.ndarray | MemberOutputs) -> Inputs:
    """Return the input of a combiner: the members' outputs, or only their logits."""
    return outputs.logits if isinstance(outputs, MemberOutputs) and not combiner.reads_embeddings else outputs


def sub_state(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays whose names start with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): values for name, values in state.items() if name.startswith(prefix)}


def fit_crossfitted(recipe: Combiner, logits: Inputs, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Fit on logits (M, N, C), labels (N,), folds (N,); return the cross-fitted probabilities float32 (N, C).

    A copy of the whole combiner, fitted on the other folds, predicts the rows of each fold. Copies and final fit select
    by the same rule, `nested_cv.inner_folds`. A combiner that learns nothing predicts as at inference.
    """
    if isinstance(recipe, CrossfitsItself):
        return fit_nested(recipe, logits, labels, folds).crossfit
    recipe.fit(logits, labels, inner_folds(labels, folds, np.ones(len(labels), dtype=bool)))
    if not recipe.learns:
        return recipe.predict_proba(logits).astype(np.float32)
    probabilities = np.empty(logits.shape[1:], dtype=np.float32)
    for fold in np.unique(folds):
        inside = folds == fold
        probabilities[inside] = _predict_held_out(recipe, logits, labels, folds, inside)
    return probabilities


def fit_nested(recipe: Combiner, logits: Inputs, labels: np.ndarray, folds: np.ndarray) -> NestedPredictions:
    """Fit on logits (M, N, C), labels (N,), folds (N,); return float32 predictions of copies without one and two folds.

    There is a copy without two folds for each pair of `nested_cv.selecting_folds`, besides the K copies without one. A
    combiner that learns nothing has the same predictions in all entries.
    """
    if isinstance(recipe, CrossfitsItself):
        recipe._set_uniform_weight(labels, logits)
        nested = recipe._fit_nested(logits, labels, folds)
        inner = {fold: mixed_by_fold(values, folds, (fold,)) for fold, values in nested.inner.items()}
        return NestedPredictions(mixed_by_fold(nested.crossfit, folds), inner)
    crossfit = fit_crossfitted(recipe, logits, labels, folds)
    names: list[int] = np.unique(folds).tolist()
    if not recipe.learns:
        return NestedPredictions(crossfit, dict.fromkeys(names, crossfit))
    if len(names) < FEWEST_FOLDS:
        return NestedPredictions(crossfit, {})
    inner = {fold: np.where((folds == fold)[:, None], crossfit, np.float32(np.nan)) for fold in names}
    selecting = selecting_folds(folds)
    for fold, other in combinations(names, 2):
        if other not in selecting[fold]:
            continue
        held_out = np.isin(folds, (fold, other))
        predictions = _predict_held_out(recipe, logits, labels, folds, held_out)
        is_fold = folds[held_out] == fold
        inner[other][folds == fold] = predictions[is_fold]
        inner[fold][folds == other] = predictions[~is_fold]
    return NestedPredictions(crossfit, inner)


def _predict_held_out(
    recipe: Combiner, logits: Inputs, labels: np.ndarray, folds: np.ndarray, held_out: np.ndarray
) -> np.ndarray:
    """Return probabilities (H, C) of the rows `held_out`, bool (N,), by a copy fitted on the other rows."""
    inside = ~held_out
    copy = deepcopy(recipe).fit(logits[:, inside], labels[inside], inner_folds(labels, folds, inside))
    return copy.predict_proba(logits[:, held_out])


def mixed_by_fold(probabilities: np.ndarray, folds: np.ndarray, left_out: tuple[int, ...] = ()) -> np.ndarray:
    """Mix probabilities (N, C), by copies without the row's fold and folds `left_out`, with the uniform distribution.

    Returns float32. The weight for each copy depends on the number of rows that it was fitted on.
    """
    weights = np.empty(len(folds))
    for fold in np.unique(folds):
        rows = int((~np.isin(folds, (fold, *left_out))).sum())
        weights[folds == fold] = uniform_weight(rows, probabilities.shape[1])
    return mixed_with_uniform(probabilities, weights).astype(np.float32)


def _check_declared(combiner: Combiner) -> None:
    declared = {entry.name for entry in fields(combiner)}
    for name in sorted(vars(combiner).keys() - declared):
        if not isinstance(getattr_static(type(combiner), name, None), cached_property):
            raise TypeError(
                f"{type(combiner).__name__}.{name} is no field, so that it would be lost on disk. Declare the class by "
                f"@dataclass and the attribute by `{name}: TYPE = DEFAULT`"
            )


def _encoded(values: Mapping[str, Any], kind: str) -> np.ndarray:
    try:
        text = json.dumps(values, sort_keys=True)
    except TypeError as error:
        raise TypeError(
            f"{kind}: a field holds neither a number, a text, a tuple of these nor an array ({error}). Save it in "
            "fitted_arrays, and declare it by unsaved()"
        ) from error
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _decoded(text: np.ndarray) -> dict[str, Any]:
    return {name: _as_tuple(value) for name, value in json.loads(text.tobytes().decode()).items()}


def _as_tuple(value: Any) -> Any:
    """Convert lists, which JSON has instead of tuples, to tuples."""
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value
