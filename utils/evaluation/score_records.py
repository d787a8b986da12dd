"""`metrics.json` of one member or ensemble: scores with intervals, comparisons, cost, uncertainty and provenance.

Every key is always present; a value that could not be measured is null, with the reason in `notes`.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from utils.building.latency import Timing, highest_busy
from utils.distillation import controls
from utils.evaluation import evaluated_rows
from utils.evaluation.class_scores import add_class_scores, fold_scores
from utils.evaluation.evaluation_context import (
    EvaluationContext,
    OutOfSamplePredictions,
    no_out_of_sample_rows,
    out_of_sample_predictions,
)
from utils.evaluation.evaluation_inputs import EvaluationInputs
from utils.evaluation.scoring import ScoredModel
from utils.evaluation.uncertainty_scores import uncertainty_scores
from utils.numeric import proportions
from utils.numeric.areas import MeanAreas
from utils.numeric.calibration_chance import chance_ece
from utils.numeric.delong import compare_areas
from utils.numeric.means import MIN_ERRORS, MIN_UNITS, count_units, mean_interval, paired_interval
from utils.numeric.metric_intervals import metric_intervals
from utils.numeric.metrics import log_loss_per_row, point_metrics
from utils.numeric.statistics import REPLICATES
from utils.predictions import fold_networks
from utils.predictions.catalog import IMPORTED

COPIED_KEYS = ("expected_experts",)
"""Keys of `ensemble.json` that are copied to `metrics.json` if they are present"""


def metrics_record(model: ScoredModel, context: EvaluationContext) -> dict[str, Any]:
    """Return the `metrics.json` of a model."""
    inputs = context.inputs
    rows, groups = inputs.rows, inputs.groups
    record = point_metrics(model.probabilities, rows.labels, rows.classes)
    notes: dict[str, str] = record.pop("notes")
    units = count_units(len(rows.labels), groups)
    samples = {name: values[context.index[id(model)]] for name, values in context.samples.items()}
    record["ci95"], reason = metric_intervals(record, samples, model.probabilities, rows.labels, groups)
    notes |= {"ci95": reason} if reason else {}
    add_class_scores(record, model.probabilities, rows.labels, groups, notes)
    record |= context.calibrated.entries(model)
    if record["calibrated_log_loss"] is None:
        is_val = inputs.split == "val"
        reason = "val rows fit the temperature, so they cannot measure it" if is_val else no_out_of_sample_rows(model)
        notes |= dict.fromkeys(("calibrated_log_loss", "calibration_temperature"), reason)
    record["ece_by_chance"] = chance_ece(model.probabilities, rows.labels, groups)
    for key, reference in context.references.items():
        record[key] = _compared(model, reference, context)
        if record[key] is None:
            notes[key] = f"this is {model.name}" if reference is not None else "it has no predictions on these rows"
        elif record[key]["delta_ci95"] is None:
            needed, unit = proportions.MIN_DIFFERING, "rows" if groups is None else "groups"
            differing = f"the two differ in fewer than {needed} {unit}; the interval of an accuracy needs {needed}"
            notes[key] = differing if units >= MIN_UNITS else f"{units} {unit}; an interval needs {MIN_UNITS}"
    saved = inputs.ensembles[model.name].record if model.kind == "ensemble" else None
    unknown = model.provenance.unknown_training_data
    predictions = None if unknown else out_of_sample_predictions(inputs, model.name)
    if model.name in inputs.controls:
        comparison, reasons = controls.control_metrics(
            inputs.controls[model.name], inputs.split, rows.sample_ids.tolist(), model.probabilities, groups
        )
        record, notes = record | comparison, notes | reasons
    fitted, selected = (
        evaluated_rows.count_overlap(row_sets, rows)
        for row_sets in (model.provenance.fitted_on, model.provenance.selected_on)
    )
    record |= {
        "name": model.name,
        "split": inputs.split,
        "bootstrap": {"replicates": REPLICATES, "unit": "row" if groups is None else "group", "units": units},
        "members": list(model.members),
        "weights": _weights(model, saved, notes),
        "latency_ms": _latency(model, inputs, notes),
        "size_mb": _size_mb(model, inputs, notes),
        "crossfit": None if predictions is None else _crossfit(predictions, inputs.groups_of(predictions.keys())),
        "folds": None if predictions is None else _folds(predictions),
        **uncertainty_scores(model, predictions, context, notes),
        "fitted_on": [part.as_record() for part in model.provenance.fitted_on],
        "selected_on": [part.as_record() for part in model.provenance.selected_on],
        "contaminated": fitted > 0,
        "optimistic": selected > 0,
        "unknown_training_data": list(unknown),
        "overlap": {"fitted": fitted, "selected": selected, "dropped": inputs.dropped},
        "config_digest": saved["config_digest"] if saved else None,
        "seed": inputs.settings.seed,
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "notes": notes,
        **{key: saved[key] for key in COPIED_KEYS if saved and key in saved},
    }
    if predictions is None:
        notes["crossfit"] = no_out_of_sample_rows(model)
    if record["folds"] is None:
        notes["folds"] = "it has no predictions of two folds or more" if predictions else no_out_of_sample_rows(model)
    if saved is None:
        notes["config_digest"] = "a member does not depend on the configuration"
    if not inputs.catalog.has_images:
        notes["overlap.dropped"] = "without images, equal samples under two names cannot be recognised"
    return record


def _compared(model: ScoredModel, reference: ScoredModel | None, context: EvaluationContext) -> dict[str, Any] | None:
    """Return differences to a reference on the same rows, with paired intervals and an exact test over rows or groups.

    `mcnemar_p` repeats the p-value if rows are independent, where the test is McNemar's. None without a reference, and
    for the reference itself.
    """
    if reference is None or model.name == reference.name:
        return None
    labels, groups = context.inputs.rows.labels, context.inputs.groups
    hits, reference_hits = ((entry.probabilities.argmax(axis=1) == labels) for entry in (model, reference))
    losses, reference_losses = (log_loss_per_row(entry.probabilities, labels) for entry in (model, reference))
    p_value = proportions.sign_flip_p(hits, reference_hits, groups)
    return {
        "name": reference.name,
        "delta_accuracy": float(hits.mean() - reference_hits.mean()),
        "delta_ci95": _as_list(proportions.difference_interval(hits, reference_hits, groups)),
        "delta_log_loss": float((losses - reference_losses).mean()),
        "delta_log_loss_ci95": _as_list(paired_interval(losses - reference_losses, groups)),
        **context.calibrated.difference(model, reference),
        **_compared_areas(context.areas(model), context.areas(reference), context),
        "test": "mcnemar" if groups is None else "sign_flip",
        "p_value": p_value,
        "mcnemar_p": p_value if groups is None else None,
    }


def _compared_areas(areas: MeanAreas, reference: MeanAreas, context: EvaluationContext) -> dict[str, Any]:
    """Return the difference of the mean ROC areas with DeLong's test; null if every row belongs to one class."""
    compared = compare_areas(areas, reference, context.inputs.rows.labels, context.inputs.groups)
    return {
        "delta_roc_auc": None if compared is None else compared.difference,
        "delta_roc_auc_ci95": None if compared is None else _as_list(compared.interval),
        "delong_p": None if compared is None else compared.p_value,
    }


