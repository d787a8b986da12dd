"""`metrics.json` of one member or ensemble: scores with intervals, comparisons, cost, uncertainty and provenance.

Every key is always present; what could not be measured is null, with the reason in `notes`.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from utils.building.latency import Timing, highest_busy
from utils.distillation import controls
from utils.evaluation import evaluated_rows
from utils.evaluation.calibrated_scores import CalibratedLosses
from utils.evaluation.class_scores import add_class_scores, fold_scores
from utils.evaluation.evaluation_inputs import EvaluationInputs
from utils.evaluation.scoring import ScoredModel
from utils.numeric import proportions, selective, uncertainty
from utils.numeric.areas import MeanAreas, mean_areas
from utils.numeric.calibration_chance import chance_ece
from utils.numeric.delong import compare_areas
from utils.numeric.means import MIN_ERRORS, MIN_UNITS, count_units, mean_interval, paired_interval
from utils.numeric.metric_intervals import metric_intervals
from utils.numeric.metrics import log_loss_per_row, point_metrics, softmax
from utils.numeric.statistics import REPLICATES, Floats, bootstrap_metrics
from utils.numeric.uncertainty import LabelledRows
from utils.predictions import fold_networks
from utils.predictions.catalog import IMPORTED
from utils.predictions.rows import UNKNOWN, MemberRows

COPIED_KEYS = ("expected_experts",)
"""Keys of `ensemble.json` that `metrics.json` repeats where they are present"""


@dataclass(frozen=True)
class OutOfSamplePredictions:
    """Predictions of one model on labelled rows that it was not fitted on: out-of-fold or cross-fitted, and of val."""

    probabilities: np.ndarray
    """(N, C)"""
    labels: np.ndarray
    """int64 (N,)"""
    split: np.ndarray
    """unicode (N,)"""
    sample_ids: np.ndarray
    """unicode (N,)"""
    folds: np.ndarray | None = None
    """int64 (N,): the fold that each row was held out in, -1 for val rows of a member; None without folds"""

    def keys(self) -> list[tuple[str, str]]:
        """(split, sample id) of each row."""
        return list(zip(self.split.tolist(), self.sample_ids.tolist(), strict=True))

    def of_val(self) -> OutOfSamplePredictions | None:
        """The val rows, by the networks that answer at inference; None without any."""
        rows = self.split == "val"
        if not rows.any():
            return None
        return OutOfSamplePredictions(
            self.probabilities[rows], self.labels[rows], self.split[rows], self.sample_ids[rows]
        )


def out_of_sample_predictions(inputs: EvaluationInputs, name: str) -> OutOfSamplePredictions | None:
    """Of an ensemble its cross-fitted predictions, of a member its labelled out-of-sample rows; None without any."""
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
        of_parts = [np.full(len(part.labels), -1) if part.fold is None else part.fold for part in parts]
        folds = np.concatenate(of_parts)[labelled]
    return OutOfSamplePredictions(
        np.concatenate([softmax(np.asarray(part.logits)) for part in parts])[labelled],
        labels[labelled],
        np.concatenate([np.full(len(part.labels), part.split) for part in parts])[labelled],
        np.concatenate([np.asarray(part.sample_ids) for part in parts])[labelled],
        folds,
    )


class EvaluationContext:
    """What the records of one evaluation share: inputs, models to compare with, bootstrap samples, OOD scores."""

    def __init__(
        self, inputs: EvaluationInputs, models: Sequence[ScoredModel], references: Mapping[str, ScoredModel | None]
    ) -> None:
        """`references` are {vs_best_single, vs_soft_voting: model to compare with}."""
        self.inputs, self.references = inputs, references
        compared = {id(model): model for model in (*models, *references.values()) if model is not None}
        self.index = {key: number for number, key in enumerate(compared)}
        probabilities = [model.probabilities for model in compared.values()]
        settings, rows = inputs.settings, inputs.rows
        self.samples = bootstrap_metrics(probabilities, rows.labels, groups=inputs.groups, seed=settings.seed)
        self._ood_scores: dict[tuple[str, str], tuple[np.ndarray, Floats]] = {}
        self._areas: dict[int, MeanAreas] = {}
        self.calibrated = CalibratedLosses(rows.labels, inputs.groups, self._fits_temperature)

    def _fits_temperature(self, model: ScoredModel) -> OutOfSamplePredictions | None:
        """Rows that fit a model's temperature for scores; None without any, and on val, which is among them."""
        inputs = self.inputs
        has_rows = model.name in inputs.crossfits or model.name in inputs.out_of_sample
        if inputs.split == "val" or model.provenance.unknown_training_data or not has_rows:
            return None
        return out_of_sample_predictions(inputs, model.name)

    def areas(self, model: ScoredModel) -> MeanAreas:
        """Mean areas of a model under its curves, with the influence of each row; computed once."""
        if id(model) not in self._areas:
            self._areas[id(model)] = mean_areas(model.probabilities, self.inputs.rows.labels)
        return self._areas[id(model)]

    def ood_scores(self, names: Sequence[str], split: str) -> Floats:
        """Mean over members of `uncertainty.ood_scores` of their full networks on the rows that all have, (2, N)."""
        parts = [self._of_network(name, split) for name in names]
        shared = set.intersection(*(set(ids.tolist()) for ids, _ in parts))
        mean: Floats = np.mean([values[:, np.isin(ids, list(shared))] for ids, values in parts], axis=0)
        return mean

    def _of_network(self, name: str, split: str) -> tuple[np.ndarray, Floats]:
        """Sample ids (N,) and OOD scores (2, N) of one member's full network, computed once."""
        if (name, split) not in self._ood_scores:
            rows = self.inputs.rows
            ids, logits = rows.sample_ids, rows.logits[rows.members.index(name)]
            if split != self.inputs.split:
                part = self.inputs.val_rows(name)
                assert part is not None, f"{name} has no val rows"
                ids, logits = np.asarray(part.sample_ids), np.asarray(part.logits)
            self._ood_scores[name, split] = ids, uncertainty.ood_scores(logits)
        return self._ood_scores[name, split]


