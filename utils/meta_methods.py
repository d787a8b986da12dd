"""Ensemble of ensembles: a fuser on the cross-fitted predictions of other ensembles, and on nothing else.

The fuser is a stacker whose members are the inputs. At inference the inputs answer from the members' logits, each
member run once however many inputs it serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from utils import ensemble_methods, fusion_methods, moe_methods, stacking_methods
from utils.combiners.gating import AttentionGate, AttentionLearner
from utils.combiners.perceptron import PerceptronLearner
from utils.combiners.protocol import Combiner, MemberFacts, combiner_inputs, fit_crossfitted, sub_state, unsaved
from utils.core.config import Config
from utils.numeric.metrics import SMALLEST_PROBABILITY
from utils.predictions.rows import MemberOutputs
from utils.stacking_methods import Learner, Model, Stacker, StackingBooster, StackingPerceptron

if TYPE_CHECKING:
    from torch import nn

KINDS_OF_FEATURES = ("log_probabilities", "probabilities")
DROPOUT = 0.3  # runs.meta_fuser.mlp_config has no key for it


class FuserPerceptron(StackingPerceptron):
    """A small neural network on the inputs' probabilities."""

    settings = ("runs.meta_fuser", "runs.score_ensemble.temperature", "runs.stacking.fallback")

    @classmethod
    def make_learner(cls, config: Config) -> Learner:
        shape = config.runs.meta_fuser.mlp_config
        return PerceptronLearner(KINDS_OF_FEATURES, shape.hidden_dims, shape.epochs, shape.lr, DROPOUT, config.seed)


class FuserBooster(StackingBooster):
    """Gradient-boosted trees on the inputs' probabilities, shaped by `runs.stacking.xgb_config`."""

    settings = (*FuserPerceptron.settings, "runs.stacking.xgb_config")


class FuserAttention(Stacker):
    """A mixture of the inputs whose weights depend on what they say."""

    settings = FuserPerceptron.settings

    @classmethod
    def make_learner(cls, config: Config) -> Learner:
        shape = config.runs.meta_fuser.mlp_config
        return AttentionLearner(shape.hidden_dims[-1] if shape.hidden_dims else 64, shape.epochs, shape.lr, config.seed)

    def _module(self) -> nn.Module:
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


FUSERS: dict[str, type[Stacker]] = {"xgb": FuserBooster, "mlp": FuserPerceptron, "attention": FuserAttention}
"""`runs.meta_fuser.fuser_type` -> class."""


INPUT_METHODS: dict[str, type[Combiner]] = {
    **ensemble_methods.COMBINERS,
    **stacking_methods.COMBINERS,
    **fusion_methods.COMBINERS,
    **moe_methods.COMBINERS,
}
"""Methods that may be inputs."""


@dataclass(frozen=True)
class FuserInput:
    """One ensemble among the inputs."""

    method: str
    combiner: Combiner
    member_indices: np.ndarray
    """int64: where its members stand among the M members"""
    crossfit: np.ndarray | None = None
    """float (N, C): cross-fitted probabilities on the rows of the fit, for an input that is fitted already"""


