"""Ensemble of ensembles: a fuser of the cross-fitted predictions of other ensembles.

The fuser is a stacker, or a convex pool, whose members are the input ensembles. At inference each member runs once, for
all inputs that use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from utils import ensemble_methods, fusion_methods, moe_methods, stacking_methods
from utils.combiners import pruning
from utils.combiners.convex_pool import ConvexPool
from utils.combiners.gate_learners import AttentionLearner
from utils.combiners.gates import AttentionGate
from utils.combiners.perceptron import PerceptronLearner
from utils.combiners.protocol import (
    Combiner,
    MemberFacts,
    NestedPredictions,
    combiner_inputs,
    fit_nested,
    sub_state,
    unsaved,
)
from utils.core.config import Config
from utils.numeric.metrics import clipped_log
from utils.predictions.rows import MemberOutputs
from utils.stacking_methods import Learner, Model, Stacker, StackingBooster, StackingPerceptron

if TYPE_CHECKING:
    from torch import nn

FEATURE_KINDS = ("log_probabilities", "probabilities")
DROPOUT = 0.3  # `runs.meta_fuser.mlp_config` has no key for it


class FuserPerceptron(StackingPerceptron):
    """A small neural network on the inputs' probabilities."""

    settings = ("runs.meta_fuser", "runs.score_ensemble.temperature", "runs.stacking.fallback")

    @classmethod
    def make_learner(cls, config: Config) -> Learner:
        shape = config.runs.meta_fuser.mlp_config
        return PerceptronLearner(FEATURE_KINDS, shape.hidden_dims, shape.epochs, shape.lr, DROPOUT, config.seed)


class FuserBooster(StackingBooster):
    """Gradient-boosted trees on the inputs' probabilities, shaped by `runs.stacking.xgb_config`."""

    settings = (*FuserPerceptron.settings, "runs.stacking.xgb_config")


class FuserAttention(Stacker):
    """A mixture of the inputs whose weights depend on the inputs' probabilities."""

    settings = FuserPerceptron.settings

    @classmethod
    def make_learner(cls, config: Config) -> Learner:
        shape = config.runs.meta_fuser.mlp_config
        return AttentionLearner(shape.hidden_dims[-1] if shape.hidden_dims else 64, shape.epochs, shape.lr, config.seed)

    def _learner_module(self) -> nn.Module:
        from utils.combiners.stacking_heads import GatedMixture

        assert isinstance(self.model, AttentionGate)
        return GatedMixture(self.model.matrices, self.model.biases)

    def _arrays(self) -> dict[str, np.ndarray]:
        assert isinstance(self.model, AttentionGate)
        names = ("hidden", "scores")
        matrices = {f"{name}_matrix": value for name, value in zip(names, self.model.matrices, strict=True)}
        return matrices | {f"{name}_bias": value for name, value in zip(names, self.model.biases, strict=True)}

    @classmethod
    def _model(cls, state: Mapping[str, np.ndarray]) -> Model:
        return AttentionGate(
            (state["hidden_matrix"], state["scores_matrix"]),
            (state["hidden_bias"], state["scores_bias"]),
        )


FUSERS: dict[str, type[Stacker | ConvexPool]] = {
    "xgb": FuserBooster,
    "mlp": FuserPerceptron,
    "attention": FuserAttention,
    "convex": ConvexPool,
}
"""{value of `runs.meta_fuser.fuser_type`: class}"""


INPUT_METHODS: dict[str, type[Combiner]] = {
    **ensemble_methods.COMBINERS,
    **pruning.COMBINERS,
    **stacking_methods.COMBINERS,
    **fusion_methods.COMBINERS,
    **moe_methods.COMBINERS,
}
"""{method of ensembles that may be inputs: combiner class}"""


@dataclass(frozen=True)
class FuserInput:
    """An input ensemble."""

    method: str
    combiner: Combiner
    member_indices: np.ndarray
    """int64: indices of its members among the M members"""
    predictions: NestedPredictions | None = None
    """Cross-fitted predictions on the rows of the fit; None for an input that is not fitted yet"""
    name: str = ""
    """Name of the ensemble, for the report; "" for the name of its method"""

    @property
    def label(self) -> str:
        """Name in the report."""
        return self.name or self.method


