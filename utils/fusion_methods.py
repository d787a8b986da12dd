"""Feature fusion: heads on the members' embeddings, mixed with the mean of the members' probabilities.

A fusion is a stacker whose features are embeddings: epochs, rank of products, temperature and the weight of the mean
are selected on held-out rows. Centres, principal axes and shared variates are fitted on all rows, without labels, once
for all cross-fitted copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from utils.combiners import embedding_maps
from utils.combiners.embedding_maps import EmbeddingMaps
from utils.combiners.fusion_learner import HeadLearner
from utils.combiners.protocol import Combiner, MemberFacts, NestedPredictions, mixed_by_fold, sub_state, unsaved
from utils.combiners.trained_heads import HeadShape, TrainedHeads
from utils.core.config import Config
from utils.core.errors import UserError
from utils.numeric.metrics import log_loss, softmax
from utils.numeric.nested_cv import inner_folds
from utils.predictions.rows import MemberOutputs
from utils.stacking_methods import Calibration, Learner, Model, Stacker, mean_probabilities

if TYPE_CHECKING:
    from torch import nn


@dataclass
class FusionStacker(Stacker):
    """Base class of fusions; a subclass defines its head and the maps of embeddings to its inputs."""

    settings: ClassVar[tuple[str, ...]] = (
        *("runs.fusion.fusion_config", "runs.fusion.label_smoothing", "runs.fusion.seeds"),
        *("runs.fusion.train_embeddings", "runs.score_ensemble.temperature", "runs.stacking.fallback"),
    )
    reads_embeddings: ClassVar[bool] = True
    method: ClassVar[str]
    """Name of the head in `runs.fusion.fusion_methods`."""

    names: tuple[str, ...] = unsaved(())
    """Names of the members, for messages."""
    maps: EmbeddingMaps | None = unsaved()
    head_report: dict[str, Any] = unsaved(factory=dict)
    """Facts of the fitted head about its members, for the report."""

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """Return an unfitted fusion with the settings of `runs.fusion` and as many jobs as there are cores."""
        fusion = super().configured(config, members)
        fusion.names = members.names
        return fusion

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

    def _fit_nested(self, outputs: MemberOutputs, labels: np.ndarray, folds: np.ndarray) -> NestedPredictions:
        """Fit on outputs (M, N, C), labels (N,), folds (N,) as a stacker does.

        Raises UserError for embeddings that are not finite.
        """
        for name, embeddings in zip(self.names, outputs.embeddings, strict=True):
            columns, n_columns = np.flatnonzero(~np.isfinite(embeddings).all(axis=0)), embeddings.shape[1]
            if columns.size:
                raise UserError(
                    f"member {name}: {columns.size} of {n_columns} columns of its embeddings hold NaN or infinity, "
                    f"first column {columns[0]}. Leave it out: --set backbones.exclude=[{name}]; or repair the "
                    "embeddings"
                )
        self.maps = self._fit_maps(outputs)
        mapped = self.mapped_outputs(outputs)
        nested = super()._fit_nested(mapped, labels, folds)
        self.head_report = self._report_members(mapped)
        return nested

    def _predict_proba(self, outputs: MemberOutputs) -> np.ndarray:
        """Return probabilities (N, C) for outputs (M, N, C)."""
        return self._predict(self.mapped_outputs(outputs))

    def _to_module(self) -> nn.Module:
        """Return the torch module: logits (B, M, C) and M embeddings (B, D_m) -> probabilities (B, C)."""
        from utils.combiners.fusion_heads import FusedEmbeddings

        return FusedEmbeddings(self.maps_module(), self._learner_module(), *astuple(self.calibration))

    def maps_module(self) -> nn.Module:
        """Return the torch module that maps the members' embeddings to the heads' inputs."""
        assert self.maps is not None, "not fitted"
        return self.maps.module()

    def heads_to_train(self) -> list[nn.Module]:
        """Return the fitted heads, one per seed, with dropout and gradients."""
        assert isinstance(self.model, TrainedHeads)
        assert isinstance(self.learner, HeadLearner)
        return [head.requires_grad_(True) for head in self.model.modules(self.learner.dropout)]

    def retrained(
        self, heads: Sequence[Mapping[str, np.ndarray]], outputs: MemberOutputs, labels: np.ndarray, folds: np.ndarray
    ) -> np.ndarray:
        """Set weights of heads that were trained elsewhere, and calibrate again.

        Temperature and weight of the mean are fitted on outputs (M, N, C), labels (N,), folds (N,) that neither heads
        nor networks were fitted on, and used only if they lower the held-out log-loss. Returns cross-fitted
        probabilities (N, C).
        """
        assert isinstance(self.model, TrainedHeads)
        self.model = TrainedHeads(self.model.shape, tuple(dict(weights) for weights in heads))
        self._set_uniform_weight(labels, outputs)
        mapped = self.mapped_outputs(outputs)
        probabilities, mean = self.model.predict_proba(mapped), mean_probabilities(mapped)
        crossfit = np.empty_like(probabilities)
        for fold in np.unique(folds):
            inside = folds == fold
            others = inner_folds(labels, folds, ~inside)
            calibration = self._calibrate(probabilities[~inside], mean[~inside], labels[~inside], others)
            crossfit[inside] = calibration.apply(probabilities[inside], mean[inside])
        # On few rows with hardly any error the fitted temperature is near 0, so that one error on other rows is costly.
        is_better = log_loss(crossfit, labels) < log_loss(probabilities, labels)
        all_rows = inner_folds(labels, folds, np.ones(len(labels), dtype=bool))
        self.calibration = self._calibrate(probabilities, mean, labels, all_rows) if is_better else Calibration()
        self.head_report = self._report_members(mapped)
        selection_score = log_loss(self._mixed(self.calibration.apply(probabilities, mean)), labels)
        self.facts = {**self.facts, "selection_score": selection_score}
        return mixed_by_fold(crossfit if is_better else probabilities, folds)

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return the selected setting, its losses and cost, facts about the maps, and attention weights."""
        assert isinstance(self.model, TrainedHeads)
        assert self.maps is not None
        shape = self.model.shape
        facts = {"embeddings": {"blocks": list(shape.widths), **self.maps.facts}, "cost": shape.cost()}
        return {**super().report(names), **facts, **self.head_report}

    def _fit_maps(self, outputs: MemberOutputs) -> EmbeddingMaps:
        return embedding_maps.concatenated(outputs.embeddings)

    def mapped_outputs(self, outputs: MemberOutputs) -> MemberOutputs:
        """Return the outputs with the embeddings that the heads read."""
        assert self.maps is not None, "not fitted"
        return MemberOutputs(outputs.logits, self.maps.apply(outputs.embeddings))

    def _report_members(self, mapped: MemberOutputs) -> dict[str, Any]:
        return {}

    def _learner_module(self) -> nn.Module:
        from utils.combiners.fusion_heads import MeanOfHeads

        assert isinstance(self.model, TrainedHeads)
        return MeanOfHeads(self.model.modules())

    def _arrays(self) -> dict[str, np.ndarray]:
        assert isinstance(self.model, TrainedHeads)
        assert self.maps is not None
        shape = self.model.shape
        arrays = {f"maps/{name}": values for name, values in self.maps.state().items()}
        arrays["shape"] = np.array([shape.classes, shape.rank, len(shape.widths), *shape.widths, *shape.hidden])
        for index, weights in enumerate(self.model.weights):
            arrays |= {f"heads/{index:03d}/{name}": values for name, values in weights.items()}
        return arrays

    def set_fitted_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set the heads, temperature, weight and maps."""
        super().set_fitted_arrays(arrays)
        self.maps = EmbeddingMaps.from_state(sub_state(arrays, "maps/"))

    @classmethod
    def _model(cls, state: Mapping[str, np.ndarray]) -> Model:
        classes, rank, blocks, *rest = state["shape"].tolist()
        shape = HeadShape(cls.method, tuple(rest[:blocks]), tuple(rest[blocks:]), classes, rank)
        prefixes = sorted({name[: len("heads/000/")] for name in state if name.startswith("heads/")})
        return TrainedHeads(shape, tuple(sub_state(state, prefix) for prefix in prefixes))


class FusionConcat(FusionStacker):
    """A perceptron on the concatenated embeddings."""

    method = "concat_mlp"


class FusionAttention(FusionStacker):
    """Attention over the members as tokens; a member may be absent."""

    method = "attention"

    def predict_present(self, outputs: MemberOutputs, present: np.ndarray) -> np.ndarray:
        """Return probabilities (N, C) for outputs (M, N, C) of the members `present` (N, M), at least one per row."""
        assert isinstance(self.model, TrainedHeads)
        probabilities = self.model.predict_proba(self.mapped_outputs(outputs), present)
        is_present = present.T[:, :, None]
        members = np.where(is_present, softmax(np.where(is_present, outputs.logits, 0)), 0)
        mean = members.sum(axis=0) / present.sum(axis=1, keepdims=True)
        return self._mixed(self.calibration.apply(probabilities, mean))

    def _report_members(self, mapped: MemberOutputs) -> dict[str, Any]:
        assert isinstance(self.model, TrainedHeads)
        weights = self.model.attention(mapped).mean(axis=0)
        return {"weights": dict(zip(self.names, weights.tolist(), strict=True))}


class FusionBilinear(FusionStacker):
    """Low-rank bilinear products of the pairs of members' embeddings."""

    method = "bilinear"


class FusionShared(FusionStacker):
    """A perceptron on the variates that the members' embeddings share (generalised CCA)."""

    method = "cca_aligned"

    def _fit_maps(self, outputs: MemberOutputs) -> EmbeddingMaps:
        return embedding_maps.shared_variates(outputs.embeddings)


COMBINERS: dict[str, type[Combiner]] = {
    f"fusion_{kind.method}": kind for kind in (FusionConcat, FusionAttention, FusionBilinear, FusionShared)
}
