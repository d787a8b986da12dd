"""An evaluation restricted to some classes: rows of other classes are removed, probabilities renormalised.

Calibration rows are restricted too, so that the guarantees of thresholds apply to these classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from utils.building.ensembles import Crossfit
from utils.evaluation.evaluation_inputs import EvaluationInputs
from utils.evaluation.scoring import ScoredModel
from utils.numeric.metrics import SMALLEST_PROBABILITY
from utils.predictions.rows import MemberRows


def rows_of_classes(inputs: EvaluationInputs, classes: Sequence[str]) -> EvaluationInputs:
    """The inputs with only the rows of these classes; all classes can still be predicted."""
    kept = [index for index, name in enumerate(inputs.rows.classes) if name in set(classes)]
    rows = np.flatnonzero(np.isin(inputs.rows.labels, kept))

    def of_model(model: ScoredModel) -> ScoredModel:
        disagreement = None if model.disagreement is None else model.disagreement[rows]
        return replace(model, probabilities=model.probabilities[rows], disagreement=disagreement)

    return replace(
        inputs,
        rows=inputs.rows.take(rows),
        groups=None if inputs.groups is None else inputs.groups[rows],
        models=[of_model(model) for model in inputs.models],
    )


def restricted(inputs: EvaluationInputs, classes: Sequence[str]) -> EvaluationInputs:
    """The inputs as if the models had only these classes, in the order of the workspace."""
    inputs = rows_of_classes(inputs, classes)
    all_classes = inputs.rows.classes
    kept = np.array([index for index, name in enumerate(all_classes) if name in set(classes)])
    new_index = np.full(len(all_classes) + 1, -1)  # the last entry is for rows without a label
    new_index[kept] = np.arange(len(kept))
    names, rows = tuple(all_classes[index] for index in kept), inputs.rows

    def of_member(part: MemberRows) -> MemberRows:
        part = part.take(np.flatnonzero(new_index[part.labels] >= 0))
        return replace(part, classes=names, logits=part.logits[:, kept], labels=new_index[part.labels])

    def of_crossfit(crossfit: Crossfit) -> Crossfit:
        labelled = new_index[crossfit.labels] >= 0
        return Crossfit(
            restricted_probabilities(crossfit.probabilities[labelled], kept),
            new_index[crossfit.labels[labelled]],
            crossfit.sample_ids[labelled],
            crossfit.split[labelled],
            crossfit.fold[labelled],
        )

    out_of_sample = {name: [of_member(part) for part in parts] for name, parts in inputs.out_of_sample.items()}
    return replace(
        inputs,
        rows=replace(rows, classes=names, labels=new_index[rows.labels], logits=rows.logits[:, :, kept]),
        models=[
            replace(model, probabilities=restricted_probabilities(model.probabilities, kept)) for model in inputs.models
        ],
        out_of_sample={name: [part for part in parts if len(part.labels)] for name, parts in out_of_sample.items()},
        crossfits={name: of_crossfit(crossfit) for name, crossfit in inputs.crossfits.items()},
    )


def restricted_probabilities(probabilities: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Probabilities (N, K) of some columns of (N, C), renormalised."""
    some = np.maximum(probabilities[:, columns].astype(np.float64), SMALLEST_PROBABILITY)
    renormalised: np.ndarray = some / some.sum(axis=1, keepdims=True)
    return renormalised