def metrics_record(model: ScoredModel, context: EvaluationContext) -> dict[str, Any]:
    """`metrics.json` of a model."""
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
        reason = "val rows fit the temperature, so they cannot measure it" if is_val else _no_out_of_sample_rows(model)
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
        **_uncertainty(model, predictions, context, notes),
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
        notes["crossfit"] = _no_out_of_sample_rows(model)
    if record["folds"] is None:
        notes["folds"] = "it has no predictions of two folds or more" if predictions else _no_out_of_sample_rows(model)
    if saved is None:
        notes["config_digest"] = "a member does not depend on the configuration"
    if not inputs.catalog.has_images:
        notes["overlap.dropped"] = "without images, equal samples under two names cannot be recognised"
    return record


def _no_out_of_sample_rows(model: ScoredModel) -> str:
    """Why a model has none."""
    unknown = model.provenance.unknown_training_data
    if unknown:
        return f"the training data of {', '.join(unknown)} is not stated, so no row is known to be out of sample"
    return "it was trained on all train and val rows"


def _compared(model: ScoredModel, reference: ScoredModel | None, context: EvaluationContext) -> dict[str, Any] | None:
    """Differences to another model on the same rows, with paired intervals and an exact test over rows or groups.

    `mcnemar_p` is the same p-value by the name that it has where rows are independent.
    """
    if reference is None or model.name == reference.name:
        return None
    labels, groups = context.inputs.rows.labels, context.inputs.groups
    hits, reference_hits = ((each.probabilities.argmax(axis=1) == labels) for each in (model, reference))
    losses, reference_losses = (log_loss_per_row(each.probabilities, labels) for each in (model, reference))
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
    """The difference of the mean areas under the ROC curve with DeLong's test; null where a class has every row."""
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
    """Mean and deviation over the folds: of a member its K-fold networks, of an ensemble its cross-fitted copies."""
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
    """Size in 10^6 bytes of the checkpoints that answer, and of the combiner."""
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
    """Milliseconds for a batch of 1 and of 32: the networks one after another, then the combiner.

    The p95 is the sum of the parts' p95, which bounds the p95 of the sum in practice.
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
    """{model: milliseconds for one image} of the evaluated models that are measured.

    Of an ensemble that runs only some members for an image, the mean over the out-of-sample rows.
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


def _uncertainty(
    model: ScoredModel, predictions: OutOfSamplePredictions | None, context: EvaluationContext, notes: dict[str, str]
) -> dict[str, Any]:
    """`conformal`, `selective`, `mutual_information`, `out_of_distribution`, and `conformal_by_class` on request."""
    inputs = context.inputs
    options, rows, split = inputs.settings.options, inputs.rows, inputs.split
    evaluated_keys = zip(rows.split.tolist(), rows.sample_ids.tolist(), strict=True)
    evaluated = LabelledRows(model.probabilities, rows.labels, inputs.uniforms(evaluated_keys), inputs.groups)
    val = None if split == "val" or predictions is None else predictions.of_val()
    calibration = None
    record: dict[str, Any] = {"conformal": None}
    reason = "it has no out-of-sample val rows" if predictions is not None else _no_out_of_sample_rows(model)
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
    """How many rows have higher OOD scores than 95% of the val rows, by two scores."""
    reason = "its members' predictions are log-probabilities, from which OOD scores cannot be computed"
    summary = None
    if context.inputs.split == "val":
        reason = "val rows are the reference for OOD scores"
    elif any(context.inputs.val_rows(name) is None for name in model.members):
        reason = "it has no out-of-sample val rows"
    elif model.inference == fold_networks.FULL:
        scores, reference = (context.ood_scores(model.members, split) for split in (context.inputs.split, "val"))
        summary = uncertainty.ood_summary(scores, reference)
    if summary is None:
        notes["out_of_distribution"] = reason
        return None
    limits = "an indication, not a test: networks can be confident on unfamiliar images, and some shifts do not show"
    return summary | {"limits": limits}