def _as_list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _weights(model: ScoredModel, saved: Mapping[str, Any] | None, notes: dict[str, str]) -> dict[str, float] | None:
    if saved is None:
        return {model.name: 1.0}
    if saved.get("weights") is None:
        notes["weights"] = f"{saved['method']} is no weighted mean of its members"
    return saved.get("weights")


def _crossfit(predictions: OutOfSamplePredictions, groups: np.ndarray | None) -> dict[str, Any]:
    losses = log_loss_per_row(predictions.probabilities, predictions.labels)
    hits = predictions.probabilities.argmax(axis=1) == predictions.labels
    return {
        "n": len(losses),
        "accuracy": float(hits.mean()),
        "log_loss": float(losses.mean()),
        "log_loss_ci95": _as_list(mean_interval(losses, groups)) if (~hits).sum() >= MIN_ERRORS else None,
    }


def _folds(predictions: OutOfSamplePredictions) -> dict[str, Any] | None:
    """Return mean and deviation over the folds of a member's K-fold networks, or an ensemble's cross-fitted copies."""
    if predictions.folds is None:
        return None
    held_out = predictions.folds >= 0
    splits = "+".join(sorted(set(predictions.split[held_out].tolist())))
    return fold_scores(
        predictions.probabilities[held_out], predictions.labels[held_out], predictions.folds[held_out], splits
    )