@dataclass
class MetaFuserCombiner(Combiner):
    """A fuser with its inputs: members' outputs in, as for any other combiner.

    It reads embeddings where one of its inputs does, and each input gets what it reads.
    Cross-fitted over the same folds as its inputs: what it sees of other folds' rows comes from copies of the inputs
    that have read this fold's labels, which is accepted (Wolpert's stacking does the same) and held to chance by a test
    with permuted labels.
    """

    settings: ClassVar[tuple[str, ...]] = FuserPerceptron.settings  # what all fusers depend on; each may add its own
    learns: ClassVar[bool] = True

    inputs: Sequence[FuserInput] = unsaved(())
    fuser: Stacker = unsaved(factory=FuserPerceptron)
    fuser_type: str = unsaved("mlp")

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """Unfitted inputs over all members: those of `runs.meta_fuser.input_ensembles` that are in `PARTS`."""
        everyone = np.arange(len(members.names))
        methods = [name.removesuffix("_ensemble") for name in config.runs.meta_fuser.input_ensembles]
        inputs = [
            FuserInput(m, INPUT_METHODS[m].configured(config, members), everyone) for m in methods if m in INPUT_METHODS
        ]
        return cls.over(config, members, inputs)

    @classmethod
    def over(cls, config: Config, members: MemberFacts, inputs: Sequence[FuserInput]) -> Self:
        """An unfitted fuser over inputs, which may be fitted already."""
        kind = config.runs.meta_fuser.fuser_type
        return cls(inputs, FUSERS[kind].configured(config, members), kind)

    @property
    def reads_embeddings(self) -> bool:
        """Whether any input does."""
        return any(each.combiner.reads_embeddings for each in self.inputs)

    @property
    def is_discontinuous(self) -> bool:
        """Whether the fuser or any input does."""
        return any(each.is_discontinuous for each in (self.fuser, *(each.combiner for each in self.inputs)))

    def fit(self, outputs: np.ndarray | MemberOutputs, labels: np.ndarray, folds: np.ndarray) -> Self:
        """Fit what is not fitted yet on outputs (M, N, C), labels (N,), folds (N,)."""
        self.fit_crossfitted(outputs, labels, folds)
        return self

    def fit_crossfitted(self, outputs: np.ndarray | MemberOutputs, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
        """Fit; gives the fuser's cross-fitted probabilities (N, C)."""
        seen = [_unseen(each, outputs, labels, folds) for each in self.inputs]
        return self.fuser.fit_crossfitted(_as_logits(seen), labels, folds)

    def predict_proba(self, outputs: np.ndarray | MemberOutputs) -> np.ndarray:
        """Outputs (M, N, C) -> probabilities (N, C)."""
        return self.fuser.predict_proba(_as_logits([_said(each, outputs) for each in self.inputs]))

    def to_module(self) -> nn.Module:
        """Logits (B, M, C), and embeddings where it reads them -> probabilities (B, C)."""
        from utils.combiners.stacking_heads import FusedInputs, FusedInputsWithEmbeddings

        modules = [each.combiner.to_module() for each in self.inputs]
        places = [each.member_indices for each in self.inputs]
        if not self.reads_embeddings:
            return FusedInputs(modules, places, self.fuser.to_module())
        reads = [each.combiner.reads_embeddings for each in self.inputs]
        return FusedInputsWithEmbeddings(modules, places, self.fuser.to_module(), reads)

    def fitted_arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the fuser under `fuser/`, of each input under `inputs/<k>/`; names as bytes."""
        found = {"fuser_type": _bytes(self.fuser_type)}
        found |= {f"fuser/{name}": values for name, values in self.fuser.state().items()}
        for place, each in enumerate(self.inputs):
            start = f"inputs/{place:03d}"
            found |= {f"{start}/method": _bytes(each.method), f"{start}/places": each.member_indices}
            found |= {f"{start}/state/{name}": values for name, values in each.combiner.state().items()}
        return found

    def set_fitted_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set the fuser and the inputs."""
        starts = sorted({name.rsplit("/", 1)[0] for name in arrays if name.endswith("/method")})
        inputs = []
        for start in starts:
            method = _text(arrays[f"{start}/method"])
            combiner = INPUT_METHODS[method].from_state(sub_state(arrays, f"{start}/state/"))
            inputs.append(FuserInput(method, combiner, arrays[f"{start}/places"]))
        self.inputs, self.fuser_type = inputs, _text(arrays["fuser_type"])
        self.fuser = FUSERS[self.fuser_type].from_state(sub_state(arrays, "fuser/"))

    def used(self, members: int) -> np.ndarray:
        """The members of any input, bool (M,)."""
        found = np.zeros(members, dtype=bool)
        for each in self.inputs:
            found[each.member_indices[each.combiner.used(len(each.member_indices))]] = True
        return found

    def restricted(self, used: np.ndarray) -> Self:
        """The same over the used members alone."""
        place_of = np.cumsum(used) - 1
        inputs = []
        for each in self.inputs:
            own = each.combiner.used(len(each.member_indices))
            places = place_of[each.member_indices[own]]
            inputs.append(replace(each, combiner=each.combiner.restricted(own), member_indices=places, crossfit=None))
        return type(self)(inputs, self.fuser, self.fuser_type)

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """What the fuser found."""
        facts = self.fuser.report(tuple(each.method for each in self.inputs))
        return {**facts, "fuser_type": self.fuser_type, "inputs": [each.method for each in self.inputs]}


def _said(one: FuserInput, outputs: np.ndarray | MemberOutputs) -> np.ndarray:
    return one.combiner.predict_proba(combiner_inputs(one.combiner, outputs[one.member_indices]))


def _unseen(one: FuserInput, outputs: np.ndarray | MemberOutputs, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Cross-fitted probabilities (N, C) of an input; with one fold there are none, and it answers as it is."""
    if one.crossfit is not None:
        return one.crossfit
    found = fit_crossfitted(one.combiner, combiner_inputs(one.combiner, outputs[one.member_indices]), labels, folds)
    return _said(one, outputs) if np.isnan(found).any() else found


def _as_logits(probabilities: Sequence[np.ndarray]) -> np.ndarray:
    return np.log(np.maximum(np.stack(probabilities), SMALLEST_PROBABILITY))


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _text(values: np.ndarray) -> str:
    return values.tobytes().decode()


COMBINERS: dict[str, type[Combiner]] = {"meta_fuser": MetaFuserCombiner}
