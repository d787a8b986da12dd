"""The context shared by the records of one evaluation, and the out-of-sample predictions of each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from utils.evaluation.calibrated_scores import CalibratedLosses
from utils.evaluation.evaluation_inputs import EvaluationInputs
from utils.evaluation.scoring import ScoredModel
from utils.numeric import uncertainty
from utils.numeric.areas import MeanAreas, mean_areas
from utils.numeric.metrics import softmax
from utils.numeric.statistics import Floats, bootstrap_metrics
from utils.predictions.rows import UNKNOWN, MemberRows


@dataclass(frozen=True)
class OutOfSamplePredictions:
    """Predictions of one model on labelled out-of-sample rows: out-of-fold or cross-fitted, and val rows."""

    probabilities: np.ndarray
    """(N, C)"""
    labels: np.ndarray
    """int64 (N,)"""
    split: np.ndarray
    """unicode (N,)"""
    sample_ids: np.ndarray
    """unicode (N,)"""
    folds: np.ndarray | None = None
    """int64 (N,): the fold in which each row was held out, -1 for val rows of a member; None without folds"""

    def keys(self) -> list[tuple[str, str]]:
        """Return (split, sample id) of each row."""
        return list(zip(self.split.tolist(), self.sample_ids.tolist(), strict=True))

    def of_val(self) -> OutOfSamplePredictions | None:
        """Return the val rows; None if there are none."""
        rows = self.split == "val"
        if not rows.any():
            return None
        return OutOfSamplePredictions(
            self.probabilities[rows], self.labels[rows], self.split[rows], self.sample_ids[rows]
        )


def out_of_sample_predictions(inputs: EvaluationInputs, name: str) -> OutOfSamplePredictions | None:
    """Return an ensemble's cross-fitted predictions, or a member's labelled out-of-sample rows; None without any."""
    if name in inputs.crossfits:
        crossfit = inputs.crossfits[name]
        return OutOfSamplePredictions(
            crossfit.probabilities, crossfit.labels, crossfit.split, crossfit.sample_ids, crossfit.fold
        )
    return _of_member(inputs.out_of_sample[name])


def _of_member(parts: Sequence[MemberRows]) -> OutOfSamplePredictions | None:
    if not parts:
        return None
    labels = np.concatenate([np.asarray(part.labels) for part in parts])
    labelled = labels != UNKNOWN
    folds = None
    if any(part.fold is not None for part in parts):
        part_folds = [np.full(len(part.labels), -1) if part.fold is None else part.fold for part in parts]
        folds = np.concatenate(part_folds)[labelled]
    return OutOfSamplePredictions(
        np.concatenate([softmax(np.asarray(part.logits)) for part in parts])[labelled],
        labels[labelled],
        np.concatenate([np.full(len(part.labels), part.split) for part in parts])[labelled],
        np.concatenate([np.asarray(part.sample_ids) for part in parts])[labelled],
        folds,
    )


class EvaluationContext:
    """Shared by the records of one evaluation: inputs, reference models, bootstrap samples and OOD scores."""

    def __init__(
        self, inputs: EvaluationInputs, models: Sequence[ScoredModel], references: Mapping[str, ScoredModel | None]
    ) -> None:
        """`models` are those that get a record, `references` {vs_best_single, vs_soft_voting: reference model}."""
        self.inputs, self.references = inputs, references
        self.index = {id(model): number for number, model in enumerate(models)}
        probabilities = [model.probabilities for model in models]
        settings, rows = inputs.settings, inputs.rows
        self.samples = bootstrap_metrics(probabilities, rows.labels, groups=inputs.groups, seed=settings.seed)
        self._ood_scores: dict[tuple[str, str], tuple[np.ndarray, Floats]] = {}
        self._areas: dict[int, MeanAreas] = {}
        self.calibrated = CalibratedLosses(rows.labels, inputs.groups, self._fits_temperature)

    def _fits_temperature(self, model: ScoredModel) -> OutOfSamplePredictions | None:
        """Return the rows that fit a model's temperature; None without any, and if they include the evaluated split."""
        inputs = self.inputs
        has_rows = model.name in inputs.crossfits or model.name in inputs.out_of_sample
        if inputs.split == "val" or model.provenance.unknown_training_data or not has_rows:
            return None
        return out_of_sample_predictions(inputs, model.name)

    def areas(self, model: ScoredModel) -> MeanAreas:
        """Return the mean areas under a model's curves, with the influence of each row; computed once."""
        if id(model) not in self._areas:
            self._areas[id(model)] = mean_areas(model.probabilities, self.inputs.rows.labels)
        return self._areas[id(model)]

    def ood_scores(self, names: Sequence[str], split: str) -> tuple[np.ndarray, Floats]:
        """Return the sample ids (N,) that all members share, and the mean of their `uncertainty.ood_scores` (2, N)."""
        parts = [self._of_network(name, split) for name in names]
        shared = list(set.intersection(*(set(ids.tolist()) for ids, _ in parts)))
        mean: Floats = np.mean([values[:, np.isin(ids, shared)] for ids, values in parts], axis=0)
        first = parts[0][0]
        return first[np.isin(first, shared)], mean

    def _of_network(self, name: str, split: str) -> tuple[np.ndarray, Floats]:
        """Return sample ids (N,) and OOD scores (2, N) of one member's full network, computed once."""
        if (name, split) not in self._ood_scores:
            rows = self.inputs.rows
            ids, logits = rows.sample_ids, rows.logits[rows.members.index(name)]
            if split != self.inputs.split:
                part = self.inputs.val_rows(name)
                assert part is not None, f"{name} has no val rows"
                ids, logits = np.asarray(part.sample_ids), np.asarray(part.logits)
            self._ood_scores[name, split] = ids, uncertainty.ood_scores(logits)
        return self._ood_scores[name, split]


def no_out_of_sample_rows(model: ScoredModel) -> str:
    """Return why a model has no out-of-sample rows."""
    unknown = model.provenance.unknown_training_data
    if unknown:
        return f"the training data of {', '.join(unknown)} is not stated, so no row is known to be out of sample"
    return "it was trained on all train and val rows"
