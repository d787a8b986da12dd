"""The two controls of a student, on the same rows: its teacher, and the same network trained without a teacher.

With several seeds, student and network alone are trained once per seed, and their means are compared.

`distill` stores their predictions in `ensembles/distillation/<name>/`; `evaluate` scores the student against them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.core.artifacts import read_arrays, read_record, write_arrays
from utils.core.workspace import Workspace
from utils.distillation import verdicts
from utils.distillation.verdicts import Difference, difference, difference_text, outcome, row_scores, speed_text
from utils.numeric.means import MIN_UNITS, count_units, ratio_interval
from utils.numeric.metrics import accuracy, clipped_log, ece, log_loss, softmax
from utils.numeric.temperature import fit_temperature

STUDENT, ALONE, TEACHER = "student", "alone", "teacher"
"""Keys of the student and its controls: the same network trained without a teacher, and the teacher."""
MIN_GAIN_ERRORS = 10
"""Minimum number of rows misclassified by the network alone or the teacher for an interval of the gain's fraction."""
REMEDY = "Distill again: python ensemble_orchestrator.py distill --force"


def write_controls(workspace: Workspace, name: str, predictions: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write {split: {student, alone: probabilities (K, N, C), teacher: (N, C), labels, sample_ids: (N,)}}."""
    arrays = {f"{split}/{key}": array for split, parts in predictions.items() for key, array in parts.items()}
    write_arrays(workspace.distillation(name) / "controls.npz", arrays)


@dataclass(frozen=True)
class Controls:
    """Data for comparing a student with its controls: its record, and the predictions of all three."""

    record: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    """split/student, split/alone: probabilities (K, N, C); split/teacher: (N, C); split/labels, split/sample_ids: (N,).

    Workspaces of earlier versions have no student, and one training (N, C) of the network alone."""


def read_controls(workspace: Workspace, name: str) -> Controls | None:
    """The controls of a student; None for other ensembles."""
    record = read_record(workspace.distillation(name) / "record.json", remedy=REMEDY)
    path = workspace.distillation(name) / "controls.npz"
    if record is None or not path.is_file():
        return None
    return Controls(record, read_arrays(path, remedy=REMEDY))


def control_metrics(
    stored: Controls,
    split: str,
    sample_ids: Sequence[str],
    probabilities: np.ndarray,
    groups: np.ndarray | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """`controls` and `gain_kept` for a student's `metrics.json`, and the notes on them.

    `probabilities` (N, C) are the student's on the rows `sample_ids`; rows with equal `groups` (N,) are dependent.
    """
    record, arrays = stored.record, stored.arrays
    stored_ids = arrays.get(f"{split}/sample_ids", np.array([])).tolist()
    row_of = {sample_id: row for row, sample_id in enumerate(stored_ids)}
    if any(sample_id not in row_of for sample_id in sample_ids):
        reason = f"the controls have no predictions for these rows of {split}"
        return {"controls": None, "gain_kept": None}, {"controls": reason, "gain_kept": reason}
    rows = [row_of[sample_id] for sample_id in sample_ids]
    labels = arrays[f"{split}/labels"][rows]
    trainings = {key: _trainings(arrays, split, key)[:, rows] for key in (ALONE, TEACHER)}
    further = arrays.get(f"{split}/{STUDENT}", np.empty((0, *probabilities.shape)))[1:]
    trainings[STUDENT] = (
        np.concatenate([probabilities[None], further[:, rows]]) if len(further) else probabilities[None]
    )
    return compare(record, trainings, labels, temperatures(arrays), groups)


def compare(
    record: Mapping[str, Any],
    trainings: Mapping[str, np.ndarray],
    labels: np.ndarray,
    fitted: Mapping[str, Sequence[float]],
    groups: np.ndarray | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """`controls` and `gain_kept` of trainings {student, alone, teacher: probabilities (K, N, C)}, and notes on them.

    Differences and fractions are computed after temperature scaling by `fitted`; scores are those of the uncalibrated
    networks, means over the trainings. Rows with equal `groups` (N,) are dependent.
    """
    calibrated = {
        key: np.stack([_scaled(*pair) for pair in zip(runs, fitted[key], strict=True)]) if key in fitted else runs
        for key, runs in trainings.items()
    }
    metrics = {key: _mean_scores(trainings[key], calibrated[key], labels) for key in trainings}
    controls: dict[str, Any] = {key: record["costs"][key] | metrics[key] for key in (ALONE, TEACHER)}
    controls[TEACHER] |= {
        "name": record["teacher"],
        "agreement": agreement(trainings[STUDENT][0], trainings[TEACHER][0]),
    }
    differences = {
        metric: difference(calibrated[STUDENT], calibrated[ALONE], labels, metric, groups)
        for metric in verdicts.METRICS
    }
    controls[ALONE] |= {"student_ahead": {metric: each.as_record() for metric, each in differences.items()}}
    gain, reason = gain_kept(calibrated[STUDENT], calibrated[ALONE], calibrated[TEACHER], labels, groups)
    seeds = min(len(trainings[STUDENT]), len(trainings[ALONE]))
    text = verdict(metrics, differences, gain, record["costs"], seeds=seeds)
    return {"controls": controls, "gain_kept": gain}, {"controls": text} | ({"gain_kept": reason} if reason else {})


def temperatures(arrays: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """{student, alone, teacher: temperature of each training}, all fitted on val; empty without val."""
    if f"val/{STUDENT}" not in arrays:
        return {}
    labels = arrays["val/labels"]
    return {
        key: [fit_temperature(clipped_log(each), labels) for each in _trainings(arrays, "val", key)]
        for key in (STUDENT, ALONE, TEACHER)
    }


def _scaled(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    return softmax(clipped_log(probabilities) / temperature)


def _trainings(arrays: Mapping[str, np.ndarray], split: str, key: str) -> np.ndarray:
    """Probabilities (K, N, C); the teacher and workspaces of earlier versions have a single array (N, C), K = 1."""
    stored = arrays[f"{split}/{key}"]
    return stored if stored.ndim == 3 else stored[None]


def _mean_scores(trainings: np.ndarray, calibrated: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Means over the trainings (K, N, C) of `scores`, and of the log-loss after temperature scaling."""
    scores_of_trainings = [scores(probabilities, labels) for probabilities in trainings]
    names = scores_of_trainings[0]
    means = {name: float(np.mean([training[name] for training in scores_of_trainings])) for name in names}
    return means | {"log_loss_calibrated": float(np.mean([log_loss(training, labels) for training in calibrated]))}


def scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`{accuracy, log_loss, ece}` of probabilities (N, C)."""
    return {
        "accuracy": accuracy(probabilities, labels),
        "log_loss": log_loss(probabilities, labels),
        "ece": ece(probabilities, labels),
    }


def agreement(probabilities: np.ndarray, reference: np.ndarray) -> float:
    """Fraction of the rows for which two arrays (N, C) predict the same class."""
    return float((probabilities.argmax(axis=1) == reference.argmax(axis=1)).mean())


def gain_kept(
    student: np.ndarray, alone: np.ndarray, teacher: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None
) -> tuple[dict[str, Any], str]:
    """Fraction of the teacher's gain that the student keeps, and the reason why it or its bounds are undefined.

    `(student - alone) / (teacher - alone)` in accuracy, `{value, ci95}`, and the same in log-loss under `log_loss`.
    Probabilities (K, N, C) of K trainings, whose scores are averaged; labels (N,). The interval over rows, or groups
    (N,), is Fieller's (1954). It has no bounds if the teacher's interval contains a gain of zero, since any fraction is
    then possible, with fewer than 10 rows or groups, or if alone and teacher err on fewer than `MIN_GAIN_ERRORS` rows.
    `value` is None if the teacher is not better than the network trained alone.
    """
    gains, reasons = {}, []
    correct = np.concatenate([row_scores(each, labels, "accuracy") for each in (alone, teacher)]).min(axis=0)
    is_too_few = count_units(len(labels), groups) < MIN_UNITS or (correct < 1).sum() < MIN_GAIN_ERRORS
    for metric in verdicts.METRICS:
        student_rows, alone_rows, teacher_rows = (
            row_scores(each, labels, metric).mean(axis=0) for each in (student, alone, teacher)
        )
        spoken = metric.replace("_", "-")
        student_gain = float(student_rows.mean() - alone_rows.mean())
        teacher_gain = float(teacher_rows.mean() - alone_rows.mean())
        if teacher_gain <= 0:
            reasons.append(f"the teacher's {spoken} is not better than that of the network trained without a teacher")
        interval = None
        if not is_too_few:
            interval = ratio_interval(student_rows - alone_rows, teacher_rows - alone_rows, groups)
        bounds = [None, None] if interval is None else list(interval)
        gains[metric] = {"value": student_gain / teacher_gain if teacher_gain > 0 else None, "ci95": bounds}
        if teacher_gain > 0 and interval is None:
            reasons.append(f"{len(labels)} rows are too few to establish that the teacher gains in {spoken}")
    return gains["accuracy"] | {"log_loss": gains["log_loss"]}, "; ".join(reasons)


def verdict(
    metrics: Mapping[str, Mapping[str, float]],
    differences: Mapping[str, Difference],
    gain: Mapping[str, Any],
    costs: Mapping[str, Mapping[str, Any]],
    *,
    seeds: int,
) -> str:
    """One sentence on whether distillation helped, from scores, differences, `gain_kept` and the record's costs."""
    student, alone, teacher = (metrics[key] for key in (STUDENT, ALONE, TEACHER))
    figures = (
        f"accuracy {student['accuracy']:.4f}, alone {alone['accuracy']:.4f}, teacher {teacher['accuracy']:.4f}; "
        f"calibrated log-loss {student['log_loss_calibrated']:.4f}, alone {alone['log_loss_calibrated']:.4f}, "
        f"teacher {teacher['log_loss_calibrated']:.4f}"
    )
    points = 100 * (student["accuracy"] - teacher["accuracy"])
    parts = [f"{outcome(differences, seeds=seeds)} ({difference_text(differences)})", figures]
    parts += [text] if (text := speed_text(costs, ALONE, TEACHER, points)) else []
    parts += [] if gain["value"] is None else [f"{100 * gain['value']:.0f}% of the teacher's gain in accuracy kept"]
    return "; ".join(parts)
