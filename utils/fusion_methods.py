"""Feature fusion: heads on the members' embeddings, held to the plain mean of the members' probabilities.

A fusion is a stacker whose features are embeddings: how long it is trained, which rank products have, temperature and
share of the plain mean are chosen by rows that the fit did not see. Centres, principal axes and shared variates are
learned on all the rows of a fit, without a label, once for all of its copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from utils.combiners import embedding_maps
from utils.combiners.embedding_maps import EmbeddingMaps
from utils.combiners.fusion_learner import HeadLearner, HeadShape, TrainedHeads
from utils.combiners.protocol import Combiner, MemberFacts, sub_state, unsaved
from utils.core.config import Config
from utils.core.errors import UserError
from utils.numeric.metrics import log_loss, softmax
from utils.predictions.rows import MemberOutputs
from utils.stacking_methods import Calibration, Learner, Model, Stacker, mean_probabilities

if TYPE_CHECKING:
    from torch import nn


@dataclass
class FusionStacker(Stacker):
    """What the fusions share; a subclass names its head and what that reads."""

    settings: ClassVar[tuple[str, ...]] = (
        *("runs.fusion.fusion_config", "runs.fusion.label_smoothing", "runs.fusion.seeds"),
        *("runs.fusion.train_embeddings", "runs.score_ensemble.temperature", "runs.stacking.fallback"),
    )
    reads_embeddings: ClassVar[bool] = True
    method: ClassVar[str]
    """As in `runs.fusion.fusion_methods`."""

    names: tuple[str, ...] = unsaved(())
    """Of the members, for messages."""
    maps: EmbeddingMaps | None = unsaved()
    head_report: dict[str, Any] = unsaved(factory=dict)
    """What the fitted head says of its members, for the report."""

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """With the settings of `runs.fusion`."""
        return cls(
            learner=cls.make_learner(config),
            use_temperature=config.runs.score_ensemble.temperature != "off",
            fallback=config.runs.stacking.fallback,
            names=members.names,
        )

    @classmethod
    def make_learner(cls, config: Config) -> Learner:
        fusion = config.runs.fusion
        head = fusion.fusion_config
        return HeadLearner(
            method=cls.method,
            hidden=head.hidden_dims,
            epochs=head.epochs,
            lr=head.lr,
            dropout=head.dropout,
            label_smoothing=fusion.label_smoothing,
            seeds=fusion.seeds,
            seed=config.seed,
        )

    def fit_crossfitted(self, outputs: MemberOutputs, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
        """Fit on outputs (M, N, C), labels (N,), folds (N,); gives the cross-fitted probabilities (N, C).

        Raises UserError for embeddings that are not finite, naming the member.
        """
        for name, own in zip(self.names, outputs.embeddings, strict=True):
            bad = np.flatnonzero(~np.isfinite(own).all(axis=0))
            if bad.size:
                raise UserError(
                    f"member {name}: {bad.size} of {own.shape[1]} columns of its embeddings hold NaN or infinity, "
                    f"first column {bad[0]}. Leave it out: --set backbones.exclude=[{name}]; or mend what made them"
                )
        self.maps = self._maps_of(outputs)
        seen = self._seen(outputs)
        unseen = super().fit_crossfitted(seen, labels, folds)
        self.head_report = self._of_members(seen)
        return unseen

    def predict_proba(self, outputs: MemberOutputs) -> np.ndarray:
        """Outputs (M, N, C) -> probabilities (N, C)."""
        return self._answer(self._seen(outputs))

    def to_module(self) -> nn.Module:
        """Logits (B, M, C) and M embeddings (B, D_m) -> probabilities (B, C)."""
        from utils.combiners.fusion_heads import FusedEmbeddings

        return FusedEmbeddings(
            self.maps_module(), self._module(), self.calibration.temperature, self.calibration.weight
        )

    def maps_module(self) -> nn.Module:
        """What the heads read of the members' embeddings, as a torch module."""
        assert self.maps is not None, "not fitted"
        return self.maps.module()

    def heads_to_train(self) -> list[nn.Module]:
        """The fitted heads, one per seed, with their dropout."""
        assert isinstance(self.model, TrainedHeads)
        assert isinstance(self.learner, HeadLearner)
        return self.model.modules(self.learner.dropout)

    def retrained(
        self, heads: Sequence[Mapping[str, np.ndarray]], outputs: MemberOutputs, labels: np.ndarray, folds: np.ndarray
    ) -> np.ndarray:
        """Take weights that were trained elsewhere; temperature and share of the plain mean are chosen anew.

        They are chosen on outputs (M, N, C), labels (N,), folds (N,) that neither heads nor networks were fitted on.
        They are kept only where rows of left-out folds gain. Gives probabilities (N, C), each by what the other folds
        chose.
        """
        assert isinstance(self.model, TrainedHeads)
        self.model = TrainedHeads(self.model.shape, tuple(dict(own) for own in heads))
        seen = self._seen(outputs)
        said, mean = self.model.predict_proba(seen), mean_probabilities(seen)
        unseen = np.empty_like(said)
        for fold in np.unique(folds):
            inside = folds == fold
            copy = self._calibrated(said[~inside], mean[~inside], labels[~inside], folds[~inside])
            unseen[inside] = copy.apply(said[inside], mean[inside])
        # Networks that hardly err on few rows ask for a temperature near 0, which one error elsewhere makes costly.
        gains = log_loss(unseen, labels) < log_loss(said, labels)
        self.calibration = self._calibrated(said, mean, labels, folds) if gains else Calibration()
        unseen = unseen if gains else said
        self.head_report = self._of_members(seen)
        self.facts = {**self.facts, "selection_score": log_loss(self.calibration.apply(said, mean), labels)}
        return unseen

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The chosen setting, its losses, its cost, what the maps found, and attention's weights."""
        assert isinstance(self.model, TrainedHeads)
        assert self.maps is not None
        shape = self.model.shape
        found = {"embeddings": {"blocks": list(shape.widths), **self.maps.facts}, "cost": shape.cost()}
        return {**super().report(names), **found, **self.head_report}

    def _maps_of(self, outputs: MemberOutputs) -> EmbeddingMaps:
        return embedding_maps.concatenated(outputs.embeddings)

    def _seen(self, outputs: MemberOutputs) -> MemberOutputs:
        assert self.maps is not None, "not fitted"
        return MemberOutputs(outputs.logits, self.maps.apply(outputs.embeddings))

    def _of_members(self, seen: MemberOutputs) -> dict[str, Any]:
        return {}

    def _module(self) -> nn.Module:
        from utils.combiners.fusion_heads import MeanOfHeads

        assert isinstance(self.model, TrainedHeads)
        return MeanOfHeads(self.model.modules())

    def _arrays(self) -> dict[str, np.ndarray]:
        assert isinstance(self.model, TrainedHeads)
        assert self.maps is not None
        shape = self.model.shape
        found = {f"maps/{name}": values for name, values in self.maps.state().items()}
        found["shape"] = np.array([shape.classes, shape.rank, len(shape.widths), *shape.widths, *shape.hidden])
        for place, weights in enumerate(self.model.weights):
            found |= {f"heads/{place:03d}/{name}": values for name, values in weights.items()}
        return found

    def set_fitted_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set the heads, temperature, share and maps."""
        super().set_fitted_arrays(arrays)
        self.maps = EmbeddingMaps.from_state(sub_state(arrays, "maps/"))

    @classmethod
    def _model(cls, state: Mapping[str, np.ndarray]) -> Model:
        classes, rank, blocks, *rest = state["shape"].tolist()
        shape = HeadShape(cls.method, tuple(rest[:blocks]), tuple(rest[blocks:]), classes, rank)
        starts = sorted({name[: len("heads/000/")] for name in state if name.startswith("heads/")})
        return TrainedHeads(shape, tuple(sub_state(state, start) for start in starts))


class FusionConcat(FusionStacker):
    """A perceptron on all embeddings side by side."""

    method = "concat_mlp"


class FusionAttention(FusionStacker):
    """Members as tokens, weighed for each image; a member may be absent."""

    method = "attention"

    def predict_proba(self, outputs: MemberOutputs, present: np.ndarray | None = None) -> np.ndarray:
        """Outputs (M, N, C) -> probabilities (N, C); of the members that are `present` (N, M), each row with one."""
        if present is None:
            return super().predict_proba(outputs)
        assert isinstance(self.model, TrainedHeads)
        said = self.model.predict_proba(self._seen(outputs), present)
        own = np.where(present.T[:, :, None], softmax(np.where(present.T[:, :, None], outputs.logits, 0)), 0)
        return self.calibration.apply(said, own.sum(axis=0) / present.sum(axis=1, keepdims=True))

    def _of_members(self, seen: MemberOutputs) -> dict[str, Any]:
        assert isinstance(self.model, TrainedHeads)
        weights = self.model.attention(seen).mean(axis=0)
        return {"weights": dict(zip(self.names, weights.tolist(), strict=True))}


class FusionBilinear(FusionStacker):
    """Products of every two members' embeddings through maps of low rank."""

    method = "bilinear"


class FusionShared(FusionStacker):
    """A perceptron on what the members' embeddings have in common (generalised CCA)."""

    method = "cca_aligned"

    def _maps_of(self, outputs: MemberOutputs) -> EmbeddingMaps:
        return embedding_maps.shared_variates(outputs.embeddings)


COMBINERS: dict[str, type[Combiner]] = {
    f"fusion_{kind.method}": kind for kind in (FusionConcat, FusionAttention, FusionBilinear, FusionShared)
}
