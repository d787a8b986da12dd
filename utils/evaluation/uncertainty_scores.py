"""Scores of a model's uncertainty: prediction sets, selective risk, disagreement, out-of-distribution (OOD) scores."""

from __future__ import annotations

from typing import Any

from utils.evaluation.evaluation_context import EvaluationContext, OutOfSamplePredictions, no_out_of_sample_rows
from utils.evaluation.scoring import ScoredModel
from utils.numeric import selective, uncertainty
from utils.numeric.means import MIN_UNITS, count_units
from utils.numeric.uncertainty import LabelledRows
from utils.predictions import fold_networks


def uncertainty_scores(
    model: ScoredModel, predictions: OutOfSamplePredictions | None, context: EvaluationContext, notes: dict[str, str]
) -> dict[str, Any]:
    """Return `conformal`, `selective`, `mutual_information` and `out_of_distribution`.

    `conformal_by_class` is added on request. The reasons for null values are added to `notes`.
    """
    inputs = context.inputs
    options, rows, split = inputs.settings.options, inputs.rows, inputs.split
    evaluated_keys = zip(rows.split.tolist(), rows.sample_ids.tolist(), strict=True)
    evaluated = LabelledRows(model.probabilities, rows.labels, inputs.uniforms(evaluated_keys), inputs.groups)
    val = None if split == "val" or predictions is None else predictions.of_val()
    calibration = None
    record: dict[str, Any] = {"conformal": None}
    reason = "it has no out-of-sample val rows" if predictions is not None else no_out_of_sample_rows(model)
    if split == "val":
        reason = "val rows calibrate the sets, so they cannot measure them"
    if val is not None:
        groups = inputs.groups_of(val.keys())
        calibration = LabelledRows(val.probabilities, val.labels, inputs.uniforms(val.keys()), groups)
        sets = {
            kind: uncertainty.conformal_metrics(kind, calibration, evaluated, alpha=options.alpha)
            for kind in uncertainty.NONCONFORMITY_SCORES
        }
        n, needed = count_units(len(val.labels), groups), uncertainty.min_calibration_rows(options.alpha)
        unit = "rows" if groups is None else "groups"
        reason = f"too few {unit}: {n} val {unit}, and an alpha of {options.alpha:g} needs {needed}"
        record["conformal"] = sets if all(sets.values()) else None
        if options.class_conditional:
            record["conformal_by_class"] = {
                kind: uncertainty.class_conditional_metrics(
                    kind, calibration, evaluated, rows.classes, alpha=options.alpha
                )
                for kind in uncertainty.NONCONFORMITY_SCORES
            }
        if record["conformal"] and (groups is not None or inputs.groups is not None):
            notes["conformal.coverage_interval"] = "rows come in groups, for which its distribution is not known"
    if record["conformal"] is None:
        notes["conformal"] = reason
    record["selective"] = selective.selective_metrics(
        (model.probabilities, rows.labels),
        None if calibration is None else (calibration.probabilities, calibration.labels),
        target_risk=options.target_risk,
        groups=None if calibration is None else calibration.groups,
    )
    if record["selective"]["threshold"] is None:
        notes["selective.threshold"] = (
            f"val rows do not establish an error rate of {options.target_risk:g} or below with "
            f"{selective.CONFIDENCE:.0%} confidence; {selective.min_rows(options.target_risk)} rows without an error do"
            if calibration is not None
            else reason
        )
    record["mutual_information"] = None if model.disagreement is None else float(model.disagreement.mean())
    if model.disagreement is None:
        notes["mutual_information"] = "a single member does not disagree"
    record["out_of_distribution"] = _out_of_distribution(model, context, notes)
    return record


def _out_of_distribution(
    model: ScoredModel, context: EvaluationContext, notes: dict[str, str]
) -> dict[str, Any] | None:
    """Return the fraction of rows with higher OOD scores than 95% of the val rows, for two scores."""
    inputs = context.inputs
    reason = "its members' predictions are log-probabilities, from which OOD scores cannot be computed"
    summary = None
    if inputs.split == "val":
        reason = "val rows are the reference for OOD scores"
    elif any(inputs.val_rows(name) is None for name in model.members):
        reason = "it has no out-of-sample val rows"
    elif model.inference == fold_networks.FULL:
        _, scores = context.ood_scores(model.members, inputs.split)
        sample_ids, reference = context.ood_scores(model.members, "val")
        groups = inputs.groups_of(("val", sample_id) for sample_id in sample_ids.tolist())
        if uncertainty.has_too_few_groups(len(sample_ids), groups):
            n_groups = count_units(len(sample_ids), groups)
            reason = f"{n_groups} groups of val rows are too few for a reference, which needs {MIN_UNITS}"
        summary = uncertainty.ood_summary(scores, reference, groups)
    if summary is None:
        notes["out_of_distribution"] = reason
        return None
    limits = "an indication, not a test: networks can be confident on unfamiliar images, and some shifts do not show"
    return summary | {"limits": limits}