def _imported(model: ScoredModel, inputs: EvaluationInputs) -> list[str]:
    return [name for name in model.members if inputs.catalog.members[name].source == IMPORTED]


def _size_mb(model: ScoredModel, inputs: EvaluationInputs, notes: dict[str, str]) -> float | None:
    """Return the size in 10^6 bytes of the checkpoints that predict for a model, and of the combiner."""
    imported = _imported(model, inputs)
    if imported:
        notes["size_mb"] = f"imported predictions: {', '.join(imported)}"
        return None
    size = inputs.costs.sizes[model.name]
    if size is None:
        notes["size_mb"] = f"missing files: {', '.join(inputs.costs.missing_files[model.name])}"
        return None
    return round(size / 1e6, 3)


def _latency(model: ScoredModel, inputs: EvaluationInputs, notes: dict[str, str]) -> dict[str, Any] | None:
    """Return milliseconds for a batch of 1 and of 32: the networks one after another, then the combiner.

    The p95 is the sum of the p95 of all parts, in practice an upper bound of the p95 of the sum.
    """
    imported, costs = _imported(model, inputs), inputs.costs
    unmeasured = [costs.unmeasured[name] for name in (*model.members, model.name) if name in costs.unmeasured]
    if imported or unmeasured:
        notes["latency_ms"] = f"imported predictions: {', '.join(imported)}" if imported else "; ".join(unmeasured)
        return None
    parts = [
        (costs.latencies[name], len(fold_networks.answering(inputs.catalog.members[name], model.inference)))
        for name in model.members
    ]
    parts += [(costs.combiners[model.name], 1)] if model.kind == "ensemble" else []
    latency: dict[str, Any] = {}
    for size in (1, 32):
        latency[f"batch_{size}"] = _summed([(record.batches.get(size), count) for record, count in parts])
        if latency[f"batch_{size}"] is None:
            notes[f"latency_ms.batch_{size}"] = "out of memory"
    busy = highest_busy(record for record, _ in parts)
    return latency | {"device": parts[0][0].device, "threads": parts[0][0].threads, "busy": busy}


def one_image_latencies(inputs: EvaluationInputs) -> dict[str, float]:
    """Return {model: milliseconds per image} of the evaluated models that are measured.

    For an ensemble that runs only some members per image, it is the mean over the out-of-sample rows.
    """
    latencies: dict[str, float] = {}
    for model in inputs.models:
        if model.kind == "ensemble":
            itself = (inputs.ensembles[model.name].record.get("beside") or {}).get("itself") or {}
            expected = itself.get("expected_latency_ms")
            if expected is not None:
                latencies[model.name] = expected
                continue
        if model.name in inputs.costs.sizes:
            measured = ((_latency(model, inputs, {}) or {}).get("batch_1") or {}).get("p50")
            latencies |= {} if measured is None else {model.name: measured}
    return latencies


def _summed(timings: Sequence[tuple[Timing | None, int]]) -> dict[str, float] | None:
    measured = [(timing, count) for timing, count in timings if timing is not None]
    if len(measured) < len(timings):
        return None
    return {key: round(sum(getattr(timing, key) * count for timing, count in measured), 4) for key in ("p50", "p95")}
