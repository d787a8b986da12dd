"""Changes from the workspace's test split to an external set: scores, classes, calibration, guarantees, OOD scores.

The two are independent samples, so that the interval of a difference follows from the intervals of both values,
regardless of their method: the square of its half-width is the sum of the squares of theirs on the same side (Newcombe
1998, method 10; Zou and Donner 2008). For two accuracies with Wilson intervals this is Newcombe's interval. Groups
count like in the intervals of the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.evaluation.evaluation_inputs import EvaluationInputs
from utils.evaluation.scoring import ScoredModel
from utils.numeric.areas import mean_areas
from utils.numeric.delong import influence_variance
from utils.numeric.means import LEVEL
from utils.numeric.proportions import proportion_interval, wilson_interval
from utils.numeric.uncertainty import MIN_ENERGY_RANGE, ood_scores
from utils.predictions import fold_networks

METRICS = ("accuracy", "f1_macro", "log_loss", "brier", "ece", "roc_auc_ovr_macro")
Interval = Sequence[float] | None


def change(external: float, bounds: Interval, test: float, test_bounds: Interval) -> dict[str, Any]:
    """`{test, external, change, ci95}` of one value; the change is external minus test; no interval without both."""
    difference = external - test
    interval = None
    if bounds is not None and test_bounds is not None:
        below = ((external - bounds[0]) ** 2 + (test_bounds[1] - test) ** 2) ** 0.5
        above = ((bounds[1] - external) ** 2 + (test - test_bounds[0]) ** 2) ** 0.5
        interval = [difference - below, difference + above]
    return {"test": test, "external": external, "change": difference, "ci95": interval}


def changes(external: Mapping[str, Any], test: Mapping[str, Any]) -> dict[str, Any]:
    """{metric: change} between two `metrics.json` of one model; metrics that either lacks are omitted."""
    return {
        name: change(external[name], external["ci95"].get(name), test[name], test["ci95"].get(name))
        for name in METRICS
        if external[name] is not None and test[name] is not None
    }


def class_changes(
    model: ScoredModel, inputs: EvaluationInputs, test_model: ScoredModel, test_inputs: EvaluationInputs
) -> list[dict[str, Any]]:
    """The change in recall of every class with rows on both sides, largest drop first.

    `{class, support, test_support, test, external, change, ci95, drops}`; a class `drops` if its interval is below 0 at
    the simultaneous level of all classes (Bonferroni).
    """
    classes = inputs.rows.classes
    shared = [
        index
        for index in range(len(classes))
        if (inputs.rows.labels == index).any() and (test_inputs.rows.labels == index).any()
    ]
    level = 1 - (1 - LEVEL) / max(1, len(shared))
    entries = []
    for index in shared:
        hits, groups = _hits_of_class(model, inputs, index)
        test_hits, test_groups = _hits_of_class(test_model, test_inputs, index)
        figures = float(hits.mean()), float(test_hits.mean())
        entry, at_level = (
            change(
                figures[0],
                proportion_interval(hits, groups, level=each),
                figures[1],
                proportion_interval(test_hits, test_groups, level=each),
            )
            for each in (LEVEL, level)
        )
        drops = at_level["ci95"] is not None and at_level["ci95"][1] < 0
        counts = {"support": len(hits), "test_support": len(test_hits)}
        entries.append({"class": classes[index], **counts, **entry, "drops": drops})
    return sorted(entries, key=lambda entry: (entry["change"], entry["class"]))


def _hits_of_class(model: ScoredModel, inputs: EvaluationInputs, index: int) -> tuple[np.ndarray, np.ndarray | None]:
    of_class = inputs.rows.labels == index
    hits = model.probabilities[of_class].argmax(axis=1) == index
    return hits, None if inputs.groups is None else inputs.groups[of_class]


def promises(external: Mapping[str, Any], test: Mapping[str, Any]) -> dict[str, Any]:
    """Nominal guarantees of thresholds fitted on val rows, and their empirical values on test and on the external set.

    `conformal`: {kind: {promised, test, external, mean_size, test_mean_size}}; `selective`: {threshold, target_risk,
    test: {answered, error}, external: the same}. None without a guarantee.
    """
    sets, test_sets = external["conformal"], test["conformal"]
    selective, test_selective = external["selective"], test["selective"]
    return {
        "conformal": None
        if sets is None or test_sets is None
        else {
            kind: {
                "promised": 1 - entry["alpha"],
                "test": test_sets[kind]["coverage"],
                "external": entry["coverage"],
                "test_mean_size": test_sets[kind]["mean_size"],
                "mean_size": entry["mean_size"],
            }
            for kind, entry in sets.items()
        },
        "selective": None
        if selective["threshold"] is None
        else {
            "threshold": selective["threshold"],
            "target_risk": selective["target_risk"],
            "test": {key: test_selective[key] for key in ("answered", "error")},
            "external": {key: selective[key] for key in ("answered", "error")},
        },
    }


def ood_areas(
    model: ScoredModel, inputs: EvaluationInputs, test_inputs: EvaluationInputs
) -> dict[str, dict[str, Any]] | None:
    """Area under the ROC curve of each OOD score for separating external rows from rows of the workspace's test split.

    {energy, max_logit: {auroc, ci95}} of mean scores over the members' full networks; the interval is Wilson's with the
    effective number of rows that gives DeLong's variance (1988), with groups as units. At 0.5 the score does not
    separate them. None for models without logits.
    """
    if model.inference != fold_networks.FULL or not model.members:
        return None
    sides = [_mean_scores(model, side) for side in (inputs, test_inputs)]
    if np.ptp(np.concatenate([side[0] for side in sides])) < MIN_ENERGY_RANGE:
        return None
    truth = np.repeat([1, 0], [side.shape[1] for side in sides])
    groups = _joined_groups(inputs, test_inputs)
    areas = {}
    for name, values in zip(("energy", "max_logit"), np.concatenate(sides, axis=1), strict=True):
        areas_of_score = mean_areas(np.stack([-values, values], axis=1), truth)
        area = areas_of_score.roc_auc
        assert area is not None, "both sides have rows"
        variance = influence_variance(areas_of_score.roc_auc_influence, truth, groups)
        rows = area * (1 - area) / variance if variance > 0 else min(np.bincount(truth))
        areas[name] = {"auroc": area, "ci95": list(wilson_interval(area, max(float(rows), 1.0)))}
    return areas


def _mean_scores(model: ScoredModel, inputs: EvaluationInputs) -> np.ndarray:
    """Mean OOD scores (2, N) over a model's members on all rows."""
    rows = inputs.rows
    scores = [ood_scores(rows.logits[rows.members.index(name)]) for name in model.members]
    mean: np.ndarray = np.mean(scores, axis=0)
    return mean


def _joined_groups(inputs: EvaluationInputs, test_inputs: EvaluationInputs) -> np.ndarray | None:
    """Groups of the rows of both sides, which share none; None if all rows are independent."""
    if inputs.groups is None and test_inputs.groups is None:
        return None
    first, second = (
        np.arange(len(side.rows.labels)) if side.groups is None else side.groups for side in (inputs, test_inputs)
    )
    return np.concatenate([first, second + int(first.max()) + 1])