@dataclass
class MetaFuserCombiner(Combiner):
    """A fuser with its inputs; like other combiners, it takes the members' outputs.

    It is cross-fitted over the same folds as its inputs. The inputs of a stacker on the rows of other folds are by
    copies that have read the labels of the held-out fold, as in Wolpert's stacking; a test with permuted labels shows
    that nothing leaks. Those of a convex pool are by copies that have not (`ConvexPool.fit_two_level`).
    """

    settings: ClassVar[tuple[str, ...]] = FuserPerceptron.settings  # of all fusers; each may add more
    learns: ClassVar[bool] = True

    inputs: Sequence[FuserInput] = unsaved(())
    fuser: Stacker | ConvexPool = unsaved(factory=FuserPerceptron)
    fuser_type: str = unsaved("mlp")

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """Return an unfitted fuser of the methods in `runs.meta_fuser.input_ensembles`, each over all members."""
        all_members = np.arange(len(members.names))
        methods = [name.removesuffix("_ensemble") for name in config.runs.meta_fuser.input_ensembles]
        inputs = [
            FuserInput(m, INPUT_METHODS[m].configured(config, members), all_members)
            for m in methods
            if m in INPUT_METHODS
        ]
        return cls.over(config, members, inputs)

    @classmethod
    def over(cls, config: Config, members: MemberFacts, inputs: Sequence[FuserInput]) -> Self:
        """Return an unfitted fuser over inputs, which may already be fitted."""
        kind = config.runs.meta_fuser.fuser_type
        return cls(inputs, FUSERS[kind].configured(config, members), kind)

    @property
    def reads_embeddings(self) -> bool:
        """Whether any input reads embeddings."""
        return any(fuser_input.combiner.reads_embeddings for fuser_input in self.inputs)

    @property
    def is_discontinuous(self) -> bool:
        """Whether the fuser or any input is discontinuous."""
        return any(
            combiner.is_discontinuous
            for combiner in (self.fuser, *(fuser_input.combiner for fuser_input in self.inputs))
        )

    def _fit(self, outputs: np.ndarray | MemberOutputs, labels: np.ndarray, folds: np.ndarray) -> None:
        """Fit the fuser, and the inputs that are not fitted yet, on outputs (M, N, C), labels (N,), folds (N,)."""
        self._fit_nested(outputs, labels, folds)

    def _fit_nested(
        self, outputs: np.ndarray | MemberOutputs, labels: np.ndarray, folds: np.ndarray
    ) -> NestedPredictions:
        """Fit, and return the predictions of the fuser's copies; a convex pool has no copies without two folds.

        Raises ValueError if an input of a convex pool has no predictions of copies without two folds.
        """
        nested = [_nested(fuser_input, outputs, labels, folds) for fuser_input in self.inputs]
        scores = clipped_log(np.stack([part.crossfit for part in nested]))
        if not isinstance(self.fuser, ConvexPool):
            return self.fuser._fit_nested(scores, labels, folds)
        names = set(np.unique(folds).tolist())
        for fuser_input, predictions in zip(self.inputs, nested, strict=True):
            if len(names) > 1 and not names <= predictions.inner.keys():
                raise ValueError(f"{fuser_input.label} has no predictions of copies that were fitted without two folds")

        def inner(fold: int) -> np.ndarray:
            return clipped_log(np.stack([part.inner[fold] for part in nested]))

        return NestedPredictions(self.fuser.fit_two_level(scores, inner, labels, folds), {})

    def _predict_proba(self, outputs: np.ndarray | MemberOutputs) -> np.ndarray:
        """Return probabilities (N, C) for outputs (M, N, C)."""
        probabilities = [_predict(fuser_input, outputs) for fuser_input in self.inputs]
        return self.fuser._predict_proba(clipped_log(np.stack(probabilities)))

    def _to_module(self) -> nn.Module:
        """Return the torch module: logits (B, M, C), and embeddings if it reads them -> probabilities (B, C)."""
        from utils.combiners.stacking_heads import FusedInputs, FusedInputsWithEmbeddings

        modules = [fuser_input.combiner.to_module() for fuser_input in self.inputs]
        indices = [fuser_input.member_indices for fuser_input in self.inputs]
        if not self.reads_embeddings:
            return FusedInputs(modules, indices, self.fuser._to_module())
        reads_embeddings = [fuser_input.combiner.reads_embeddings for fuser_input in self.inputs]
        return FusedInputsWithEmbeddings(modules, indices, self.fuser._to_module(), reads_embeddings)

    def fitted_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of the fuser under `fuser/` and of each input under `inputs/<k>/`; texts as bytes."""
        arrays = {"fuser_type": _bytes(self.fuser_type)}
        arrays |= {f"fuser/{name}": values for name, values in self.fuser.state().items()}
        for index, fuser_input in enumerate(self.inputs):
            prefix = f"inputs/{index:03d}"
            arrays |= {f"{prefix}/method": _bytes(fuser_input.method), f"{prefix}/places": fuser_input.member_indices}
            arrays |= {f"{prefix}/state/{name}": values for name, values in fuser_input.combiner.state().items()}
        return arrays

    def set_fitted_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set the fuser and the inputs."""
        prefixes = sorted({name.rsplit("/", 1)[0] for name in arrays if name.endswith("/method")})
        inputs = []
        for prefix in prefixes:
            method = _text(arrays[f"{prefix}/method"])
            combiner = INPUT_METHODS[method].from_state(sub_state(arrays, f"{prefix}/state/"))
            inputs.append(FuserInput(method, combiner, arrays[f"{prefix}/places"]))
        self.inputs, self.fuser_type = inputs, _text(arrays["fuser_type"])
        self.fuser = FUSERS[self.fuser_type].from_state(sub_state(arrays, "fuser/"))

    def used(self, members: int) -> np.ndarray:
        """Return which members any input uses, bool (M,)."""
        used = np.zeros(members, dtype=bool)
        for fuser_input in self._inputs_used():
            used[fuser_input.member_indices[fuser_input.combiner.used(len(fuser_input.member_indices))]] = True
        return used

    def restricted(self, used: np.ndarray) -> Self:
        """Return the same combiner on the used members only."""
        new_index = np.cumsum(used) - 1
        inputs = []
        for fuser_input in self._inputs_used():
            input_used = fuser_input.combiner.used(len(fuser_input.member_indices))
            indices, combiner = (
                new_index[fuser_input.member_indices[input_used]],
                fuser_input.combiner.restricted(input_used),
            )
            inputs.append(replace(fuser_input, combiner=combiner, member_indices=indices, predictions=None))
        return replace(self, inputs=inputs, fuser=self.fuser.restricted(self.fuser.used(len(self.inputs))))

    def _inputs_used(self) -> list[FuserInput]:
        """Return the inputs that affect the fuser's predictions."""
        used = self.fuser.used(len(self.inputs))
        return [fuser_input for fuser_input, needed in zip(self.inputs, used, strict=True) if needed]

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return the fuser's report, its type and the methods of the inputs."""
        facts = self.fuser.report(tuple(fuser_input.label for fuser_input in self.inputs))
        return {**facts, "fuser_type": self.fuser_type, "inputs": [fuser_input.method for fuser_input in self.inputs]}


def _predict(fuser_input: FuserInput, outputs: np.ndarray | MemberOutputs) -> np.ndarray:
    combiner = fuser_input.combiner
    return combiner.predict_proba(combiner_inputs(combiner, outputs[fuser_input.member_indices]))


def _nested(
    fuser_input: FuserInput, outputs: np.ndarray | MemberOutputs, labels: np.ndarray, folds: np.ndarray
) -> NestedPredictions:
    """Return cross-fitted predictions of an input; with a single fold, those of the fitted input."""
    if fuser_input.predictions is not None:
        return fuser_input.predictions
    combiner = fuser_input.combiner
    nested = fit_nested(combiner, combiner_inputs(combiner, outputs[fuser_input.member_indices]), labels, folds)
    return NestedPredictions(_predict(fuser_input, outputs), {}) if np.isnan(nested.crossfit).any() else nested


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _text(values: np.ndarray) -> str:
    return values.tobytes().decode()


COMBINERS: dict[str, type[Combiner]] = {"meta_fuser": MetaFuserCombiner}
